"""The log of a training: JSON lines, one object a step."""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from .traces.errors import InputError, shown

if TYPE_CHECKING:
    from .executor.training_loop import StepReport


class TrainLog:
    """A line a step: `step`, `loss`, `tokens_per_s`, `lr`, `time` (seconds since 1970), and
    `held_out_loss` where it was measured. NaN is null.

    Begins anew, or where `after` steps are done already, behind their lines. A context manager.
    """

    def __init__(self, path: Path | None, after: int = 0) -> None:
        self.path = path
        self._after = after
        self._file: TextIO | None = None

    def __enter__(self) -> "TrainLog":
        if self.path is None:
            return self
        try:
            kept = _lines_until(self.path, self._after) if self._after else []
            self._file = self.path.open("w", encoding="utf-8")
            self._file.writelines(kept)
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{shown(self.path)}: cannot write this log: {error.strerror}"
            ) from None
        return self

    def write(self, report: "StepReport") -> None:
        """Add a step's line."""
        if self._file is None:
            return
        row: dict[str, Any] = {
            "step": report.step,
            "loss": _number(report.loss),
            "tokens_per_s": round(report.tokens_per_s, 1),
            "lr": report.lr,
            "time": round(time.time(), 3),
        }
        if report.held_out_loss is not None:
            row["held_out_loss"] = _number(report.held_out_loss)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of an earlier run up to a step."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
