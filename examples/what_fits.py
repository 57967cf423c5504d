"""What one 24 GB card and less host memory can train, by the simulator: a table.

    python examples/what_fits.py
    python examples/what_fits.py --models llama-3.1-8b --lora-rank 64 --microbatches 4
    python examples/what_fits.py --markdown            # the tables of docs/what-fits.md
    python examples/what_fits.py --plot what-fits.png

Decoders by their public shapes, computed traces for an RTX 4090, round-robin: nothing is measured.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

from what_fits_picture import Point, draw
from what_fits_traces import MODELS, trace_of, with_low_bit_states

import roundel
from roundel.api import simulate_work
from roundel.throughput import host_machine

GIB, K = 2**30, 1024
CONTEXTS = (8 * K, 32 * K, 64 * K)
MOST = 128 * K
"""No longer context is tried: the larger of these models are made for no more."""


@dataclass(frozen=True)
class Case:
    """One model trained in one way. `rank` 0: fully; `reserve`: bytes of the GPU left alone.

    `low_bit`: bf16 weights without masters and states of four bits, which pass through the GPU;
    else float32 masters and states on the host, with gradients that are clipped together.
    `head_in_loss`: the loss makes the logits, in parts; else all exist at once, and so does their
    gradient. `hugging_face`: blocks are its modules, else ones that fused kernels compute.
    """

    model: str
    rank: int = 0
    low_bit: bool = False
    head_in_loss: bool = True
    hugging_face: bool = True
    devices: int = 1
    microbatches: int = 8
    reserve: int = GIB
    host_rate: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a step of one plan needs and takes: peaks of memory, of the fullest GPU, of the host."""

    fits: bool
    device_bytes: int
    host_bytes: int
    tokens_per_s: float


def outcome(case: Case, context: int) -> Outcome:
    """The quickest plan that fits the GPU: in one round or several, by round-robin's own cut or
    one layer a visit, the least there is. Where none fits, what needs the least of the GPU.

    A microbatch is one sequence; gradients that are clipped together all wait on the host. Raises
    InputError for sizes out of range.
    """
    least = [simulated(case, context, 1, each) for each in rounds_of(case)]
    fitting = [
        plan
        for each, small in zip(rounds_of(case), least, strict=True)
        if small.fits
        for plan in (small, simulated(case, context, 0, each))
        if plan.fits
    ]
    if fitting:
        return max(fitting, key=lambda each: each.tokens_per_s)
    return min(least, key=lambda each: each.device_bytes)


def rounds_of(case: Case) -> tuple[int | None, ...]:
    """How many microbatches a round has at the least: all; so many that uploads hide; one."""
    return (case.microbatches, None, 1) if case.microbatches > 1 else (1,)


def _most_and_fewest(case: Case) -> set[int | None]:
    return {rounds_of(case)[0], rounds_of(case)[-1]}


def leanest(case: Case, context: int) -> Outcome:
    """The plan that fits the GPU with the least host memory, of `outcome`'s and of even cuts.

    Larger visits keep more on the GPU, and fewer of their inputs on the host; so do rounds of fewer
    microbatches.
    """
    best = outcome(case, context)
    for each in _most_and_fewest(case):
        for size in range(1, MODELS[case.model]["num_hidden_layers"] + 1):
            other = simulated(case, context, size, each)
            if not other.fits:
                break
            best = min(best, other, key=lambda each: each.host_bytes)
    return best


def longest(case: Case) -> int:
    """The longest context, in whole K tokens up to `MOST`, whose plan fits the GPU; 0 for none."""
    low, high = 0, MOST // K
    while low < high:
        middle = (low + high + 1) // 2
        fits = any(simulated(case, middle * K, 1, each).fits for each in _most_and_fewest(case))
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * K


