"""AdamW with moments of four bits, as torchao has it, but of eight for embedding and head.

With four bits for these two, training falls behind at small learning rates
(docs/results/2026-11-24-low-bit-states.md). Needs torchao.
"""

from typing import Any

from torch import Tensor
from torchao.optim import AdamW4bit as _AdamW4bit  # type: ignore[import-untyped, unused-ignore]
from torchao.optim import AdamW8bit as _AdamW8bit

EIGHT_BIT_BLOCK = 256
"""Elements with one scale, as `AdamW8bit` has it."""


class AdamW4bit(_AdamW4bit):  # type: ignore[misc]
    """torchao's AdamW4bit; weights with `table_rows` rows, one a token, have eight-bit moments."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        table_rows: int,
        bf16_stochastic_round: bool = True,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, bf16_stochastic_round=bf16_stochastic_round
        )
        self.table_rows = table_rows

    def _subclass_zeros(self, weight: Tensor, signed: bool, block_size: int) -> Tensor:
        # A slice of a table says how many rows the whole one has.
        rows = getattr(weight, "all_rows", weight.shape[0])
        if rows == self.table_rows and weight.numel() % EIGHT_BIT_BLOCK == 0:
            return _AdamW8bit._subclass_zeros(weight, signed, EIGHT_BIT_BLOCK)  # type: ignore[no-any-return]
        return _AdamW4bit._subclass_zeros(weight, signed, block_size)  # type: ignore[no-any-return]
