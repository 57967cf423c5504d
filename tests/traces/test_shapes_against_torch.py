"""Saved bytes against what PyTorch's autograd really keeps for such a block.

Norm, rotary embedding, flash attention and SwiGLU are stand-ins that save what fused kernels
save; the rest, routing included, is plain PyTorch.
"""

from typing import Any

import pytest

from roundel.traces.shapes import DecoderShape, block_saved_bytes

torch = pytest.importorskip("torch")
functional = torch.nn.functional

TOKENS = 64
DENSE = DecoderShape(
    hidden=64, layers=1, heads=8, kv_heads=2, head_size=16, ffn=176, vocabulary=100
)
NORMED = DecoderShape(
    hidden=64, layers=1, heads=8, kv_heads=2, head_size=16, ffn=176, vocabulary=100, qk_norm=True
)
MIXTURE = DecoderShape(
    hidden=64,
    layers=1,
    heads=8,
    kv_heads=2,
    head_size=16,
    ffn=24,
    vocabulary=100,
    experts=8,
    active_experts=2,
    qk_norm=True,
)


def fused(run: Any, saves_output: bool = False, saves_input: bool = True) -> Any:
    """A differentiable function that saves its inputs, and attention's output and logsumexp."""

    class Fused(torch.autograd.Function):  # type: ignore[name-defined, misc]
        @staticmethod
        def forward(context: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            statistics = torch.zeros(inputs[0].shape[:-1], dtype=torch.float32)
            context.save_for_backward(
                *(inputs if saves_input else ()), *((output, statistics) if saves_output else ())
            )
            return output

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            raise NotImplementedError

    return Fused.apply


def attend(query: Any, key: Any, value: Any) -> Any:
    return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


norm = fused(lambda value, weight: value * weight)
rotary = fused(lambda value: value * 2, saves_input=False)
attention = fused(attend, saves_output=True)
swiglu = fused(lambda gate, up: functional.silu(gate) * up)


class Block:
    """One block with random bfloat16 weights."""

    def __init__(self, shape: DecoderShape) -> None:
        self.shape = shape
        self.weights: list[Any] = []

    def weight(self, *size: int) -> Any:
        self.weights.append(torch.randn(*size).bfloat16().requires_grad_())
        return self.weights[-1]

    def linear(self, value: Any, outputs: int) -> Any:
        return value @ self.weight(value.shape[-1], outputs)

    def heads(self, value: Any, count: int, turned: bool) -> Any:
        size = self.shape.head_size
        heads = self.linear(value, count * size).view(TOKENS, count, size)
        if turned:
            heads = norm(heads, self.weight(size)) if self.shape.qk_norm else heads
            heads = rotary(heads)
        return heads.transpose(0, 1)[None]

    def mlp(self, value: Any) -> Any:
        ffn = self.shape.ffn
        gated = swiglu(self.linear(value, ffn), self.linear(value, ffn))
        return self.linear(gated, self.shape.hidden)

    def mixture(self, value: Any) -> Any:
        scores = torch.softmax(self.linear(value, self.shape.experts).float(), -1)
        top, chosen = torch.topk(scores, self.shape.active_experts)
        result = torch.zeros_like(value)
        for expert in range(self.shape.experts):
            token, rank = (chosen == expert).nonzero(as_tuple=True)
            weighted = self.mlp(value[token]) * top[token, rank, None].bfloat16()
            result = result.index_add(0, token, weighted)
        return result

    def __call__(self, value: Any) -> Any:
        shape = self.shape
        normed = norm(value, self.weight(shape.hidden))
        query = self.heads(normed, shape.heads, turned=True)
        key = self.heads(normed, shape.kv_heads, turned=True)
        mixed = attention(query, key, self.heads(normed, shape.kv_heads, turned=False))
        residual = value + self.linear(
            mixed[0].transpose(0, 1).reshape(TOKENS, shape.query), shape.hidden
        )
        normed = norm(residual, self.weight(shape.hidden))
        return residual + (self.mixture(normed) if shape.has_router else self.mlp(normed))


def kept_bytes(shape: DecoderShape) -> int:
    """Bytes of all storages that autograd keeps, without weights, input and output."""
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    block = Block(shape)
    value = torch.randn(TOKENS, shape.hidden).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(value)
    for other in (value, output, *block.weights):
        kept.pop(other.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("shape", [DENSE, NORMED], ids=["dense", "q and k norms"])
def test_dense_block(shape: DecoderShape) -> None:
    assert kept_bytes(shape) == block_saved_bytes(shape) * TOKENS


def test_mixture() -> None:
    """Besides, routing keeps int64 indices and the chosen weights: at most 32 bytes each."""
    torch.manual_seed(0)
    indices = kept_bytes(MIXTURE) - block_saved_bytes(MIXTURE) * TOKENS
    assert 0 <= indices <= 32 * MIXTURE.active_experts * TOKENS
