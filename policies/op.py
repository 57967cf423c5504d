"""Op: one piece of work of a plan, and its letters."""

import re
from typing import NamedTuple

from ..traces.errors import InputError

OP_KINDS = "FBIWR"
_PATTERN = re.compile(r"(\d+):(\d+)([FBIWR])(\d+)")


class Op(NamedTuple):
    """Work on layers [first, stop) for one microbatch.

    Kinds, as in PyTorch's pipelining: `F` forward, `B` full backward, `I` backward for the input,
    `W` backward for the weights, `R` recompute. `0:4F2` is the forward of layers 0 to 3 for
    microbatch 2. Where it runs is the plan's to say.
    """

    kind: str
    first: int
    stop: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.first}:{self.stop}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Op":
        """The op that prints as `text`. Raises InputError for anything else."""
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise InputError(
                f'not an op: {text!r}; write it as in "0:4F2" (layers, kind, microbatch)'
            )
        first, stop, kind, microbatch = match.groups()
        return cls(kind, int(first), int(stop), int(microbatch))
