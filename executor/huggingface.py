"""Hugging Face causal language models, split into layers by one call."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..traces.errors import InputError
from .head_loss import Projected
from .layers import Layers, every_tensor
from .token_loss import IGNORED, token_loss

SUPPORTED = "Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE and GPT-2"

# Other families may have the same parts and yet scale what passes between them.
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def split_causal_lm(model: nn.Module, head_in_loss: bool = False) -> Layers:
    """The layers of a causal language model: embedding, blocks, and norm with head.

    Token ids (batch, sequence) go in, or a dict of `input_ids` and `attention_mask` (batch,
    sequence); logits (batch, sequence, vocabulary) come out. Leave the mask out where nothing is
    padded: attention is faster without. With `head_in_loss` the loss, `token_loss` or
    `causal_lm_loss`, makes the logits, a part of them at a time, which needs much less memory.
    Parameters keep the model's own names; a tied embedding and head stay one parameter. A model in
    peft's wrapping gives layers with its adapters in them.

    Raises InputError for a model of another kind, one that checkpoints by itself, and one with
    prompts learned by peft.
    """
    lm = _inside_of_peft(model)
    family = getattr(getattr(lm, "config", None), "model_type", None)
    modules: list[nn.Module]
    if family in _LLAMA_LIKE and hasattr(lm, "lm_head"):
        body = lm.model
        modules = [
            LlamaEmbedding(body.embed_tokens),
            *(LlamaBlock(block, _window(block), _rotary(body)) for block in body.layers),
            Head(body.norm, lm.lm_head, head_in_loss),
        ]
    elif family == "gpt2" and hasattr(lm, "lm_head"):
        body = lm.transformer
        modules = [
            Gpt2Embedding(body.wte, body.wpe, body.drop),
            *(Gpt2Block(block) for block in body.h),
            Head(body.ln_f, lm.lm_head, head_in_loss),
        ]
    else:
        raise InputError(
            f"model: {type(lm).__name__} cannot be split; supported are {SUPPORTED} causal models"
        )
    if any(getattr(part, "gradient_checkpointing", False) for part in lm.modules()):
        raise InputError(
            "model: it checkpoints by itself; switch its gradient checkpointing off "
            "and let the policy recompute"
        )
    names: dict[int, list[str]] = defaultdict(list)
    for name, each in every_tensor(model):
        names[id(each)].append(name)
    return Layers(modules, [_global_names(module, names) for module in modules])


def _rotary(body: Any) -> nn.Module:
    """The model's rotary embedding; made anew where it is on the meta device: it has no weights."""
    if any(each.is_meta for each in body.rotary_emb.buffers()):
        body.rotary_emb = type(body.rotary_emb)(body.config)
    return body.rotary_emb  # type: ignore[no-any-return]


def _inside_of_peft(model: nn.Module) -> Any:
    """The model that peft has put its adapters into; the model itself where it has not."""
    if not hasattr(model, "get_base_model"):
        return model
    peft_model: Any = model
    if any(kind.is_prompt_learning for kind in peft_model.peft_config.values()):
        raise InputError("model: peft's prompt learning cannot be split; use LoRA or another tuner")
    return peft_model.get_base_model()


def _global_names(module: nn.Module, names: dict[int, list[str]]) -> dict[str, str]:
    """The model's names of a layer's tensors. Of several, as of a tied one, each is used up but the
    last, which later layers have too."""
    mine = {}
    for name, each in every_tensor(module):
        known = names[id(each)]
        mine[name] = known.pop(0) if len(known) > 1 else known[0]
    return mine


