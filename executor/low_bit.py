"""AdamW with moments of few bits, as torchao has it, whose bf16 weights are rounded at random.

Rounded to the nearest, small updates are lost. With four bits for embedding and head, too,
training falls behind at small learning rates, so theirs have eight
(docs/results/2026-11-24-low-bit-states.md). Needs torchao.
"""

from functools import partialmethod
from typing import Any

from torch import Tensor
from torchao.optim import AdamW4bit as _AdamW4bit  # type: ignore[import-untyped, unused-ignore]
from torchao.optim import AdamW8bit as _AdamW8bit

EIGHT_BIT_BLOCK = 256
"""Elements with one scale, as `AdamW8bit` has it."""

TABLE_ROWS = 30_000
"""Of a vocabulary; few other weights have so many rows."""


class AdamW8bit(_AdamW8bit):  # type: ignore[misc]
    """torchao's AdamW8bit, with stochastic rounding where nothing else is asked for."""

    __init__ = partialmethod(_AdamW8bit.__init__, bf16_stochastic_round=True)


class AdamW4bit(_AdamW4bit):  # type: ignore[misc]
    """torchao's AdamW4bit; weights with `table_rows` rows, one a token, have eight-bit moments.

    table_rows: the vocabulary. None: any of 30,000 rows or more.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        table_rows: int | None = None,
        bf16_stochastic_round: bool = True,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, bf16_stochastic_round=bf16_stochastic_round
        )
        self.table_rows = table_rows

    def _subclass_zeros(self, weight: Tensor, signed: bool, block_size: int) -> Tensor:
        # A slice of a table says how many rows the whole one has.
        rows = getattr(weight, "all_rows", weight.shape[0])
        is_table = rows >= TABLE_ROWS if self.table_rows is None else rows == self.table_rows
        if is_table and weight.numel() % EIGHT_BIT_BLOCK == 0:
            return _AdamW8bit._subclass_zeros(weight, signed, EIGHT_BIT_BLOCK)  # type: ignore[no-any-return]
        return _AdamW4bit._subclass_zeros(weight, signed, block_size)  # type: ignore[no-any-return]
