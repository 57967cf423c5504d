"""Hugging Face causal language models, split into layers by one call."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..traces.errors import InputError
from .layers import Layers

IGNORED = -100
"""The label that counts for nothing."""

SUPPORTED = "Llama, Mistral, Qwen2, Qwen3 and GPT-2"


def split_causal_lm(model: nn.Module) -> Layers:
    """The layers of a causal language model: embedding, blocks, and norm with head.

    Token ids (batch, sequence) go in, or a dict of `input_ids` and `attention_mask`; logits (batch,
    sequence, vocabulary) come out. Parameters keep the model's own names; a tied embedding and head
    stay one parameter. Raises InputError for a model of another structure.
    """
    names = {id(each): name for name, each in model.named_parameters()}
    lm = next((part for part in model.modules() if hasattr(part, "lm_head")), None)
    body = getattr(lm, "model", None)
    if body is not None and all(hasattr(body, part) for part in _LLAMA_PARTS):
        modules = [
            LlamaEmbedding(body.embed_tokens, body.rotary_emb),
            *(LlamaBlock(block) for block in body.layers),
            Head(body.norm, lm.lm_head),  # type: ignore[union-attr, arg-type]
        ]
    elif (body := getattr(lm, "transformer", None)) is not None and hasattr(body, "wpe"):
        modules = [
            Gpt2Embedding(body.wte, body.wpe, body.drop),
            *(Gpt2Block(block) for block in body.h),
            Head(body.ln_f, lm.lm_head),  # type: ignore[union-attr, arg-type]
        ]
    else:
        raise InputError(
            f"model: {type(model).__name__} cannot be split; "
            f"supported are {SUPPORTED} causal models"
        )
    return Layers(modules, [_global_names(module, names) for module in modules])


_LLAMA_PARTS = ("embed_tokens", "rotary_emb", "layers", "norm")


def _global_names(module: nn.Module, names: dict[int, str]) -> dict[str, str]:
    every = module.named_parameters(remove_duplicate=False)
    return {name: names[id(parameter)] for name, parameter in every}


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each token's logits for the next label; labels of -100 do not count.

    logits: (batch, sequence, vocabulary); labels: (batch, sequence), the input's own tokens.
    """
    shifted = logits[:, :-1].flatten(0, 1)
    if shifted.dtype in (torch.float16, torch.bfloat16):
        shifted = shifted.float()
    return functional.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=IGNORED)


def _tokens_and_mask(value: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(value, dict):
        return value["input_ids"], value.get("attention_mask")
    return value, None


def _causal_mask(padding: Tensor | None, length: int) -> Tensor | None:
    """(batch, 1, length, length), true where a token may look; None where only causality counts."""
    if padding is None:
        return None
    causal = torch.ones(length, length, dtype=torch.bool, device=padding.device).tril()
    mask = causal & padding[:, None, None, :].bool()
    # A row of padding alone would be a softmax over nothing: it looks at itself.
    itself = torch.eye(length, dtype=torch.bool, device=padding.device)
    return mask | (itself & ~mask.any(-1, keepdim=True))


class LlamaEmbedding(nn.Module):
    """Token ids to a dict of what the blocks pass on."""

    def __init__(self, embed_tokens: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.rotary = rotary

    def forward(self, value: Any) -> dict[str, Any]:
        tokens, padding = _tokens_and_mask(value)
        hidden = self.embed_tokens(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        cos, sin = self.rotary(hidden, places)
        mask = _causal_mask(padding, tokens.shape[1])
        return {"hidden": hidden, "cos": cos, "sin": sin, "mask": mask}


class LlamaBlock(nn.Module):
    """A decoder layer of Llama or of a model built like it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        output = self.block(
            value["hidden"],
            attention_mask=value["mask"],
            position_embeddings=(value["cos"], value["sin"]),
            use_cache=False,
        )
        return {**value, "hidden": output[0] if isinstance(output, tuple) else output}


class Gpt2Embedding(nn.Module):
    """Token ids to a dict of what the blocks pass on, with learned positions."""

    def __init__(self, tokens: nn.Module, positions: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = tokens, positions, dropout

    def forward(self, value: Any) -> dict[str, Any]:
        tokens, padding = _tokens_and_mask(value)
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        hidden = self.dropout(self.tokens(tokens) + self.positions(places))
        return {"hidden": hidden, "mask": _causal_mask(padding, tokens.shape[1])}


class Gpt2Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        output = self.block(value["hidden"], attention_mask=value["mask"])
        return {**value, "hidden": output[0] if isinstance(output, tuple) else output}


class Head(nn.Module):
    """The last norm and the projection to logits."""

    def __init__(self, norm: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.norm, self.lm_head = norm, lm_head

    def forward(self, value: dict[str, Any]) -> Tensor:
        return self.lm_head(self.norm(value["hidden"]))  # type: ignore[no-any-return]
