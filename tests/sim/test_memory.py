"""Memory over time and exposed transfers, in cases small enough to count by hand."""

import pytest

from roundel.policies.lowering import lower
from roundel.policies.work import Work
from roundel.sim.engine import simulate_program
from roundel.traces.machine import ideal_machine
from roundel.traces.timeline import Timeline

from ..costs import make_machine, make_trace
from ..policies.lanes import dependencies
from ..policies.test_plan import plan_of

STREAMED = {"weights": "streamed", "optimizer_on": "host", "activations": "host"}


def run(*devices: str, machine=None, microbatches: int = 1, layers: int = 2, **options) -> Timeline:  # type: ignore[no-untyped-def]
    fields = {name: options.pop(name) for name in list(options) if name.endswith("_bytes")}
    work = Work(make_trace(layers, **fields), machine or ideal_machine(len(devices)), microbatches)
    return simulate_program(lower([plan_of(*devices, **options)], work), "test")


def peaks(timeline: Timeline) -> list[int]:
    return [curve.peak_bytes for curve in timeline.memory]


def test_saved_tensors_live_from_forward_to_backward_with_the_outputs_between_layers() -> None:
    # Two microbatches: saved of both layers, and the output of the first for the second.
    timeline = run("0:2F0 0:2F1 0:2B0 0:2B1", microbatches=2, saved_bytes=100, output_bytes=10)
    assert peaks(timeline) == [2 * (2 * 100 + 10), 0]
    curve = timeline.memory[0]
    assert curve.used_bytes.tolist() == [210, 420, 210, 0]
    assert curve.time_ns.tolist() == [0, 20, 80, 120]


def test_a_forward_that_is_recomputed_holds_one_layer_at_a_time() -> None:
    timeline = run("0:2F0 0:2R0 0:2B0", saved_bytes=100, output_bytes=10, workspace_bytes=7)
    # Forward: one layer's saved, output and workspace; later all that is saved, and workspace.
    assert timeline.memory[0].used_bytes.tolist() == [100 + 10 + 7, 210 + 7, 210 + 7, 0]


def test_a_weight_gradient_holds_saved_tensors_until_it_is_made() -> None:
    timeline = run("0:2F0 0:2I0 0:2W0", saved_bytes=100)
    assert timeline.memory[0].time_ns.tolist() == [0, 60]
    assert timeline.memory[0].used_bytes.tolist() == [200, 0]


def test_streamed_weights_take_room_for_two_visits_and_the_host_holds_all() -> None:
    timeline = run(
        "0:1F0 1:2F0 2:3F0 3:4F0 3:4R0 3:4B0 2:3R0 2:3B0 1:2R0 1:2B0 0:1R0 0:1B0",
        layers=4,
        param_bytes=1000,
        optimizer_bytes=6000,
        **STREAMED,
    )
    assert peaks(timeline) == [2 * 1000, 4 * 7000]


@pytest.mark.parametrize(("optimizer", "copies"), [("sync", 1), ("stale", 2)])
def test_a_stale_optimizer_keeps_the_weights_twice_on_the_host(optimizer: str, copies: int) -> None:
    timeline = run(
        "0:1F0 1:2F0 1:2B0 0:1R0 0:1B0", optimizer=optimizer, param_bytes=1000, **STREAMED
    )
    assert peaks(timeline)[-1] == 2 * 1000 * copies


def test_gradients_wait_on_the_host_for_their_update() -> None:
    machine = make_machine(1, params_per_s=10**9)
    timeline = run("0:2F0 0:2B0", machine=machine, grad_bytes=200, **STREAMED)
    # 100 parameters a layer take 100 ns to update, their 200 bytes 200 ns to come down.
    curve = timeline.memory[-1]
    assert curve.time_ns.tolist() == [60, 260, 360, 560]
    assert curve.used_bytes.tolist() == [200, 400, 200, 0]


def test_an_activation_is_fetched_after_it_was_put_away() -> None:
    plan = plan_of("0:1F0 1:2F0 1:2R0 1:2B0 0:1R0 0:1B0", **STREAMED)
    program = lower([plan], Work(make_trace(2, output_bytes=50), make_machine(1), 1))
    assert ("offload 0m0", "fetch 0m0") in dependencies(program)
    timeline = simulate_program(program, "test")
    spans = {span.kind: span for span in timeline.spans() if span.kind in ("offload", "fetch")}
    assert spans["offload"].end_ns <= spans["fetch"].start_ns


def test_an_exposed_transfer_is_the_wait_for_it_and_for_those_before_it_on_its_lane() -> None:
    # Two layers' weights take 50 ns each to arrive before anything else can happen.
    timeline = run("0:2F0 0:2B0", machine=make_machine(1), param_bytes=50, **STREAMED)
    exposed = {span.kind: span.exposed_ns for span in timeline.spans() if span.exposed_ns}
    assert exposed == {"F": 100}
    assert timeline.makespan_ns == 100 + 20 + 40


def test_a_send_that_is_hidden_is_not_exposed() -> None:
    hidden = run("0:1F0 0:1F1 0:1B0 0:1B1", "1:2F0 1:2F1 1:2B0 1:2B1", microbatches=2)
    assert not hidden.exposed_ns.any()
    slow = run(
        "0:1F0 0:1F1 0:1B0 0:1B1",
        "1:2F0 1:2F1 1:2B0 1:2B1",
        microbatches=2,
        machine=ideal_machine(2, 4),
    )
    assert [span.exposed_ns for span in slow.spans() if span.exposed_ns] == [4, 4]
