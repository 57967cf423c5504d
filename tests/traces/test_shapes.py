"""Bytes of blocks and heads, against numbers worked out by hand and published model sizes."""

import pytest

from roundel.traces.published import SHAPES
from roundel.traces.shapes import (
    DecoderShape,
    block_bytes,
    block_params,
    head_bytes,
    lora_params,
    model_params,
    with_embedding,
)

TOKENS = 10

DENSE = DecoderShape(hidden=8, layers=2, heads=4, kv_heads=2, head_size=3, ffn=20, vocabulary=50)
MIXTURE = DecoderShape(
    hidden=8,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=3,
    ffn=5,
    vocabulary=50,
    experts=6,
    active_experts=2,
    qk_norm=True,
)


def test_dense_block_by_hand() -> None:
    block = block_bytes(DENSE, TOKENS)
    # q 8x12, k and v 8x6, o 12x8, gate, up and down 8x20, two norms of 8
    params = 96 + 48 + 48 + 96 + 160 + 160 + 160 + 16
    assert block_params(DENSE) == params == 784
    assert block.param_bytes == block.grad_bytes == 2 * params
    assert block.optimizer_bytes == 12 * params
    assert block.trainable_params == params
    assert block.output_bytes == 2 * 8 * TOKENS
    # norm1, q, k, v, attention, residual, norm2, gate, up, product; logsumexp of 4 heads
    elements = 8 + 12 + 6 + 6 + 12 + 8 + 8 + 20 + 20 + 20
    assert block.saved_bytes == (2 * elements + 4 * 4) * TOKENS
    # residual, and gradients of gate, up and product
    assert block.workspace_bytes == 2 * (8 + 20 + 20 + 20) * TOKENS


def test_mixture_block_by_hand() -> None:
    block = block_bytes(MIXTURE, TOKENS)
    # attention as above, 6 experts of 3 matrices 8x5, router 8x6, two norms of 8, q and k of 3
    params = 288 + 6 * 120 + 48 + 16 + 6
    assert block_params(MIXTURE) == params
    assert block.param_bytes == 2 * params
    # attention as above and the inputs of the q and k norms; 2 experts: input, gate, up, product,
    # output, weighted output; float32: 4 heads' logsumexp, 6 probabilities
    elements = 60 + 12 + 6 + 2 * (8 + 5 + 5 + 5 + 8 + 8)
    assert block.saved_bytes == (2 * elements + 4 * (4 + 6)) * TOKENS
    # here attention is the larger: residual, output, q, float32 q, k and v
    assert block.workspace_bytes == 2 * (8 + 12 + 12 + 24 + 6 + 6) * TOKENS


def test_lora_trains_adapters_only() -> None:
    block = block_bytes(MIXTURE, TOKENS, lora_rank=3)
    # q, k, v, o
    adapters = 3 * (20 + 14 + 14 + 20)
    assert lora_params(MIXTURE, 3) == adapters
    assert block.trainable_params == adapters
    assert block.param_bytes == 2 * (block_params(MIXTURE) + adapters)
    assert (block.grad_bytes, block.optimizer_bytes) == (2 * adapters, 12 * adapters)
    # one inner activation for each adapter
    more = 2 * 3 * 4 * TOKENS
    assert block.saved_bytes == block_bytes(MIXTURE, TOKENS).saved_bytes + more


def test_head_by_hand() -> None:
    head = head_bytes(DENSE, TOKENS)
    assert head.trainable_params == 50 * 8 + 8
    assert head.param_bytes == head.grad_bytes == 2 * 408
    assert head.optimizer_bytes == 12 * 408
    assert head.output_bytes == 4
    assert head.saved_bytes == 2 * (8 + 50) * TOKENS
    assert head.workspace_bytes == 2 * 50 * TOKENS


def test_a_frozen_head_trains_nothing() -> None:
    head = head_bytes(DENSE, TOKENS, frozen=True)
    assert head.param_bytes == 2 * 408
    assert (head.grad_bytes, head.optimizer_bytes, head.trainable_params) == (0, 0, 0)


def test_the_embedding_rides_on_a_block() -> None:
    block = block_bytes(DENSE, TOKENS)
    first = with_embedding(block, DENSE)
    assert first.param_bytes - block.param_bytes == 2 * 400
    assert first.grad_bytes - block.grad_bytes == 2 * 400
    assert first.optimizer_bytes - block.optimizer_bytes == 12 * 400
    assert first.trainable_params - block.trainable_params == 400
    assert first[3:6] == block[3:6]
    assert with_embedding(block, DENSE, frozen=True)[1:] == block[1:]


# Parameters of the published checkpoints; gpt-oss has 6.8 million in biases and sinks besides.
SIZES = {
    "qwen3-1.7b-rtx4090": (2_031_739_904, 0),
    "llama-3.1-8b-rtx4090": (8_030_261_248, 0),
    "gpt-oss-20b-rtx4090": (20_914_757_184, 7_000_000),
    "qwen3-32b-rtx4090": (32_762_123_264, 0),
    "qwen3-235b-lora-rtx4090": (235_093_634_560, 0),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_model_sizes(name: str) -> None:
    size, left_out = SIZES[name]
    assert size - left_out <= model_params(SHAPES[name]) <= size


def test_llama_block_by_hand() -> None:
    """8192 tokens: in elements 4096 x 3, q and attention 4096 x 2, k and v 1024 x 2, 14336 x 3."""
    block = block_bytes(SHAPES["llama-3.1-8b-rtx4090"], 8192)
    assert block.param_bytes == 2 * 218_112_000
    assert block.saved_bytes == 8192 * (2 * 65_536 + 4 * 32) == 1_074_790_400
    assert block.workspace_bytes == 8192 * 2 * (4096 + 3 * 14336) == 771_751_936
    assert block.output_bytes == 67_108_864
