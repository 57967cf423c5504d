"""What one layer computes and moves: FLOPs and bytes, part by part. No GPU in here.

FLOPs: a product of m x k by k x n has 2 m n k; attention's two products, queries by keys and
scores by values, are counted for the keys that a token can see (causal, windows). Backward has
two products for each: one for the input's gradient, one for the weight's (arXiv 2205.05198,
appendix A). Flash attention's backward computes the scores again: 2.5 forwards (arXiv 2307.08691,
section 4.1), none of it for weights. Norms, rotary embedding, activation and sums count as bytes
moved, each operation fused as far as its own kernel goes: it reads its inputs and writes its
outputs once. Loading a matrix, its input and output is counted for products as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .shapes import ELEMENT_BYTES, DecoderShape, Linear, attention_linears, linears

FLASH_BACKWARD = 2.5
LOSS_FORWARD_BYTES, LOSS_BACKWARD_BYTES = 2, 4


class Part(NamedTuple):
    """One part of a layer's work: what limits it, FLOPs and bytes moved."""

    kind: Literal["matmul", "attention", "attention_backward", "memory"]
    flops: float
    nbytes: float


@dataclass(frozen=True)
class LayerWork:
    """The parts of a layer's forward, and of its backward for inputs and for weights."""

    forward: tuple[Part, ...]
    backward_input: tuple[Part, ...]
    backward_weight: tuple[Part, ...]

    @property
    def forward_flops(self) -> float:
        """FLOPs of forward."""
        return sum(part.flops for part in self.forward)

    @property
    def backward_flops(self) -> float:
        """FLOPs of the whole backward."""
        return sum(part.flops for part in (*self.backward_input, *self.backward_weight))

    def plus(self, other: "LayerWork") -> "LayerWork":
        """Both works, one after the other."""
        return LayerWork(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
        )


def keys_seen(sequence: int, window: int | None = None) -> float:
    """Keys that a token of a causal sequence sees on average: itself and those before it."""
    width = min(window or sequence, sequence)
    return width - width * (width - 1) / (2 * sequence)


def block_work(
    shape: DecoderShape, sequence: int, batch: int, rank: int = 0, window: int | None = None
) -> LayerWork:
    """One block's work for `batch` sequences; with a LoRA `rank` only adapters have weight parts.

    Adapters are on attention's linear layers, as in `shapes.py`.
    """
    tokens = sequence * batch
    work = _vectors(shape, tokens).plus(_attention(shape, tokens, keys_seen(sequence, window)))
    for layer in linears(shape):
        work = work.plus(_linear(layer, tokens, trained=not rank))
    for layer in attention_linears(shape) if rank else ():
        for inputs, outputs in ((layer.inputs, rank), (rank, layer.outputs)):
            work = work.plus(_linear(Linear(layer.copies, inputs, outputs, layer.active), tokens))
    return work


def head_work(
    shape: DecoderShape,
    tokens: int,
    trained: bool = True,
    loss_bytes: tuple[int, int] = (LOSS_FORWARD_BYTES, LOSS_BACKWARD_BYTES),
) -> LayerWork:
    """The head's work: norm, product with the vocabulary, loss.

    `loss_bytes` are what the loss moves for each logit in forward and backward, beyond what the
    product reads and writes; as given a fused loss, which reads the logits, and reads them again
    and writes their gradient.
    """
    forward, backward = loss_bytes
    logits = tokens * shape.vocabulary
    norm = _moved(tokens * 2 * shape.hidden, tokens * 3 * shape.hidden)
    loss = LayerWork(
        (Part("memory", 0, forward * logits),), (Part("memory", 0, backward * logits),), ()
    )
    product = _linear(Linear(1, shape.hidden, shape.vocabulary, 1), tokens, trained)
    return norm.plus(product).plus(loss)


def embedding_work(shape: DecoderShape, tokens: int, trained: bool = True) -> LayerWork:
    """Rows read and written forward; backward the gradient read, its rows read and written."""
    return _moved(2 * tokens * shape.hidden, 3 * tokens * shape.hidden if trained else 0)


def _linear(layer: Linear, tokens: int, trained: bool = True) -> LayerWork:
    """A token passes `active` of the copies; all copies that some token passes are loaded."""
    passed = tokens * layer.active
    flops = 2 * passed * layer.inputs * layer.outputs
    weights = min(layer.copies, passed) * layer.inputs * layer.outputs
    nbytes = ELEMENT_BYTES * (weights + passed * (layer.inputs + layer.outputs))
    part = (Part("matmul", flops, nbytes),)
    return LayerWork(part, part, part if trained else ())


def _attention(shape: DecoderShape, tokens: int, keys: float) -> LayerWork:
    flops = 2 * 2 * tokens * shape.query * keys
    nbytes = ELEMENT_BYTES * tokens * 2 * (shape.query + shape.key)
    backward = Part("attention_backward", FLASH_BACKWARD * flops, 2 * nbytes)
    return LayerWork((Part("attention", flops, nbytes),), (backward,), ())


def _vectors(shape: DecoderShape, tokens: int) -> LayerWork:
    """Norms, sums, rotary embedding, activation; a mixture's sorting into experts and back."""
    parts = list(_vector_elements(shape))
    forward, backward = (sum(each) for each in zip(*parts, strict=True))
    return _moved(tokens * forward, tokens * backward)


def _vector_elements(shape: DecoderShape) -> Iterator[tuple[int, int]]:
    """Elements a token that each operation reads and writes, (forward, backward)."""
    hidden, rotated = shape.hidden, shape.query + shape.key
    yield 2 * 2 * hidden, 2 * 3 * hidden  # norms
    yield 2 * 3 * hidden, 2 * 3 * hidden  # residual sums; backward the sums of gradients
    if shape.qk_norm:
        yield 2 * rotated, 3 * rotated
    if not shape.positions:
        yield 2 * rotated, 2 * rotated  # rotary embedding
    active = shape.active_experts
    # Backward reads what forward read, and the gradient, and writes a gradient for each input.
    yield active * shape.inner, active * (2 * shape.inner - shape.ffn)
    if shape.has_router:
        yield active * 4 * hidden, active * 4 * hidden


def _moved(forward: float, backward: float) -> LayerWork:
    """Elements that are only moved."""
    return LayerWork(
        (Part("memory", 0, ELEMENT_BYTES * forward),),
        (Part("memory", 0, ELEMENT_BYTES * backward),),
        (),
    )
