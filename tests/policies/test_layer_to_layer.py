"""LayerToLayer's order, what it moves, and when it is quicker than round-robin."""

import pytest

import roundel
from roundel import InputError, LayerToLayer, RoundRobin
from roundel.policies.asymmetric import AsymmetricCut
from roundel.traces.machine import Device, Host, Link, Machine
from roundel.traces.timeline import KINDS

from ..costs import make_trace, make_work


def test_every_device_visits_every_stage_with_its_own_microbatches() -> None:
    """Four layers, forward 2 + 1 and the last in the first backward stage, five microbatches.

    device 0   0:2F0 0:2F1  2:3F0 2:3F1  3:4F0 3:4B0 3:4F1 3:4B1  1:3R0 1:3B0 ...
    device 1   0:2F2 0:2F3 0:2F4  2:3F2 ...
    """
    policy = LayerToLayer(partition=(2, 1), backward_partition=(1, 2, 1))
    plan = policy.plan(make_work(4, 2, 5), 0)
    assert [str(op) for op in plan.devices[0]] == [
        *("0:2F0", "0:2F1", "2:3F0", "2:3F1"),
        *("3:4F0", "3:4B0", "3:4F1", "3:4B1"),
        *("1:3R0", "1:3B0", "1:3R1", "1:3B1"),
        *("0:1R0", "0:1B0", "0:1R1", "0:1B1"),
    ]
    assert [str(op) for op in plan.devices[1]][:6] == [
        *("0:2F2", "0:2F3", "0:2F4", "2:3F2", "2:3F3", "2:3F4"),
    ]
    assert {op.microbatch for op in plan.devices[1]} == {2, 3, 4}


@pytest.mark.parametrize("step", [0, 1, 5])
def test_every_step_has_the_same_plan(step: int) -> None:
    work = make_work(4, 3, 7)
    policy = LayerToLayer(partition=(2, 1), backward_partition=(1, 2, 1))
    assert policy.plan(work, step) == policy.plan(work, 0)


def test_nothing_passes_between_devices_and_all_gradients_of_both_come_down() -> None:
    work = make_work(4, 2, 4, param_bytes=1000, grad_bytes=1000, output_bytes=10)
    timeline = roundel.api.simulate_work(work, LayerToLayer((2, 1), (1, 2, 1))).timeline
    kinds = [KINDS[kind] for kind in timeline.kind]
    assert "send" not in kinds
    assert kinds.count("download") == 2 * 4
    assert kinds.count("update") == 4


def test_two_devices_without_transfers_take_half_as_long() -> None:
    policy = LayerToLayer((2, 1), (1, 2, 1))
    times = [
        roundel.api.simulate_work(make_work(4, devices, 6), policy).timeline.makespan_ns
        for devices in (1, 2, 3)
    ]
    assert times[0] == 2 * times[1] == 3 * times[2]


def machine(devices: int, host_rate: int = 10**9, memory_bytes: int = 0) -> Machine:
    names = [f"gpu{number}" for number in range(devices)]
    return Machine(
        name="test",
        host=Host(optimizer_params_per_s=host_rate),
        devices=tuple(Device(name=name, memory_bytes=memory_bytes) for name in names),
        links=tuple(Link(a="host", b=name, bytes_per_s=50 * 10**9) for name in names),
    )


def test_an_uneven_head_costs_it_nothing_where_round_robin_waits() -> None:
    """Eight like layers and a head eight times as long, on two devices that hold half of them."""
    times = [(10**6, 10**6, 10**6)] * 8 + [(8 * 10**6,) * 3]
    trace = make_trace(times, param_bytes=10**6, grad_bytes=10**6, saved_bytes=5 * 10**6)
    small = machine(2, memory_bytes=40 * 10**6)
    ours, theirs = (
        roundel.simulate(trace, policy, microbatches=8, machine=small).metrics.step_s
        for policy in (LayerToLayer(), RoundRobin())
    )
    assert ours < 0.95 * theirs


def test_adding_up_two_devices_gradients_is_charged_with_the_update() -> None:
    trace = make_trace(4, param_bytes=2000, grad_bytes=2000)
    policy = LayerToLayer((2, 1), (1, 2, 1))
    host = {"optimizer_params_per_s": 10**9, "sum_params_per_s": 5 * 10**9}

    def longest(devices: int) -> int:
        shaped = machine(devices).model_copy(update={"host": Host(**host)})
        simulated = roundel.simulate(trace, policy, microbatches=4, machine=shaped).timeline
        updates = simulated.kind == KINDS.index("update")
        return int((simulated.end_ns - simulated.start_ns)[updates].max())

    # A thousand parameters: a microsecond to update, 200 ns for each further device's gradients.
    assert [longest(devices) for devices in (1, 2, 4)] == [1000, 1200, 1600]


def test_where_nothing_fits_one_layer_a_visit_is_what_is_refused() -> None:
    trace = make_trace(4, param_bytes=2000, saved_bytes=2000)
    shaped = machine(2, memory_bytes=3000)
    for policy in (LayerToLayer(), RoundRobin()):
        simulation = roundel.simulate(trace, policy, microbatches=4, machine=shaped)
        assert str(policy.cut(simulation.work)) == "1 1 1 / 1 1 1 1"
        assert not simulation.metrics.fits


def test_its_cut_has_small_stages_at_the_end_where_updates_cost() -> None:
    trace = make_trace([(10**6,) * 3] * 12, param_bytes=10**8, grad_bytes=10**8)
    slow = roundel.make_work(trace, microbatches=8, machine=machine(2, host_rate=2 * 10**9))
    cut = LayerToLayer().cut(slow)
    assert isinstance(cut, AsymmetricCut)
    assert cut.backward[-1] == 1


def test_it_must_recompute() -> None:
    with pytest.raises(InputError, match="layer-to-layer runs a layer's backward in another visit"):
        LayerToLayer(recompute="none").plan(make_work(4, 2, 4), 0)


def test_fewer_microbatches_than_devices_leave_some_without_work() -> None:
    plan = LayerToLayer((2, 1), (1, 2, 1)).plan(make_work(4, 3, 2), 0)
    assert sum(1 for ops in plan.devices if ops) == 2
