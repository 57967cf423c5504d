"""The demo: five real models on eight RTX 4090s, every policy, who wins, and the pictures.

python examples/demo.py FOLDER
"""

import sys
import time
from pathlib import Path

from rich.console import Console

import roundel
from roundel import report
from roundel.api import Comparison, compare_work

DEVICES, MICROBATCHES, STEPS = 8, 16, 3

WEIGHT_SHARE = {"qwen3-235b-lora-rtx4090": 0.0}
"""The weight gradients' part of backward, which the traces do not have.

With frozen weights there is next to none; else two matrix products of a linear layer's three are
in backward, one for the weights.
"""


ASSUMED = (
    "figures: steady state of three steps; pictures: one step. Assumed: early recompute for all, "
    "weight gradients {share:.0%} of backward"
)


def policies_for(trace: str) -> list[roundel.Policy]:
    """Every policy; those that keep the model on the GPUs recompute early, to save memory."""
    share = WEIGHT_SHARE.get(trace, 0.5)
    return [
        roundel.GPipe(recompute="early"),
        roundel.OneFOneB(recompute="early"),
        roundel.Interleaved1F1B(recompute="early"),
        roundel.LoopedBFS(recompute="early"),
        roundel.ZBH1(recompute="early", weight_share=share),
        roundel.ZBH2(recompute="early", weight_share=share),
        roundel.ZBV(recompute="early", weight_share=share),
        roundel.RoundRobin(),
        roundel.LayerToLayer(),
    ]


def compare(trace: str, steps: int) -> Comparison:
    """All policies on one trace."""
    work = roundel.make_work(trace, devices=DEVICES, microbatches=MICROBATCHES)
    return compare_work(work, policies_for(trace), steps)


def main(folder: Path) -> None:
    """Print the tables and draw the pictures into `folder`, a folder per model."""
    console, start = Console(), time.perf_counter()
    verdicts = {}
    for trace in roundel.trace_names():
        console.rule(trace)
        with console.status(f"simulating and drawing {trace}"):
            comparison = compare(trace, STEPS)
            written = report.write_pictures(compare(trace, steps=1), folder / trace)
        console.print(ASSUMED.format(share=WEIGHT_SHARE.get(trace, 0.5)), highlight=False)
        report.print_comparison(console, comparison, written)
        verdicts[trace] = report.verdict(comparison)
    console.rule("in short")
    for trace, verdict in verdicts.items():
        console.print(f"[bold]{trace}[/]\n    {verdict}", highlight=False, soft_wrap=True)
    console.print(f"\nAll pictures are in {folder}/ ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
