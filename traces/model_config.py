"""A model's shape from its Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .shapes import DecoderShape, block_params, embedding_params, head_params

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "gpt2")
"""The `model_type`s that are understood."""

_MOST = 2**31
_SINK = 1  # gpt-oss: one learned sink a head


@dataclass(frozen=True)
class ModelConfig:
    """What a trace needs to know of a model.

    `windows` has for each block the most keys that a token attends to, or None for all before
    it. `tied`: the head's matrix is the embedding's.
    """

    family: str
    shape: DecoderShape
    windows: tuple[int | None, ...]
    tied: bool

    @property
    def params(self) -> int:
        """Parameters of the model, those that are shared counted once."""
        shape = self.shape
        shared = shape.vocabulary * shape.hidden if self.tied else 0
        blocks = shape.layers * block_params(shape)
        return embedding_params(shape) + blocks + head_params(shape) - shared


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The shape that a `config.json`, as a dict, describes.

    Raises InputError for another family than `FAMILIES`, a missing or wrong field, or a mixture
    of which some blocks are dense.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"config: model_type: must be one of {', '.join(FAMILIES)}, got {family!r}"
        )
    shape = _gpt2(config) if family == "gpt2" else _llama_like(family, config)
    tied = config.get("tie_word_embeddings", family == "gpt2")
    return ModelConfig(family, shape, _windows(family, config, shape.layers), bool(tied))


def _gpt2(config: Mapping[str, Any]) -> DecoderShape:
    hidden, heads = _count(config, "n_embd"), _count(config, "n_head")
    inner = _count(config, "n_inner", 4 * hidden)
    return DecoderShape(
        hidden=hidden,
        layers=_count(config, "n_layer"),
        heads=heads,
        kv_heads=heads,
        head_size=_head_size(config, hidden, heads),
        ffn=inner,
        vocabulary=_count(config, "vocab_size"),
        gated=False,
        norm_bias=True,
        bias_params=4 * hidden + inner + hidden,
        positions=_count(config, "n_positions"),
    )


def _llama_like(family: str, config: Mapping[str, Any]) -> DecoderShape:
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads", heads)
    experts, active, ffn = _experts(family, config)
    size = _head_size(config, hidden, heads)
    query, key = heads * size, kv_heads * size
    return DecoderShape(
        hidden=hidden,
        layers=_count(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        ffn=ffn,
        vocabulary=_count(config, "vocab_size"),
        experts=experts,
        active_experts=active,
        qk_norm=family.startswith("qwen3"),
        bias_params=_biases(family, config, (hidden, query, key, heads, ffn, experts)),
    )


def _experts(family: str, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(experts, active experts, inner size of one)."""
    if family == "qwen3_moe":
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise InputError(
                "config: mlp_only_layers, decoder_sparse_step: dense blocks in a "
                "mixture are not supported; all blocks must have experts"
            )
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    elif family == "gpt_oss":
        names = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    else:
        return 1, 1, _count(config, "intermediate_size")
    experts, active, ffn = (_count(config, name) for name in names)
    if active > experts:
        raise InputError(f"config: num_experts_per_tok: {active} of only {experts} experts")
    return experts, active, ffn


def _biases(family: str, config: Mapping[str, Any], sizes: tuple[int, ...]) -> int:
    """A block's biases (and sinks): Qwen2 has them at query, key and value, gpt-oss everywhere."""
    hidden, query, key, heads, ffn, experts = sizes
    if family == "gpt_oss":
        attention = query + 2 * key + hidden + _SINK * heads
        return attention + experts + experts * (2 * ffn + hidden)
    count = 0
    if family == "qwen2" or config.get("attention_bias"):
        count += query + 2 * key + (hidden if family != "qwen2" else 0)
    if config.get("mlp_bias"):
        count += 2 * ffn + hidden
    return count


def _head_size(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        return _count(config, "head_dim")
    if hidden % heads:
        raise InputError(f"config: hidden size {hidden} is no multiple of its {heads} heads")
    return hidden // heads


def _windows(family: str, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Each block's sliding window. gpt-oss: every other block, the first of them, if not said."""
    if config.get("sliding_window") is None or not _slides(family, config):
        return (None,) * layers
    window = _count(config, "sliding_window")
    kinds = config.get("layer_types")
    if kinds is None:
        alternates = family == "gpt_oss"
        return tuple(None if alternates and n % 2 else window for n in range(layers))
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise InputError(f"config: layer_types: must be a list of {layers} kinds, one a layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _slides(family: str, config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_sliding_window", not family.startswith("qwen")))


def _count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"config: {name}: missing; add it")
    if type(value) is not int or not 1 <= value < _MOST:
        raise InputError(f"config: {name}: must be a whole number from 1, got {value!r}")
    return value
