"""Timelines from pictures, for tests."""

import re
from collections.abc import Iterator
from itertools import groupby

import numpy as np

from roundel.traces.timeline import KIND_CODE, Lane, MemoryCurve, Span, Timeline

TOKEN = re.compile(r"([A-Za-z]+)(\d*)('*)")

# 1F1B, 2 devices, 2 microbatches, F=1, B=2: idle (p-1)(F+B) = 3 a device of 9, so a third.
ONE_F_ONE_B = """
    gpu0: F0 F1 .  .  B0 B0 .  B1 B1
    gpu1: .  F0 B0 B0 F1 B1 B1 .  .
"""


def build(picture: str, unit_ns: int = 1, **fields: object) -> Timeline:
    """A timeline from rows such as `gpu0: F0 F0 . B0` or `gpu1 h2d: upload .`.

    One token is one unit of time, equal neighbours are one span, `.` is idle, and each `'` after
    a token moves it one step on. `host optimizer:` is the host's lane. `fields` are Timeline's.
    """
    spans = [span for line in picture.split("\n") if ":" in line for span in _row(line, unit_ns)]
    lanes = [_lane(line.split(":")[0]) for line in picture.split("\n") if ":" in line]
    return from_spans(spans, lanes=tuple(lanes), **fields)


def from_spans(spans: list[Span], lanes: tuple[Lane, ...] = (), **fields: object) -> Timeline:
    """A timeline of these spans; lanes, devices, microbatches and steps follow from them."""
    lanes = lanes or tuple(dict.fromkeys(span.lane for span in spans))

    def column(values: Iterator[int]) -> np.ndarray:
        return np.array(list(values), dtype=np.int64)

    defaults: dict[str, object] = {
        "name": "test",
        "source": "simulated",
        "devices": 1 + max((lane.device for lane in lanes), default=0),
        "microbatches": 1 + max((span.microbatch for span in spans), default=0),
        "steps": 1 + max((span.step for span in spans), default=0),
        "microbatch_tokens": 100,
        "memory": (),
    }
    return Timeline(
        lanes=lanes,
        kind=column(KIND_CODE[span.kind] for span in spans),
        lane=column(lanes.index(span.lane) for span in spans),
        first=column(span.first for span in spans),
        stop=column(span.stop for span in spans),
        microbatch=column(span.microbatch for span in spans),
        step=column(span.step for span in spans),
        nbytes=column(span.nbytes for span in spans),
        start_ns=column(span.start_ns for span in spans),
        end_ns=column(span.end_ns for span in spans),
        exposed_ns=column(span.exposed_ns for span in spans),
        **(defaults | fields),
    )


def curve(name: str, used: dict[int, int], limit: int = 0, **fields: object) -> MemoryCurve:
    """A memory curve from {time_ns: used bytes}; its peak is the first highest point."""
    peak_ns = max(used, key=lambda time: used[time])
    times, values = np.array(list(used)), np.array(list(used.values()))
    return MemoryCurve(name, limit, times, values, used[peak_ns], peak_ns, **fields)


def _lane(text: str) -> Lane:
    owner, _, kind = text.strip().partition(" ")
    device = -1 if owner == "host" else int(owner.removeprefix("gpu"))
    return Lane(device, kind.strip() or "compute")


def _row(line: str, unit_ns: int) -> Iterator[Span]:
    text, _, tokens = line.partition(":")
    lane, at = _lane(text), 0
    for token, same in groupby(tokens.split()):
        start, at = at, at + len(list(same))
        if token != ".":
            yield _span(token, lane, start * unit_ns, at * unit_ns)


def _span(token: str, lane: Lane, start_ns: int, end_ns: int) -> Span:
    match = TOKEN.fullmatch(token)
    assert match is not None, token
    kind, number, step = match.groups()
    microbatch = int(number) if number else -1
    return Span(kind, lane, 0, 1, microbatch, len(step), 0, start_ns, end_ns, 0)
