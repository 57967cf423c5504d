"""Shapes of decoder models, and the bytes that one block and the loss head need.

Mixed-precision training with AdamW (arXiv 1910.02054, section 3.1): weights, gradients and
activations have 2 bytes an element, the optimizer holds a float32 master copy and two float32
moments, 12 bytes a parameter. Biases and attention sinks are left out (gpt-oss: 0.1 % of its
parameters). With LoRA of rank r each of attention's four linear layers has an adapter of
r x (in + out) parameters, as in the paper (arXiv 2106.09685, section 4.2); all else is frozen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

ELEMENT_BYTES = 2
OPTIMIZER_BYTES = 12
LOSS_BYTES = 4
FLOAT_BYTES = 4


@dataclass(frozen=True)
class DecoderShape:
    """A llama-like decoder: RMSNorm, grouped-query attention, SwiGLU or a mixture of such experts.

    `ffn` is the inner size of one expert. `qk_norm`: queries and keys are normed per head (Qwen3).
    Embedding and head are two matrices of `vocabulary` x `hidden`, also where they share storage.
    `gated` False: an MLP of two matrices (GPT-2), not of gate, up and down. `norm_bias`: the norms
    have biases too. `bias_params`: a block's other biases and its sinks, left out where 0.
    `positions`: learned positions, each with an embedding; 0 with rotary ones.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int
    experts: int = 1
    active_experts: int = 1
    qk_norm: bool = False
    gated: bool = True
    norm_bias: bool = False
    bias_params: int = 0
    positions: int = 0

    @property
    def query(self) -> int:
        """Elements of all query heads of one token."""
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        """Elements of all key heads of one token; the value heads have as many."""
        return self.kv_heads * self.head_size

    @property
    def has_router(self) -> bool:
        """Whether a router chooses between experts."""
        return self.experts > 1

    @property
    def inner(self) -> int:
        """Elements that the MLP of one expert makes of one token: (gate,) up and their product."""
        return (3 if self.gated else 2) * self.ffn

    @property
    def norm_params(self) -> int:
        """Parameters of one norm over `hidden`."""
        return (2 if self.norm_bias else 1) * self.hidden


class LayerBytes(NamedTuple):
    """The bytes of one layer for one microbatch, named and meant as in `LayerCost`."""

    param_bytes: int
    grad_bytes: int
    optimizer_bytes: int
    output_bytes: int
    saved_bytes: int
    workspace_bytes: int
    trainable_params: int


class Linear(NamedTuple):
    """`copies` alike linear layers of a block, of which a token passes `active`."""

    copies: int
    inputs: int
    outputs: int
    active: int


def block_bytes(shape: DecoderShape, tokens: int, lora_rank: int = 0) -> LayerBytes:
    """Bytes of one block for a microbatch of `tokens`; with `lora_rank` 0 all of it is trained."""
    base, adapters = block_params(shape), lora_params(shape, lora_rank)
    return LayerBytes(
        **_state_bytes(base + adapters, adapters if lora_rank else base),
        output_bytes=ELEMENT_BYTES * shape.hidden * tokens,
        saved_bytes=(block_saved_bytes(shape) + lora_saved_bytes(shape, lora_rank)) * tokens,
        workspace_bytes=block_workspace_bytes(shape) * tokens,
    )


def head_bytes(shape: DecoderShape, tokens: int, frozen: bool = False) -> LayerBytes:
    """Bytes of the head (norm, projection to the vocabulary, loss) for a microbatch.

    Saved: the norm's output and the logits in 16 bits. Workspace: the gradient of the logits.
    An upper bound: a head that works through the tokens in chunks never holds all logits.
    """
    params = head_params(shape)
    return LayerBytes(
        **_state_bytes(params, 0 if frozen else params),
        output_bytes=LOSS_BYTES,
        saved_bytes=ELEMENT_BYTES * (shape.hidden + shape.vocabulary) * tokens,
        workspace_bytes=ELEMENT_BYTES * shape.vocabulary * tokens,
    )


def with_embedding(block: LayerBytes, shape: DecoderShape, frozen: bool = False) -> LayerBytes:
    """The first block with the embedding's parameters, gradients and optimizer state added."""
    added = _state_bytes(embedding_params(shape), 0 if frozen else embedding_params(shape))
    return block._replace(**{name: getattr(block, name) + more for name, more in added.items()})


def block_params(shape: DecoderShape) -> int:
    """Parameters of one block: its linear layers, two norms and, if it has them, q and k norms."""
    linear = sum(layer.copies * layer.inputs * layer.outputs for layer in linears(shape))
    norms = 2 * shape.norm_params + (2 * shape.head_size if shape.qk_norm else 0)
    return linear + shape.bias_params + norms


