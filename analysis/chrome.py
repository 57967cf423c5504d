"""Timelines as Chrome trace JSON, which https://ui.perfetto.dev and chrome://tracing open.

The format is Google's "Trace Event Format": a process a device and one for the host, a thread a
lane, an "X" event a task and "C" events for memory. Times are microseconds with three decimals,
so no nanosecond is lost.
"""

import gzip
import json
from collections.abc import Iterator
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..traces.timeline import KINDS, LANE_KINDS, Lane, MemoryCurve, Timeline
from .files import CHROME_TRACES, output_path, writing

_CHUNK = 50_000


def write_chrome_trace(timeline: Timeline, path: str | Path) -> None:
    """Write `timeline` as Chrome trace JSON, gzipped when the name ends in .gz.

    Memory use stays small however long the timeline is. Raises InputError for a wrong path.
    """
    path = output_path(path, "Chrome trace", CHROME_TRACES)
    with writing(path, "Chrome trace"), closing(_opened(path)) as out:
        out.write(_head(timeline))
        out.write(",\n".join(_metadata(timeline)))
        for events in (_tasks(timeline), _memory(timeline)):
            for text in events:
                out.write(",\n" + text)
        out.write("\n]}\n")


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        # mtime 0: the same timeline gives the same file.
        raw = gzip.GzipFile(path, "wb", compresslevel=5, mtime=0)
        return TextIOWrapper(raw, encoding="utf-8", write_through=False)
    return path.open("w", encoding="utf-8")


def _head(timeline: Timeline) -> str:
    about = {"name": timeline.name, "source": timeline.source, "steps": timeline.steps}
    # "ms" only says how a viewer prints times; timestamps are microseconds either way.
    return f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[\n'


def _process(timeline: Timeline, device: int) -> int:
    return device + 1 if device >= 0 else timeline.devices + 1


def _thread(timeline: Timeline, lane: int) -> int:
    # Never a process's number: viewers take such a thread for the main one and rename it.
    return timeline.devices + 2 + lane


def _metadata(timeline: Timeline) -> Iterator[str]:
    """Names and order of the processes and threads."""
    for device in (*range(timeline.devices), -1):
        name, pid = f"gpu{device}" if device >= 0 else "host", _process(timeline, device)
        yield _named("process_name", pid, 0, {"name": name})
        yield _named("process_sort_index", pid, 0, {"sort_index": pid})
    for number, lane in enumerate(timeline.lanes):
        pid, tid = _process(timeline, lane.device), _thread(timeline, number)
        yield _named("thread_name", pid, tid, {"name": lane.kind})
        yield _named("thread_sort_index", pid, tid, {"sort_index": _rank(lane)})


def _named(name: str, pid: int, tid: int, args: dict[str, Any]) -> str:
    return json.dumps({"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args})


def _rank(lane: Lane) -> int:
    return LANE_KINDS.index(lane.kind)


def _tasks(timeline: Timeline) -> Iterator[str]:
    """Chunks of "X" events, lane after lane, each lane's in the order of their starts."""
    heads = [
        f'"pid":{_process(timeline, lane.device)},"tid":{_thread(timeline, number)}'
        for number, lane in enumerate(timeline.lanes)
    ]
    order = np.lexsort((timeline.end_ns, timeline.start_ns, timeline.lane))
    for at in range(0, len(order), _CHUNK):
        yield ",\n".join(_chunk(timeline, order[at : at + _CHUNK], heads))


def _chunk(timeline: Timeline, rows: np.typing.NDArray[np.intp], heads: list[str]) -> list[str]:
    names = (timeline.kind, timeline.lane, timeline.first, timeline.stop, timeline.microbatch)
    numbers = (timeline.step, timeline.nbytes, timeline.start_ns, timeline.end_ns)
    columns = [column[rows].tolist() for column in (*names, *numbers)]
    return [
        f'{{"name":"{_label(KINDS[kind], first, stop, microbatch)}","cat":"{KINDS[kind]}",'
        f'"ph":"X",{heads[lane]},"ts":{_us(start)},"dur":{_us(end - start)},'
        f'"args":{{"layers":"{first}:{stop}","microbatch":{microbatch},"step":{step},'
        f'"bytes":{nbytes}}}}}'
        for kind, lane, first, stop, microbatch, step, nbytes, start, end in zip(
            *columns, strict=True
        )
    ]


def _label(kind: str, first: int, stop: int, microbatch: int) -> str:
    if microbatch < 0:
        return f"{kind} {first}:{stop}"
    return f"{kind}{microbatch}" if len(kind) == 1 else f"{kind} {microbatch}"


def _us(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03}"


def _memory(timeline: Timeline) -> Iterator[str]:
    """Chunks of "C" events: the bytes in use in each memory, where they change."""
    for number, curve in enumerate(timeline.memory):
        pid = _process(timeline, number if number < timeline.devices else -1)
        for at in range(0, len(curve.time_ns), _CHUNK):
            yield ",\n".join(_counters(curve, pid, slice(at, at + _CHUNK)))


def _counters(curve: MemoryCurve, pid: int, part: slice) -> list[str]:
    points = zip(curve.time_ns[part].tolist(), curve.used_bytes[part].tolist(), strict=True)
    head = f'{{"name":"memory in use","ph":"C","pid":{pid},"tid":0'
    return [f'{head},"ts":{_us(ns)},"args":{{"bytes":{used}}}}}' for ns, used in points]
