"""A decoder like Llama's in plain PyTorch, as a list of layers."""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..traces.errors import InputError
from ..traces.shapes import DecoderShape
from .head_loss import Projected

ROTARY_BASE = 10_000.0
NORM_EPS = 1e-5
INIT_STD = 0.02


class Embedding(nn.Module):
    """Token ids (batch, sequence) to (batch, sequence, hidden)."""

    def __init__(self, shape: DecoderShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(shape.vocabulary, shape.hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.table(tokens))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and added to its input.

    ffn_chunk: so many tokens of a sequence go through SwiGLU at a time, once more in backward;
        what is inside is as large as a chunk then. None: all of them, once.
    """

    def __init__(
        self,
        shape: DecoderShape,
        dropout: float = 0.0,
        base: float = ROTARY_BASE,
        ffn_chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.ffn_chunk = ffn_chunk
        self.shape, self.base = shape, base
        self.attention_norm = nn.RMSNorm(shape.hidden, NORM_EPS)
        self.query = nn.Linear(shape.hidden, shape.query, bias=False)
        self.key = nn.Linear(shape.hidden, shape.key, bias=False)
        self.value = nn.Linear(shape.hidden, shape.key, bias=False)
        self.output = nn.Linear(shape.query, shape.hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.hidden, NORM_EPS)
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)
        if shape.qk_norm:
            self.query_norm = nn.RMSNorm(shape.head_size, NORM_EPS)
            self.key_norm = nn.RMSNorm(shape.head_size, NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, value: Tensor) -> Tensor:
        value = value + self.dropout(self._attend(self.attention_norm(value)))
        if self.ffn_chunk is None or value.shape[1] <= self.ffn_chunk:
            return value + self.dropout(self._feed(value))  # type: ignore[no-any-return]
        parts = [
            checkpoint(self._feed, part, use_reentrant=False, preserve_rng_state=False)
            for part in torch.split(value, self.ffn_chunk, dim=1)
        ]
        return value + self.dropout(torch.cat(parts, dim=1))  # type: ignore[no-any-return]

    def _feed(self, value: Tensor) -> Tensor:
        normed = self.ffn_norm(value)
        inner = functional.silu(self.gate(normed)) * self.up(normed)
        return self.down(inner)  # type: ignore[no-any-return]

    def _attend(self, value: Tensor) -> Tensor:
        query, key = self._heads(self.query(value)), self._heads(self.key(value))
        if self.shape.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        angles = rotary_angles(query, self.base)
        mixed = functional.scaled_dot_product_attention(
            rotated(query, *angles),
            rotated(key, *angles),
            self._heads(self.value(value)),
            is_causal=True,
            enable_gqa=self.shape.heads != self.shape.kv_heads,
        )
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, value: Tensor) -> Tensor:
        """(batch, sequence, heads x size) to (batch, heads, sequence, size)."""
        return value.view(*value.shape[:2], -1, self.shape.head_size).transpose(1, 2)


class Head(nn.Module):
    """The last norm and the projection to logits (batch, sequence, vocabulary).

    in_loss: leave the projection to the loss, which makes logits in parts.
    """

    def __init__(self, shape: DecoderShape, in_loss: bool = False) -> None:
        super().__init__()
        self.in_loss = in_loss
        self.norm = nn.RMSNorm(shape.hidden, NORM_EPS)
        self.project = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, value: Tensor) -> Tensor | Projected:
        normed = self.norm(value)
        if self.in_loss:
            return Projected(normed, self.project.weight)
        return self.project(normed)  # type: ignore[no-any-return]


def rotary_angles(value: Tensor, base: float = ROTARY_BASE) -> tuple[Tensor, Tensor]:
    """What to turn (batch, heads, sequence, size) by: two tensors of (sequence, size).

    Rotary position embedding, arXiv 2104.09864: the cosines, and the sines of which the first half
    is negative. Made once for a length, dtype and device.
    """
    made = _angles(value.shape[-2], value.shape[-1], base, value.dtype, value.device)
    if value.device.type == "cuda":
        for each in made:
            each.record_stream(torch.cuda.current_stream(value.device))
    return made


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _angles(
    length: int, size: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    steps = torch.arange(size // 2, device=device, dtype=torch.float32) / (size // 2)
    places = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(places, base**-steps)
    cos, sin = angles.cos(), angles.sin()
    made = torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
    if device.type == "cuda":
        # Other streams will read them too.
        torch.cuda.current_stream(device).synchronize()
    return made


def rotated(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(batch, heads, sequence, size) turned by its places in the sequence.

    Element i of the first half turns with element i of the second, as in Llama's checkpoints.
    """
    swapped = value.roll(value.shape[-1] // 2, dims=-1)
    return torch.addcmul(value * cos, swapped, sin)


def decoder_layers(
    shape: DecoderShape,
    tied: bool = False,
    dropout: float = 0.0,
    *,
    rotary_base: float = ROTARY_BASE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    init: bool = True,
    head_in_loss: bool = False,
    ffn_chunk: int | None = None,
    draw_on: torch.device | str | None = None,
) -> list[nn.Module]:
    """Embedding, blocks and head: `shape.layers` + 2 modules.

    tied: the head's projection is the embedding's table.
    dropout: on the embedding's, attention's and SwiGLU's outputs.
    device: "meta" makes them without memory.
    ffn_chunk: as `Block` has it, for long sequences.
    draw_on: a GPU draws a large model's weights much sooner; other numbers than the CPU's.
    head_in_loss: the loss makes the logits, in parts; it must be `token_loss`.
    init: False leaves the weights as they are found in memory, to be filled from a file.

    Weights are drawn from torch's global generator: normal with 0.02, and those that write into
    the residual stream by sqrt(2 layers) smaller (GPT-2's rule). Raises InputError for a shape
    that is no such decoder's.
    """
    _check(shape)
    with torch.device("meta"):
        blocks = [Block(shape, dropout, rotary_base, ffn_chunk) for _ in range(shape.layers)]
        embedding, head = Embedding(shape, dropout), Head(shape, head_in_loss)
    layers = [embedding, *blocks, head]
    real = torch.device(device).type != "meta"
    for layer in layers:
        layer.to(dtype)
        if real:
            layer.to_empty(device=draw_on or device)
            _fill(layer, shape) if init else None
            layer.to(device)
    if tied:
        head.project.weight = embedding.table.weight
    return layers


@torch.no_grad()
def _fill(layer: nn.Module, shape: DecoderShape) -> None:
    for name, part in layer.named_modules():
        if isinstance(part, nn.RMSNorm):
            nn.init.ones_(part.weight)
        elif isinstance(part, nn.Linear | nn.Embedding):
            into_residual = name in ("output", "down")
            std = INIT_STD / (2 * shape.layers) ** 0.5 if into_residual else INIT_STD
            nn.init.normal_(part.weight, std=std)


def _check(shape: DecoderShape) -> None:
    if shape.has_router:
        raise InputError("decoder: mixtures of experts are not supported; use experts=1")
    if shape.kv_heads < 1 or shape.heads % shape.kv_heads:
        raise InputError(
            f"decoder: {shape.heads} heads cannot share {shape.kv_heads} key heads evenly"
        )
    if shape.head_size % 2:
        raise InputError(f"decoder: head_size must be even, got {shape.head_size}")
