"""What a layer costs Megatron-LM on an RTX 4090, for `throughput.py`: computed, not measured."""

from fractions import Fraction

from .traces.analytic import layer_cost
from .traces.costs import block_work, embedding_work, head_work
from .traces.errors import InputError
from .traces.gpus import GPUS
from .traces.published import LORA_RANKS, SHAPES
from .traces.published_throughput import SEQUENCE
from .traces.shapes import (
    ELEMENT_BYTES,
    FLOAT_BYTES,
    DecoderShape,
    LayerBytes,
    block_bytes,
    head_bytes,
    with_embedding,
)
from .traces.trace import Trace

LOSS_BYTES_PER_LOGIT = (38, 14)
"""Bytes that an unfused float32 cross-entropy moves, forward and backward, operation by operation.

Forward: logits to float32 (2 read, 4 written), maximum (4), less the maximum (8), exponential
(8), sum (4), quotient (8). Backward: times the incoming gradient (8), to 16 bits (6). As in
`vocab_parallel_cross_entropy` of Megatron-LM, without its fused variant.
"""


def megatron_trace(model: str, sequences: Fraction) -> Trace:
    """The layers of `model` for microbatches of so many sequences of 2048 tokens, in Megatron-LM.

    Matrix products are added up in float32, gradients kept in float32 (4 bytes a parameter), the
    loss computed in float32 with its softmax saved; the head is not recomputed. Raises InputError
    unless `sequences` is whole.
    """
    if sequences.denominator != 1:
        raise InputError(f"megatron: a microbatch must be of whole sequences, got {sequences}")
    name = f"{model}-rtx4090"
    shape, rank, gpu, batch = SHAPES[name], LORA_RANKS[name], GPUS["rtx-4090"], int(sequences)
    tokens = batch * SEQUENCE
    size = _float_gradients(block_bytes(shape, tokens, rank))
    first = _float_gradients(with_embedding(block_bytes(shape, tokens, rank), shape, rank > 0))
    work = block_work(shape, SEQUENCE, batch, rank)
    embedded = work.plus(embedding_work(shape, tokens, trained=not rank))
    head = head_work(shape, tokens, trained=not rank, loss_bytes=LOSS_BYTES_PER_LOGIT)
    blocks = [layer_cost("block.0", embedded, first, gpu)]
    blocks += [layer_cost(f"block.{n}", work, size, gpu) for n in range(1, shape.layers)]
    last = layer_cost("head", head, _head_bytes(shape, tokens, rank), gpu)
    return Trace(
        name=f"{model} (Megatron-LM)",
        device=gpu.name,
        provenance="analytic: as roundel analytic, with float32 gradients and an unfused loss",
        microbatch_tokens=tokens,
        layers=(*blocks, last.model_copy(update={"recompute_ns": 0})),
    )


def _float_gradients(size: LayerBytes) -> LayerBytes:
    return size._replace(grad_bytes=FLOAT_BYTES * size.trainable_params)


def _head_bytes(shape: DecoderShape, tokens: int, rank: int) -> LayerBytes:
    """The head keeps a softmax in float32, and makes gradients of the logits in 16 bits."""
    size = _float_gradients(head_bytes(shape, tokens, rank > 0))
    logits = tokens * shape.vocabulary
    saved = ELEMENT_BYTES * shape.hidden * tokens + FLOAT_BYTES * logits
    return size._replace(saved_bytes=saved, workspace_bytes=ELEMENT_BYTES * logits)
