"""A decoder like Llama's in plain PyTorch, as a list of layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..traces.shapes import DecoderShape

ROPE_BASE = 10_000.0
INIT_STD = 0.02


class Embedding(nn.Module):
    """Token ids (batch, sequence) to (batch, sequence, hidden)."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.table = nn.Embedding(shape.vocabulary, shape.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and added to its input."""

    def __init__(self, shape: DecoderShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm = nn.RMSNorm(shape.hidden)
        self.query = nn.Linear(shape.hidden, shape.query, bias=False)
        self.key = nn.Linear(shape.hidden, shape.key, bias=False)
        self.value = nn.Linear(shape.hidden, shape.key, bias=False)
        self.output = nn.Linear(shape.query, shape.hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.hidden)
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)
        if shape.qk_norm:
            self.query_norm = nn.RMSNorm(shape.head_size)
            self.key_norm = nn.RMSNorm(shape.head_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, value: Tensor) -> Tensor:
        value = value + self.dropout(self._attend(self.attention_norm(value)))
        normed = self.ffn_norm(value)
        inner = functional.silu(self.gate(normed)) * self.up(normed)
        return value + self.dropout(self.down(inner))  # type: ignore[no-any-return]

    def _attend(self, value: Tensor) -> Tensor:
        query, key = self._heads(self.query(value)), self._heads(self.key(value))
        if self.shape.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotated(query), rotated(key)
        mixed = functional.scaled_dot_product_attention(
            query, key, self._heads(self.value(value)), is_causal=True, enable_gqa=True
        )
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, value: Tensor) -> Tensor:
        """(batch, sequence, heads x size) to (batch, heads, sequence, size)."""
        return value.unflatten(-1, (-1, self.shape.head_size)).transpose(1, 2)


class Head(nn.Module):
    """The last norm and the projection to logits (batch, sequence, vocabulary)."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden)
        self.project = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        return self.project(self.norm(value))  # type: ignore[no-any-return]


def rotated(value: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of (batch, heads, sequence, size)."""
    half = value.shape[-1] // 2
    steps = torch.arange(half, device=value.device, dtype=torch.float32) / half
    places = torch.arange(value.shape[-2], device=value.device, dtype=torch.float32)
    angles = torch.outer(places, ROPE_BASE**-steps)
    cos, sin = angles.cos().to(value.dtype), angles.sin().to(value.dtype)
    first, second = value[..., :half], value[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def decoder_layers(
    shape: DecoderShape, tied: bool = False, dropout: float = 0.0
) -> list[nn.Module]:
    """Embedding, blocks and head. `tied`: the head's projection is the embedding's table."""
    blocks = [Block(shape, dropout) for _ in range(shape.layers)]
    layers = [Embedding(shape), *blocks, Head(shape)]
    for layer in layers:
        for part in layer.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=INIT_STD)
    if tied:
        layers[-1].project.weight = layers[0].table.weight  # type: ignore[union-attr, assignment]
    return layers


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (batch, sequence, vocabulary) for targets (batch, sequence)."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