def head_params(shape: DecoderShape) -> int:
    """Parameters of the last norm and of the projection to the vocabulary."""
    return shape.vocabulary * shape.hidden + shape.norm_params


def embedding_params(shape: DecoderShape) -> int:
    """Parameters of the embedding, learned positions included."""
    return (shape.vocabulary + shape.positions) * shape.hidden


def model_params(shape: DecoderShape) -> int:
    """Parameters of the whole model, embedding and head counted apart, without adapters."""
    blocks = shape.layers * block_params(shape)
    return embedding_params(shape) + blocks + head_params(shape)


def lora_params(shape: DecoderShape, rank: int) -> int:
    """Parameters of one block's adapters: rank x (in + out) for each linear layer of attention."""
    return rank * sum(
        layer.copies * (layer.inputs + layer.outputs) for layer in attention_linears(shape)
    )


def block_saved_bytes(shape: DecoderShape) -> int:
    """Bytes a token that a block keeps for backward beyond its own input and output.

    After arXiv 2205.05198, section 4.1, which counts what each operation of a GPT block saves,
    for fused RMSNorm, rotary embedding and SwiGLU, for flash attention (arXiv 2205.14135: no
    scores, a float32 logsumexp a head instead) and without dropout. In elements: both norms'
    outputs and the residual sum between them (3 hidden); query, key and value, and the inputs of
    the q and k norms; the attention's output (query); gate, up and their product (3 ffn for each
    active expert). A mixture also keeps each active expert's input, output and weighted output
    (3 hidden for each; PyTorch's `index_add` keeps the last) and the router's float32
    probabilities. What PyTorch saves for such blocks agrees, but for the routing's indices.
    """
    attention = 3 * shape.hidden + 2 * shape.query + 2 * shape.key
    normed = shape.query + shape.key if shape.qk_norm else 0
    mlp = shape.active_experts * shape.inner
    experts = 3 * shape.active_experts * shape.hidden if shape.has_router else 0
    floats = shape.heads + (shape.experts if shape.has_router else 0)
    return ELEMENT_BYTES * (attention + normed + mlp + experts) + FLOAT_BYTES * floats


def lora_saved_bytes(shape: DecoderShape, rank: int) -> int:
    """Bytes a token that adapters keep besides: each one's inner activation, `rank` elements.

    Nothing is dropped in return, though a frozen linear layer without an adapter needs no input
    saved: an upper bound.
    """
    return ELEMENT_BYTES * rank * sum(layer.copies for layer in attention_linears(shape))


def block_workspace_bytes(shape: DecoderShape) -> int:
    """Bytes a token of the largest transient of a block's backward.

    The gradient of the residual sum (hidden) lives through all of it. To it come, in the MLP, the
    gradients of gate, up and product (3 ffn for each active expert; in a mixture also that of
    the expert's output, hidden), or in attention those of output, query (also accumulated in
    float32, two elements), key and value. Weight gradients are added up in `grad_bytes`.
    """
    expert_output = shape.hidden if shape.has_router else 0
    mlp = shape.active_experts * (shape.inner + expert_output)
    attention = 4 * shape.query + 2 * shape.key
    return ELEMENT_BYTES * (shape.hidden + max(mlp, attention))


def _state_bytes(params: int, trainable: int) -> dict[str, int]:
    return {
        "param_bytes": ELEMENT_BYTES * params,
        "grad_bytes": ELEMENT_BYTES * trainable,
        "optimizer_bytes": OPTIMIZER_BYTES * trainable,
        "trainable_params": trainable,
    }


def linears(shape: DecoderShape) -> Iterator[Linear]:
    """The linear layers of one block: how many, inputs, outputs, and how many a token passes."""
    yield from attention_linears(shape)
    into = 2 if shape.gated else 1
    yield Linear(into * shape.experts, shape.hidden, shape.ffn, into * shape.active_experts)
    yield Linear(shape.experts, shape.ffn, shape.hidden, shape.active_experts)
    if shape.has_router:
        yield Linear(1, shape.hidden, shape.experts, 1)


def attention_linears(shape: DecoderShape) -> Iterator[Linear]:
    """Attention's linear layers: query, key and value, output."""
    yield Linear(1, shape.hidden, shape.query, 1)
    yield Linear(2, shape.hidden, shape.key, 2)
    yield Linear(1, shape.query, shape.hidden, 1)
