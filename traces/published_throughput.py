"""Tokens a second that the authors of RoundPipe measured in real training (arXiv 2604.27085).

One server of RTX 4090s with 24 GB each, two sockets, PCIe 4.0; sequences of 2048 tokens. A step of
`sequences` is cut into `rounds` accumulation rounds of `microbatches` each. Figures of the
systems that Roundel has no schedule for (DeepSpeed, FSDP) are left out.
"""

from fractions import Fraction
from typing import Literal, NamedTuple

from .errors import InputError
from .published import PUBLISHED_NAMES

SEQUENCE = 2048
System = Literal["roundpipe-async", "roundpipe-sync", "megatron-1f1b"]
SYSTEMS: tuple[System, ...] = ("roundpipe-async", "roundpipe-sync", "megatron-1f1b")
MODELS = tuple(name.removesuffix("-rtx4090") for name in PUBLISHED_NAMES)
DEFAULT_SEQUENCES = 64


class Split(NamedTuple):
    """How a step's sequences are cut: into `rounds` of `microbatches` each."""

    sequences: int
    microbatches: int
    rounds: int

    @property
    def per_microbatch(self) -> Fraction:
        """Sequences of a microbatch, on average: they need not divide."""
        return Fraction(self.sequences, self.microbatches * self.rounds)


class PublishedThroughput(NamedTuple):
    """One measured figure."""

    model: str
    devices: int
    system: System
    tokens_per_s: float
    split: Split


PUBLISHED = (
    PublishedThroughput("qwen3-1.7b", 8, "roundpipe-async", 65416.83, Split(512, 10, 4)),
    PublishedThroughput("qwen3-1.7b", 8, "roundpipe-sync", 56489.04, Split(512, 10, 7)),
    PublishedThroughput("qwen3-1.7b", 1, "roundpipe-async", 8880.99, Split(512, 10, 4)),
    PublishedThroughput("llama-3.1-8b", 8, "roundpipe-async", 24274.54, Split(256, 10, 2)),
    PublishedThroughput("llama-3.1-8b", 8, "roundpipe-sync", 18888.43, Split(256, 10, 5)),
    PublishedThroughput("gpt-oss-20b", 8, "roundpipe-async", 18121.59, Split(128, 16, 1)),
    PublishedThroughput("qwen3-1.7b", 8, "megatron-1f1b", 39081.21, Split(512, 128, 1)),
    PublishedThroughput("llama-3.1-8b", 8, "megatron-1f1b", 16412.18, Split(256, 128, 1)),
)
"""The measured figures, in the order in which they are shown."""


def published_row(model: str, system: System, devices: int) -> PublishedThroughput | None:
    """The measured figure, if there is one. Raises InputError for an unknown model."""
    check_model(model)
    wanted = (model, system, devices)
    return next((r for r in PUBLISHED if (r.model, r.system, r.devices) == wanted), None)


def split_of(model: str, system: System) -> Split:
    """How a step is cut: as published for this model and system, on whatever number of GPUs.

    Where that is not published: as for the same model's other optimizer mode, else 64 sequences in
    one round of 16 microbatches, of 4 as the layer times were measured; for megatron-1f1b one
    sequence a microbatch.
    Raises InputError for an unknown model.
    """
    check_model(model)
    of_model = [row for row in PUBLISHED if row.model == model]
    same = [row.split for row in of_model if row.system == system]
    if same:
        return same[0]
    sequences = of_model[0].split.sequences if of_model else DEFAULT_SEQUENCES
    if system == "megatron-1f1b":
        return Split(sequences, sequences, 1)
    streamed = [row.split for row in of_model if row.system != "megatron-1f1b"]
    return streamed[0] if streamed else Split(DEFAULT_SEQUENCES, 16, 1)


def check_model(model: str) -> None:
    """Raises InputError for a model without published layer times."""
    if model not in MODELS:
        raise InputError(f"no published layer times of {model!r}; there are {', '.join(MODELS)}")
