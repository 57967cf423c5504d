import gzip
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from roundel.analysis import chrome
from roundel.analysis.chrome import write_chrome_trace
from roundel.traces.errors import InputError
from roundel.traces.timeline import Timeline

from .build import build, curve
from .test_metrics import timelines

PICTURE = """
    gpu0:           F0 F0 B0
    gpu0 h2d:       upload . fetch0
    gpu1:           . F0' .
    host optimizer: . . update
"""


def events(timeline: Timeline, path: Path) -> list[dict]:
    write_chrome_trace(timeline, path)
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(text)["traceEvents"]


def nanoseconds(event: dict) -> tuple[int, int]:
    """Start and end as Perfetto reads them: microseconds as floats, rounded to nanoseconds."""
    start, duration = round(event["ts"] * 1000), round(event["dur"] * 1000)
    return start, start + duration


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_tasks(tmp_path: Path, name: str):
    found = [e for e in events(build(PICTURE, unit_ns=1_001), tmp_path / name) if e["ph"] == "X"]
    assert [(e["name"], e["cat"], *nanoseconds(e)) for e in found] == [
        ("F0", "F", 0, 2_002),
        ("B0", "B", 2_002, 3_003),
        ("upload 0:1", "upload", 0, 1_001),
        ("fetch 0", "fetch", 2_002, 3_003),
        ("F0", "F", 1_001, 2_002),
        ("update 0:1", "update", 2_002, 3_003),
    ]
    assert found[4]["args"] == {"layers": "0:1", "microbatch": 0, "step": 1, "bytes": 0}


def test_processes_and_threads_are_named_and_in_order(tmp_path: Path):
    found = [e for e in events(build(PICTURE), tmp_path / "trace.json") if e["ph"] == "M"]
    named = {
        kind: {(e["pid"], e["tid"]): e["args"] for e in found if e["name"] == kind}
        for kind in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
    }
    processes = sorted(
        (named["process_sort_index"][key]["sort_index"], args["name"], key[0])
        for key, args in named["process_name"].items()
    )
    assert [name for _, name, _ in processes] == ["gpu0", "gpu1", "host"]
    names = {pid: name for _, name, pid in processes}
    threads = sorted(
        (names[key[0]], named["thread_sort_index"][key]["sort_index"], args["name"])
        for key, args in named["thread_name"].items()
    )
    assert [(owner, lane) for owner, _, lane in threads] == [
        ("gpu0", "compute"),
        ("gpu0", "h2d"),
        ("gpu1", "compute"),
        ("host", "optimizer"),
    ]
    tids = [e["tid"] for e in found if e["name"] == "thread_name"]
    assert len(set(tids)) == len(tids)
    assert not set(tids) & set(names)


def test_memory_counters(tmp_path: Path):
    memory = (curve("gpu0", {0: 5, 1500: 9}), curve("gpu1", {0: 7}), curve("host", {0: 1}))
    found = events(build(PICTURE, memory=memory), tmp_path / "trace.json")
    counters = [(e["pid"], e["ts"], e["args"]["bytes"]) for e in found if e["ph"] == "C"]
    assert counters == [(1, 0.0, 5), (1, 1.5, 9), (2, 0.0, 7), (3, 0.0, 1)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(timelines())
def test_spans_do_not_overlap_on_a_thread_and_none_is_lost(tmp_path: Path, timeline: Timeline):
    # Odd times, so that rounding of microseconds would show.
    odd = replace(
        timeline, start_ns=timeline.start_ns * 4_037_007, end_ns=timeline.end_ns * 4_037_007
    )
    found = [e for e in events(odd, tmp_path / "trace.json") if e["ph"] == "X"]
    assert len(found) == len(timeline)
    threads: dict[int, list[tuple[int, int]]] = {}
    for event in found:
        threads.setdefault(event["tid"], []).append(nanoseconds(event))
    for spans in threads.values():
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    expected = sorted(zip(odd.start_ns.tolist(), odd.end_ns.tolist(), strict=True))
    assert sorted(span for spans in threads.values() for span in spans) == expected


def test_many_chunks_make_one_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chrome, "_CHUNK", 2)
    memory = (curve("gpu0", {0: 1, 1: 2, 2: 3}),)
    found = events(build(PICTURE, memory=memory), tmp_path / "trace.json")
    assert sum(e["ph"] == "X" for e in found) == 6
    assert sum(e["ph"] == "C" for e in found) == 3


def test_gzip_holds_no_date(tmp_path: Path):
    write_chrome_trace(build(PICTURE), tmp_path / "trace.json.gz")
    # RFC 1952: bytes 4 to 7 are the time of writing, 0 for none.
    assert (tmp_path / "trace.json.gz").read_bytes()[4:8] == bytes(4)


def test_wrong_path(tmp_path: Path):
    with pytest.raises(InputError, match="there is no folder"):
        write_chrome_trace(build(PICTURE), tmp_path / "nowhere" / "trace.json")
