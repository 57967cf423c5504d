"""Transfers that share links: each case is small enough to do by hand."""

import pytest

from roundel.policies.lowering import lower
from roundel.policies.work import Work
from roundel.sim.engine import simulate_program
from roundel.sim.paths import Network
from roundel.traces.errors import InputError
from roundel.traces.machine import Device, Link, Machine
from roundel.traces.timeline import KINDS, Timeline

from ..costs import make_machine, make_trace
from ..policies.test_plan import plan_of

# Both devices upload their only layer, 1000 bytes, at once; nothing else moves.
TWO_UPLOADS = ("0:1F0 0:1B0", "1:2F0 1:2B0")


def run(machine: Machine, *devices: str, **fields: int) -> Timeline:
    plan = plan_of(*devices, weights="streamed", optimizer_on="host")
    work = Work(make_trace(2, **fields), machine, 1)
    return simulate_program(lower([plan], work), "test")


def times(timeline: Timeline, kind: str) -> list[tuple[int, int]]:
    return [
        (start, end)
        for code, start, end in zip(
            timeline.kind, timeline.start_ns.tolist(), timeline.end_ns.tolist(), strict=True
        )
        if KINDS[code] == kind
    ]


def test_a_wide_host_link_serves_both_at_full_speed() -> None:
    timeline = run(make_machine(2), *TWO_UPLOADS, param_bytes=1000)
    assert times(timeline, "upload") == [(0, 1000), (0, 1000)]


def test_a_narrow_host_link_is_shared_equally() -> None:
    machine = make_machine(2, host_bytes_per_s=10**9)
    timeline = run(machine, *TWO_UPLOADS, param_bytes=1000)
    assert times(timeline, "upload") == [(0, 2000), (0, 2000)]


def test_what_ends_first_leaves_its_share_to_the_other() -> None:
    machine = make_machine(2, host_bytes_per_s=10**9)
    plan = plan_of(*TWO_UPLOADS, weights="streamed", optimizer_on="host")
    trace = make_trace(2)
    layers = tuple(
        layer.model_copy(update={"param_bytes": nbytes})
        for layer, nbytes in zip(trace.layers, (1000, 3000), strict=True)
    )
    work = Work(trace.model_copy(update={"layers": layers}), machine, 1)
    timeline = simulate_program(lower([plan], work), "test")
    # Together until the first has its 1000 bytes at 2000 ns; the other's last 2000 go alone.
    assert times(timeline, "upload") == [(0, 2000), (0, 4000)]


def test_latency_comes_first_and_takes_no_bandwidth() -> None:
    machine = make_machine(2, host_bytes_per_s=10**9, latency_ns=50)
    timeline = run(machine, *TWO_UPLOADS, param_bytes=1000)
    assert times(timeline, "upload") == [(0, 2100), (0, 2100)]


def test_a_lane_moves_one_thing_at_a_time() -> None:
    timeline = run(make_machine(1), "0:2F0 0:2B0", param_bytes=1000)
    assert times(timeline, "upload") == [(0, 1000), (1000, 2000)]


@pytest.mark.parametrize(("duplex", "end"), [(True, 1000), (False, 2000)])
def test_opposite_directions_share_a_half_duplex_link(duplex: bool, end: int) -> None:
    machine = Machine(
        name="pair",
        devices=(Device(name="gpu0"), Device(name="gpu1")),
        links=(Link(a="gpu0", b="gpu1", bytes_per_s=10**9, duplex=duplex),),
    )
    # Microbatch 0 goes one way while microbatch 1 goes the other, both after 10 ns of forward.
    plan = plan_of(
        "0:1F0 1:2R1 1:2B1 0:1R0 0:1B0",
        "0:1F1 1:2F0 1:2F1 1:2R0 1:2B0 0:1R1 0:1B1",
        weights="streamed",
        optimizer_on="host",
        activations="device",
    )
    work = Work(make_trace(2, output_bytes=1000), machine, 2)
    sends = times(simulate_program(lower([plan], work), "test"), "send")
    assert sends[:2] == [(10, 10 + end), (10, 10 + end)]


def test_a_path_takes_the_quicker_way() -> None:
    slow = Link(a="gpu0", b="gpu1", bytes_per_s=10**6)
    machine = make_machine(2)
    network = Network(machine.model_copy(update={"links": (*machine.links, slow)}))
    assert network.path(0, 1).bytes_per_ns == 1.0
    assert len(network.path(0, 1).links) == 2


def test_a_missing_path_says_which() -> None:
    machine = Machine(name="apart", devices=(Device(name="gpu0"), Device(name="gpu1")))
    with pytest.raises(InputError, match="machine apart: links: no path from gpu0 to gpu1; add"):
        Network(machine).path(0, 1)


def test_hop_time_replaces_links_and_host_transfers_are_free() -> None:
    machine = make_machine(2, host_bytes_per_s=1).with_hop(7)
    timeline = run(machine, *TWO_UPLOADS, param_bytes=1000, output_bytes=10**9)
    assert times(timeline, "upload") == [(0, 0), (0, 0)]
    assert [end - start for start, end in times(timeline, "send")] == [7, 7]
