"""Traces for `what_fits.py`: decoders of known shapes, with the memory of how they are made here.

`roundel.traces.shapes` counts for fused kernels, and all logits at once.
"""

from typing import Any

import roundel
from roundel.traces.analytic import analytic_trace
from roundel.traces.gpus import find_gpu
from roundel.traces.model_config import read_config
from roundel.traces.shapes import ELEMENT_BYTES, FLOAT_BYTES, DecoderShape

HEAD_PART = 2**28
"""Logits that exist at a time where the head works in parts, as in `executor/head_loss.py`."""


def _config(kind: str, *sizes: int, tied: bool = False) -> dict[str, Any]:
    """The fields of a Hugging Face config.json that count."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "vocab_size")
    sized = dict(zip(names, sizes, strict=True))
    return {"model_type": kind, **sized, "head_dim": 128, "tie_word_embeddings": tied}


MODELS = {
    "qwen3-1.7b": _config("qwen3", 2048, 28, 16, 8, 6144, 151936, tied=True),
    "llama-3.1-8b": _config("llama", 4096, 32, 32, 8, 14336, 128256),
    "qwen3-14b": _config("qwen3", 5120, 40, 40, 8, 17408, 151936),
    "qwen3-32b": _config("qwen3", 5120, 64, 64, 8, 25600, 151936),
    "llama-3.3-70b": _config("llama", 8192, 80, 64, 8, 28672, 128256),
}


def trace_of(
    model: str, context: int, rank: int, head_in_loss: bool, hugging_face: bool
) -> roundel.Trace:
    """The computed trace of one sequence on an RTX 4090, with the bytes of such a head and blocks.

    rank: of LoRA's adapters, 0 where all is trained. See `Case` in `what_fits.py` for the others.
    """
    config = MODELS[model]
    gpu, shape = find_gpu("rtx-4090"), read_config(config).shape
    trace = analytic_trace(config, gpu, sequence=context, batch=1, lora_rank=rank)
    *blocks, head = trace.layers
    if hugging_face:
        more = module_bytes(shape) * context
        saved = [{"saved_bytes": each.saved_bytes + more} for each in blocks]
        blocks = [each.model_copy(update=new) for each, new in zip(blocks, saved, strict=True)]
    if head_in_loss:
        head = head.model_copy(update=head_in_parts(shape, context, trained=not rank))
    return trace.model_copy(update={"layers": (*blocks, head)})


def with_low_bit_states(trace: roundel.Trace, model: str) -> roundel.Trace:
    """The trace with the states of `roundel.executor.low_bit.AdamW4bit` in the place of float32's.

    Two moments of half a byte and a scale every 128, of embedding and head of a byte and one every
    256. An update needs 24 bytes a parameter of room, for a slice of at most 2^27.
    """
    shape = read_config(MODELS[model]).shape
    table = shape.vocabulary * shape.hidden
    layers = []
    for number, each in enumerate(trace.layers):
        ends = table if number in (0, len(trace.layers) - 1) and each.tied_to is None else 0
        others = each.params_to_update - ends
        few = {
            "optimizer_bytes": round((1 + 8 / 128) * others + (2 + 8 / 256) * ends),
            "update_workspace_bytes": 24 * min(2**27, max(ends, shape.hidden * shape.ffn)),
        }
        layers.append(each.model_copy(update=few))
    return trace.model_copy(update={"layers": tuple(layers)})


def module_bytes(shape: DecoderShape) -> int:
    """Bytes a token that a block of Hugging Face's modules keeps beyond `block_saved_bytes`.

    That has fused norms and SwiGLU. Its activation is kept here, and of the norms the inputs in
    float32; of those over `hidden` also one more result in 16 bits. Then the rotary embedding's
    cosines and sines.
    """
    normed = 2 * shape.hidden + (shape.query + shape.key if shape.qk_norm else 0)
    narrow = shape.ffn + shape.hidden + 2 * shape.head_size
    return ELEMENT_BYTES * narrow + FLOAT_BYTES * normed


def head_in_parts(shape: DecoderShape, tokens: int, trained: bool) -> dict[str, int]:
    """Bytes of a head that makes its logits and their gradients a part at a time, in forward.

    Saved: the norm's output and its gradient, and the weight's gradient. Workspace: one part of
    the logits in float32 and in 16 bits, the weight's gradient in float32 and a part's.
    """
    part = min(HEAD_PART, tokens * shape.vocabulary)
    weight = shape.vocabulary * shape.hidden if trained else 0
    return {
        "saved_bytes": ELEMENT_BYTES * (2 * shape.hidden * tokens + weight),
        "workspace_bytes": (FLOAT_BYTES + ELEMENT_BYTES) * (weight + part),
    }