def causal_lm_loss(logits: Tensor | Projected, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each token's logits for the next label, in float32 or wider.

    logits: (batch, sequence, vocabulary), or what they are made from; labels: (batch, sequence),
    the input's own tokens. Labels of -100 do not count; where none counts, the loss is 0. The mean
    is over one microbatch: those with more labels that do not count weigh the others more.
    """
    return token_loss(logits, functional.pad(labels[:, 1:], (0, 1), value=IGNORED))


def _tokens_and_padding(value: Any) -> tuple[Tensor, Tensor | None]:
    """Token ids, and where they are no padding (bool), both (batch, sequence)."""
    if not isinstance(value, dict):
        return value, None
    others = sorted(value.keys() - {"input_ids", "attention_mask"})
    if others or "input_ids" not in value:
        wrong = f"got {others[0]!r}" if others else "input_ids is missing"
        raise InputError(f"inputs: give input_ids, and attention_mask if need be; {wrong}")
    padding = value.get("attention_mask")
    if padding is not None and padding.ndim != 2:
        raise InputError("inputs: attention_mask must be (batch, sequence)")
    return value["input_ids"], None if padding is None else padding.bool()


def _window(block: Any) -> int | None:
    """How many tokens back a block looks; None: to the first."""
    attention = block.self_attn
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    if attention.config.model_type != "mistral":
        return None
    return attention.config.sliding_window  # type: ignore[no-any-return]


def _mask(
    implementation: str, hidden: Tensor, padding: Tensor | None, window: int | None
) -> Tensor | None:
    """What the attention of this implementation takes as its mask, as transformers makes it.

    None where causality alone counts, which `sdpa` knows by itself.
    """
    if "flash" in implementation:
        return padding
    if implementation not in ("sdpa", "eager"):
        raise InputError(
            f"model: attention by {implementation} cannot be split; "
            'make the model with attn_implementation="sdpa", "eager" or "flash_attention_2"'
        )
    length = hidden.shape[1]
    reach = length if window is None else window
    if implementation == "sdpa" and padding is None and reach >= length:
        return None
    looks = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    looks = looks.triu(1 - reach)[None, None]
    if padding is not None:
        looks = looks & padding[:, None, None, :]
    if implementation == "sdpa":
        return looks
    lowest = torch.finfo(hidden.dtype).min
    return torch.zeros_like(looks, dtype=hidden.dtype).masked_fill_(~looks, lowest)


class LlamaEmbedding(nn.Module):
    """Token ids to a dict of what the blocks pass on: hidden and padding."""

    def __init__(self, embed_tokens: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens

    def forward(self, value: Any) -> dict[str, Any]:
        tokens, padding = _tokens_and_padding(value)
        return {"hidden": self.embed_tokens(tokens), "padding": padding}


class LlamaBlock(nn.Module):
    """A decoder layer of Llama or of a model built like it.

    It makes its rotary embedding itself: that costs less than to pass it on and keep it.
    """

    def __init__(self, block: nn.Module, window: int | None, rotary: nn.Module) -> None:
        super().__init__()
        self.block: Any = block
        self.window = window
        self.rotary = rotary

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        hidden = value["hidden"]
        kind = self.block.self_attn.config._attn_implementation
        output = self.block(
            hidden,
            attention_mask=_mask(kind, hidden, value["padding"], self.window),
            position_embeddings=self.rotary(hidden, _places(hidden)),
            use_cache=False,
        )
        return {**value, "hidden": _first(output)}


def _places(hidden: Tensor) -> Tensor:
    """The place of each token of (batch, sequence, ...), (1, sequence)."""
    return torch.arange(hidden.shape[1], device=hidden.device)[None]


class Gpt2Embedding(nn.Module):
    """Token ids to a dict of what the blocks pass on: hidden, with places in it, and padding."""

    def __init__(self, tokens: nn.Module, positions: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = tokens, positions, dropout

    def forward(self, value: Any) -> dict[str, Any]:
        tokens, padding = _tokens_and_padding(value)
        hidden = self.dropout(self.tokens(tokens) + self.positions(_places(tokens)))
        return {"hidden": hidden, "padding": padding}


class Gpt2Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block: Any = block

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        hidden = value["hidden"]
        kind = self.block.attn.config._attn_implementation
        output = self.block(hidden, attention_mask=_mask(kind, hidden, value["padding"], None))
        return {**value, "hidden": _first(output)}


def _first(output: Any) -> Tensor:
    """A block's hidden states: older versions of transformers return them in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class Head(nn.Module):
    """The last norm and the projection to logits; `in_loss`: the loss makes those, in parts."""

    def __init__(self, norm: nn.Module, lm_head: nn.Module, in_loss: bool) -> None:
        super().__init__()
        self.norm, self.lm_head, self.in_loss = norm, lm_head, in_loss

    def forward(self, value: dict[str, Any]) -> Tensor | Projected:
        normed, head = self.norm(value["hidden"]), self.lm_head
        # What is no plain projection, such as one with an adapter, makes its logits itself.
        if self.in_loss and type(head) is nn.Linear and head.bias is None:
            return Projected(normed, head.weight)
        return head(normed)  # type: ignore[no-any-return]
