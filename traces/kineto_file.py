"""The Chrome JSON that `torch.profiler` exports (Kineto writes it), as events in nanoseconds.

Of an event's `args` these are read: `Sequence number` and `Fwd thread id` (autograd's numbers),
`External id` and `correlation` (which op launched a kernel), `Input Dims` and `Input type`.
"""

import gzip
import json
import math
import zlib
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .errors import InputError, shown

Kind = Literal["range", "module", "op", "call", "kernel"]
Thread = tuple[str, str]

MODULE = "nn.Module: "
_KINDS: dict[str, Kind] = {
    "user_annotation": "range",
    "python_function": "module",
    "cpu_op": "op",
    "cuda_runtime": "call",
    "cuda_driver": "call",
    "kernel": "kernel",
    "gpu_memcpy": "kernel",
    "gpu_memset": "kernel",
}
_ELEMENT_BYTES = {
    "double": 8,
    "float": 4,
    "c10::Half": 2,
    "c10::BFloat16": 2,
    "long int": 8,
    "long": 8,
    "int": 4,
}
_LARGEST_US = 2**53
_HOW = "write one with torch.profiler's export_chrome_trace"


class Event(NamedTuple):
    """One event: [`start_ns`, `end_ns`) on a thread, of the host or (a kernel's) of a device.

    `sequence` is autograd's number: in forward that of the next backward function to be made, in
    backward that of the function that runs, made by the thread that autograd calls
    `forward_thread` (0 in forward). `external` names the op that a kernel or call belongs to,
    `correlation` the call that launched a kernel. `input_bytes` is the size of the first input
    tensor, 0 where shapes were not recorded.
    """

    kind: Kind
    name: str
    thread: Thread
    start_ns: int
    end_ns: int
    sequence: int | None = None
    forward_thread: int = 0
    external: int | None = None
    correlation: int | None = None
    input_bytes: int = 0


@dataclass(frozen=True)
class Export:
    """Events in order of start, enclosing ones first; `device` is the GPU's name, or "cpu".

    `threads` has the host thread for each of autograd's numbers of a forward thread.
    """

    device: str
    events: tuple[Event, ...]
    threads: dict[int, Thread]

    @property
    def kernels(self) -> list[Event]:
        """What ran on devices; empty for an export of the CPU alone."""
        return [event for event in self.events if event.kind == "kernel"]


def read_export(path: str | Path) -> Export:
    """Read an export, plain or gzipped.

    Raises InputError for a file that cannot be read or is no export of torch.profiler.
    """
    name = shown(path)
    data = _read_json(Path(path), name)
    rows = data.get("traceEvents") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{name}: not a profiler export: no list traceEvents; {_HOW}")
    events = [
        event
        for number, row in enumerate(rows)
        if isinstance(row, dict) and (event := _event(row, f"{name}: traceEvents.{number}"))
    ]
    if not any(event.kind == "op" for event in events):
        raise InputError(
            f"{name}: not a profiler export: it has no cpu_op events; {_HOW}, "
            f"ProfilerActivity.CPU among its activities"
        )
    events.sort(key=lambda event: (event.start_ns, -event.end_ns, event.kind in ("op", "call")))
    return Export(_device(data, rows), tuple(events), _forward_threads(rows, events))


def _read_json(path: Path, name: str) -> Any:
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        # Times are microseconds with a fraction, too long for a float to hold exactly.
        return json.loads(text.decode("utf-8", "replace"), parse_float=Decimal, strict=False)
    except FileNotFoundError:
        raise InputError(f"{name}: no such profiler export") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{name}: not a profiler export: damaged gzip; export it anew") from None
    except OSError as error:
        raise InputError(f"{name}: cannot read this profiler export: {error.strerror}") from None
    except (RecursionError, ValueError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{name}: not a profiler export: no JSON{where}; {_HOW}") from None


def _event(row: dict[str, Any], where: str) -> Event | None:
    kind, name = _KINDS.get(str(row.get("cat"))), str(row.get("name"))
    if kind is None or row.get("ph") != "X":
        return None
    if kind == "module" and not name.startswith(MODULE):
        return None
    start = _nanoseconds(row.get("ts"), f"{where}.ts")
    length = _nanoseconds(row.get("dur"), f"{where}.dur")
    if length < 0:
        raise InputError(f"{where}.dur: must not be negative; export it anew")
    given = row.get("args")
    args = given if isinstance(given, dict) else {}
    return Event(
        kind,
        name.removeprefix(MODULE),
        _thread(row),
        start,
        start + length,
        _whole(args.get("Sequence number")),
        _whole(args.get("Fwd thread id")) or 0,
        _whole(args.get("External id", args.get("external id"))),
        _whole(args.get("correlation")),
        _input_bytes(args.get("Input Dims"), args.get("Input type")),
    )


def _nanoseconds(value: Any, where: str) -> int:
    if not isinstance(value, int | Decimal) or not -_LARGEST_US < value < _LARGEST_US:
        raise InputError(f"{where}: must be a time in microseconds; export it anew")
    return round(value * 1000)


def _thread(row: dict[str, Any]) -> Thread:
    return str(row.get("pid")), str(row.get("tid"))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _input_bytes(dims: Any, types: Any) -> int:
    if not (isinstance(dims, list) and isinstance(types, list) and dims and types):
        return 0
    sizes: Any = dims[0]
    if not isinstance(sizes, list) or not sizes or not all(isinstance(size, int) for size in sizes):
        return 0
    return math.prod(sizes) * _ELEMENT_BYTES.get(str(types[0]), 0)


def _device(data: dict[str, Any], rows: list[Any]) -> str:
    """The name of the device that most kernels ran on."""
    kernels = [row for row in rows if isinstance(row, dict) and row.get("cat") == "kernel"]
    if not kernels:
        return "cpu"
    number = Counter(str(row.get("pid")) for row in kernels).most_common(1)[0][0]
    known = data.get("deviceProperties")
    for each in known if isinstance(known, list) else []:
        if isinstance(each, dict) and str(each.get("id")) == number and each.get("name"):
            return str(each["name"])
    return "cuda"


def _forward_threads(rows: list[Any], events: list[Event]) -> dict[int, Thread]:
    """From the arrows that lead from a forward op's start to its backward's."""
    arrows = [row for row in rows if isinstance(row, dict) and row.get("cat") == "fwdbwd"]
    sources = {str(row.get("id")): _thread(row) for row in arrows if row.get("ph") == "s"}
    numbers = {
        (event.thread, event.start_ns): event.forward_thread
        for event in events
        if event.forward_thread
    }
    threads = {}
    for row in arrows:
        if row.get("ph") == "f" and (source := sources.get(str(row.get("id")))):
            start = _nanoseconds(row.get("ts"), "traceEvents: ts of a fwdbwd arrow")
            threads[numbers.get((_thread(row), start), 0)] = source
    return threads or _only_thread(events)


def _only_thread(events: list[Event]) -> dict[int, Thread]:
    """Without arrows: all numbers mean the thread that ran all forwards, if it is one."""
    forward = {
        event.thread for event in events if event.sequence is not None and not event.forward_thread
    }
    numbers = {event.forward_thread for event in events if event.forward_thread}
    return dict.fromkeys(numbers, forward.pop()) if len(forward) == 1 else {}