@lru_cache(maxsize=4096)
def simulated(case: Case, context: int, size: int = 0, rounds: int | None = 0) -> Outcome:
    """A step with `size` blocks a visit and the head alone, or (0) with round-robin's own cut.

    `rounds`: microbatches of a round at the least, as `RoundRobin.round_size`; 0: all.
    """
    trace = trace_of(case.model, context, case.rank, case.head_in_loss, case.hugging_face)
    policy = roundel.RoundRobin(round_size=case.microbatches if rounds == 0 else rounds, clip=True)
    if case.low_bit:
        trace = with_low_bit_states(trace, case.model)
        policy = replace(policy, clip=False, optimizer_on="device")
    work = roundel.Work(trace, _machine(case), case.microbatches)
    if size:
        count = -(-(work.layers - 1) // size)
        bounds = [(work.layers - 1) * number // count for number in range(count + 1)]
        sizes = tuple(stop - first for first, stop in pairwise(bounds))
        policy = replace(policy, partition=sizes, backward_partition=(1, *reversed(sizes)))
    simulation = simulate_work(work, policy)
    *devices, host = simulation.timeline.memory
    return Outcome(
        fits=not any(curve.over_bytes for curve in devices),
        device_bytes=max(curve.peak_bytes for curve in devices),
        host_bytes=host.peak_bytes,
        tokens_per_s=simulation.metrics.tokens_per_s,
    )


def _machine(case: Case) -> roundel.Machine:
    machine = host_machine(case.devices, case.host_rate)
    devices = (
        each.model_copy(update={"memory_bytes": each.memory_bytes - case.reserve})
        for each in machine.devices
    )
    return machine.model_copy(update={"devices": tuple(devices)})


# ---- tables

NOT_AT_ALL = "–"
WAYS: dict[str, dict[str, bool]] = {
    "longest": {},
    "with fused blocks": {"hugging_face": False},
    "with all logits at once": {"head_in_loss": False},
}


HEADINGS = [f"{context // K}K: host GiB (least); tokens/s" for context in CONTEXTS]


@dataclass(frozen=True)
class Found:
    """Of a case: cells of the tables, and its line of the picture.

    memory: host memory, the least of it, and tokens/s at each of `CONTEXTS`. contexts: the longest
    one in each of `WAYS`.
    """

    memory: list[str]
    contexts: list[str]
    line: list[Point]


def find(case: Case, drawn: bool) -> Found:
    """All that is said of a case."""
    return Found(
        [_cell(case, context) for context in CONTEXTS],
        [_context(longest(replace(case, **how))) for how in WAYS.values()],
        _line(case) if drawn else [],
    )


def find_all(cases: Sequence[Case], drawn: bool, processes: int) -> list[Found]:
    """The same of each, in so many processes."""
    work = partial(find, drawn=drawn)
    if processes == 1:
        return list(map(work, cases))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(work, cases))


def _names(case: Case) -> list[str]:
    fully = "fully, 4-bit states" if case.low_bit else "fully"
    return [case.model, f"LoRA, rank {case.rank}" if case.rank else fully]


def _cell(case: Case, context: int) -> str:
    found = outcome(case, context)
    if not found.fits:
        return NOT_AT_ALL
    host, least = (f"{each.host_bytes / GIB:,.0f}" for each in (found, leanest(case, context)))
    return f"{host}{f' ({least})' if least != host else ''}; {found.tokens_per_s:,.0f}"


def _context(tokens: int) -> str:
    return f"{tokens // K}K{' or more' if tokens == MOST else ''}" if tokens else NOT_AT_ALL


def plain(rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table for a document."""
    heading, *rest = (f"| {' | '.join(row)} |" for row in rows)
    rule = "|" + "---|" * len(rows[0])
    return "\n".join((heading, rule, *rest))


# ---- picture


def lines(cases: Sequence[Case], found: Sequence[Found]) -> dict[str, dict[str, list[Point]]]:
    """For each way of training a line a model: enough host memory, and the context then."""
    panels: dict[str, dict[str, list[Point]]] = {}
    pairs = zip(cases, found, strict=True)
    for case, each in sorted(pairs, key=lambda pair: (pair[0].rank, pair[0].low_bit)):
        model, trained = _names(case)
        panels.setdefault(f"trained: {trained}", {})[model] = each.line
    return panels


def _line(case: Case) -> list[Point]:
    most = longest(case)
    contexts = sorted({*(2**n * K for n in range(1, 8) if 2**n * K <= most), most} - {0})
    hosts = [leanest(case, context).host_bytes / GIB for context in contexts]
    # What is enough for a longer context is enough for a shorter one.
    return [
        Point(min(hosts[number:]), context / K, ends=context == most < MOST)
        for number, context in enumerate(contexts)
    ]


# ---- command line


def main(words: list[str] | None = None) -> None:
    """Print the tables, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="some of %(default)s")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--devices", type=int, default=1, help="RTX 4090s, 1 to 8")
    parser.add_argument("--microbatches", type=int, default=8, help="sequences a step")
    parser.add_argument(
        "--reserve", type=float, default=1.0, help="GiB of a GPU left for all that is not modelled"
    )
    parser.add_argument("--host-optimizer-rate", type=int, help="parameters/s of AdamW")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/what-fits.md")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--plot", type=Path, help="longest context by host memory, a picture")
    chosen = parser.parse_args(words)
    if chosen.processes < 1:
        raise roundel.InputError("--processes: from 1")
    if chosen.lora_rank < 1 or not 0 <= chosen.reserve < 24:
        raise roundel.InputError("--lora-rank: from 1; --reserve: from 0 to less than 24 GiB")
    cases = [
        Case(
            model,
            rank,
            low_bit,
            devices=chosen.devices,
            microbatches=chosen.microbatches,
            reserve=round(chosen.reserve * GIB),
            host_rate=chosen.host_optimizer_rate,
        )
        for model in _models(chosen.models)
        for rank, low_bit in ((0, False), (0, True), (chosen.lora_rank, False))
        # What layers share cannot pass through a GPU with one of them.
        if not (low_bit and MODELS[model]["tie_word_embeddings"])
    ]
    found = find_all(cases, bool(chosen.plot), chosen.processes)
    names = [_names(case) for case in cases]
    memory = [[*name, *each.memory] for name, each in zip(names, found, strict=True)]
    contexts = [[*name, *each.contexts] for name, each in zip(names, found, strict=True)]
    table = markdown if chosen.markdown else plain
    print(table([["model", "trained", *HEADINGS], *memory]), end="\n\n")
    print(table([["model", "trained", *WAYS], *contexts]))
    if not chosen.markdown:
        print(f"\n{NOT_AT_ALL}: more than the GPU's memory; (least): with a coarser cut")
    if chosen.plot:
        cards = "an RTX 4090" if chosen.devices == 1 else f"{chosen.devices} RTX 4090s"
        draw(lines(cases, found), chosen.plot, f"How long a context fits {cards}, by host memory")


def _models(text: str) -> list[str]:
    models = text.split(",")
    if unknown := [each for each in models if each not in MODELS]:
        raise roundel.InputError(f"--models: no {unknown[0]!r}; there are {', '.join(MODELS)}")
    return models


if __name__ == "__main__":
    try:
        main()
    except roundel.InputError as error:
        raise SystemExit(f"error: {error}") from None
