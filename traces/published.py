"""Traces from the layer times that the authors of RoundPipe published (arXiv 2604.27085).

Times are theirs: one block and the head (norm, projection, loss) for a microbatch of 4 sequences
of 2048 tokens on one RTX 4090, fp16 with fp16 accumulation and flash attention. Bytes are computed
from the models' public shapes by `shapes.py`. Backward's split into input and weight parts is not
published. Of qwen3-235b-lora's adapters, rank 16 on attention's linear layers is our assumption.
Their programs recompute blocks but not the head, so its recompute takes no time here. (So it is
where loss and gradient are computed together in forward, and no logits are kept.)
The embedding's time is not published either; its parameters, gradients and optimizer state belong
to block 0.

    python -m roundel.traces.published DIR      writes the files of the library
"""

import sys
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from .errors import InputError
from .shapes import DecoderShape, LayerBytes, block_bytes, head_bytes, with_embedding
from .trace import LayerCost, Trace

DEVICE = "NVIDIA GeForce RTX 4090"
MICROBATCH_TOKENS = 4 * 2048


class _Published(NamedTuple):
    """Milliseconds as printed, for forward and backward; rank 0: all parameters are trained."""

    block_ms: tuple[str, str]
    head_ms: tuple[str, str]
    hop_ms: str
    shape: DecoderShape
    lora_rank: int = 0


_PUBLISHED = {
    "qwen3-1.7b": _Published(
        ("7.429", "15.831"),
        ("22.0655", "43.707"),
        "1.6",
        DecoderShape(
            hidden=2048,
            layers=28,
            heads=16,
            kv_heads=8,
            head_size=128,
            ffn=6144,
            vocabulary=151936,
            qk_norm=True,
        ),
    ),
    "llama-3.1-8b": _Published(
        ("18.50370313", "41.20659375"),
        ("37.2255", "74.501"),
        "3.2",
        DecoderShape(
            hidden=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            head_size=128,
            ffn=14336,
            vocabulary=128256,
        ),
    ),
    "gpt-oss-20b": _Published(
        ("21.6445625", "81.780875"),
        ("44.2925", "86.264"),
        "2.25",
        DecoderShape(
            hidden=2880,
            layers=24,
            heads=64,
            kv_heads=8,
            head_size=64,
            ffn=2880,
            vocabulary=201088,
            experts=32,
            active_experts=4,
        ),
    ),
    "qwen3-32b": _Published(
        ("40.5610625", "91.17429688"),
        ("54.928", "108.294"),
        "4.0",
        DecoderShape(
            hidden=5120,
            layers=64,
            heads=64,
            kv_heads=8,
            head_size=128,
            ffn=25600,
            vocabulary=151936,
            qk_norm=True,
        ),
    ),
    "qwen3-235b-lora": _Published(
        ("43.016", "58.376"),
        ("42.444", "43.294"),
        "3.2",
        DecoderShape(
            hidden=4096,
            layers=94,
            heads=64,
            kv_heads=4,
            head_size=128,
            ffn=1536,
            vocabulary=151936,
            experts=128,
            active_experts=8,
            qk_norm=True,
        ),
        lora_rank=16,
    ),
}

_MODEL_OF = {f"{model}-rtx4090": model for model in _PUBLISHED}

PUBLISHED_NAMES = tuple(_MODEL_OF)
"""The library's names of the published traces."""

SHAPES = {name: _PUBLISHED[model].shape for name, model in _MODEL_OF.items()}
"""The public shape of each published trace's model."""

LORA_RANKS = {name: _PUBLISHED[model].lora_rank for name, model in _MODEL_OF.items()}
"""The rank of each published trace's adapters; 0: all parameters are trained."""


def ms_to_ns(milliseconds: str) -> int:
    """Decimal milliseconds as the nearest whole nanoseconds, computed without floats."""
    return int((Decimal(milliseconds) * 1_000_000).to_integral_value())


HOP_NS = {name: ms_to_ns(_PUBLISHED[model].hop_ms) for name, model in _MODEL_OF.items()}
"""Published time of one boundary tensor, 8192 x hidden x 2 bytes, between two different GPUs."""


def published_trace(name: str) -> Trace:
    """The published trace of a library name. Raises InputError for any other name."""
    if name not in _MODEL_OF:
        raise InputError(f"no published trace {name!r}; there are {', '.join(PUBLISHED_NAMES)}")
    model = _MODEL_OF[name]
    return Trace(
        name=model,
        device=DEVICE,
        provenance=_provenance(_PUBLISHED[model].lora_rank),
        microbatch_tokens=MICROBATCH_TOKENS,
        layers=_layers(_PUBLISHED[model]),
    )


def write_library(folder: str | Path) -> None:
    """Write every published trace into `folder`, as NAME.json."""
    for name in PUBLISHED_NAMES:
        published_trace(name).save(Path(folder) / f"{name}.json")


def _layers(published: _Published) -> tuple[LayerCost, ...]:
    shape, rank = published.shape, published.lora_rank
    block = block_bytes(shape, MICROBATCH_TOKENS, rank)
    first = with_embedding(block, shape, frozen=rank > 0)
    head = head_bytes(shape, MICROBATCH_TOKENS, frozen=rank > 0)
    blocks = (
        _layer(f"block.{number}", published.block_ms, block if number else first)
        for number in range(shape.layers)
    )
    return (*blocks, _layer("head", published.head_ms, head, recompute_ns=0))


def _layer(
    name: str, times_ms: tuple[str, str], size: LayerBytes, recompute_ns: int | None = None
) -> LayerCost:
    forward_ns, backward_ns = map(ms_to_ns, times_ms)
    return LayerCost(
        name=name,
        forward_ns=forward_ns,
        backward_ns=backward_ns,
        recompute_ns=recompute_ns,
        **size._asdict(),
    )


def _provenance(lora_rank: int) -> str:
    lora = (
        f"; LoRA rank {lora_rank} on attention's linear layers (assumed), all else frozen"
        if lora_rank
        else ""
    )
    return (
        "published: arXiv 2604.27085 (forward_ns and backward_ns, one RTX 4090, fp16, microbatch "
        "of 4 x 2048 tokens); computed from the model's public shape, not measured: all bytes "
        f"(16-bit weights and gradients, float32 AdamW state) and trainable_params{lora}; the "
        "head is not recomputed; the embedding's bytes are in block.0, its time is not published"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m roundel.traces.published DIR")
    try:
        write_library(sys.argv[1])
    except InputError as mistake:
        raise SystemExit(str(mistake)) from None
