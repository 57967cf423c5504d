"""Decoders by name: small ones for tests and examples, and the shapes of well-known models."""

from dataclasses import dataclass

from ..traces.shapes import DecoderShape

BYTES = 256
"""The vocabulary of byte-level tokens."""


@dataclass(frozen=True)
class Preset:
    """A decoder's shape and its rotary base."""

    shape: DecoderShape
    rotary_base: float = 10_000.0


def _decoder(
    hidden: int, layers: int, heads: int, kv_heads: int, head_size: int, ffn: int
) -> DecoderShape:
    return DecoderShape(hidden, layers, heads, kv_heads, head_size, ffn, vocabulary=BYTES)


PRESETS = {
    "decoder-tiny": Preset(_decoder(48, 4, 3, 1, 16, 128)),
    "decoder-10m": Preset(_decoder(320, 8, 5, 5, 64, 864)),
    "decoder-100m": Preset(_decoder(768, 16, 12, 4, 64, 2048)),
    "qwen3-1.7b": Preset(
        DecoderShape(2048, 28, 16, 8, 128, 6144, 151936, qk_norm=True),
        rotary_base=1_000_000.0,
    ),
    "llama-3.1-8b": Preset(
        DecoderShape(4096, 32, 32, 8, 128, 14336, 128256), rotary_base=500_000.0
    ),
    "qwen3-32b": Preset(
        DecoderShape(5120, 64, 64, 8, 128, 25600, 151936, qk_norm=True),
        rotary_base=1_000_000.0,
    ),
}
"""Presets by name. The large ones have the shapes of the models' own config.json files, but none is
tied: Qwen3-1.7B shares its embedding with its head, and is 1.7 billion parameters only then."""
