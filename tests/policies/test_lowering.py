"""Plans in, lanes out: which transfers and updates there are, on which lane, in which order."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from roundel.policies.asymmetric import visit_ns
from roundel.policies.chunks import CHUNK_BYTES
from roundel.policies.layer_to_layer import LayerToLayer
from roundel.policies.lowering import lower
from roundel.policies.op import Op
from roundel.policies.plan import Place, Weights
from roundel.policies.program import LABEL_CODE, LABELS, STATES
from roundel.policies.round_robin import RoundRobin
from roundel.policies.table import OpTable
from roundel.policies.visits import Visits
from roundel.policies.work import Work
from roundel.sim.engine import simulate_program
from roundel.traces.timeline import KIND_CODE, KINDS

from ..costs import make_machine, make_trace, make_work
from .lanes import dependencies, lanes, tasks_on
from .test_plan import plan_of

BYTES = {
    "param_bytes": 4,
    "grad_bytes": 4,
    "optimizer_bytes": 24,
    "output_bytes": 8,
    "saved_bytes": 16,
}
TWO_DEVICES = ("0:1F0 0:1F1 0:1B0 0:1B1", "1:2F0 1:2B0 1:2F1 1:2B1")
TWO_ROUNDS = "0:1F0 1:2F0 1:2B0 0:1R0 0:1B0 0:1F1 1:2F1 1:2B1 0:1R1 0:1B1"

through_device = partial(plan_of, weights="streamed", optimizer_on="device", activations="host")
"""A plan whose states pass through the device."""
RECOMPUTED = (
    "0:1F0 0:1F1 0:1R0 0:1B0 0:1R1 0:1B1",
    "1:2F0 1:2B0 1:2F1 1:2B1",
)


def test_resident_weights_send_activations_and_gradients() -> None:
    program = lower([plan_of(*TWO_DEVICES)], make_work(2, 2, 2, **BYTES))
    assert lanes(program) == {
        "gpu0 compute": ["0:1F0", "0:1F1", "0:1B0", "0:1B1", "update 0"],
        "gpu0 peer": ["send 0m0>1", "send 0m1>1"],
        "gpu1 compute": ["1:2F0", "1:2B0", "1:2F1", "1:2B1", "update 1"],
        "gpu1 peer": ["send 0m0>0", "send 0m1>0"],
    }


def test_a_send_waits_for_its_op_and_is_waited_for() -> None:
    program = lower([plan_of(*TWO_DEVICES)], make_work(2, 2, 2, **BYTES))
    assert {("0:1F1", "send 0m1>1"), ("send 0m1>1", "1:2F1")} <= dependencies(program)
    assert {("1:2B0", "send 0m0>0"), ("send 0m0>0", "0:1B0")} <= dependencies(program)


def test_a_late_recompute_waits_for_the_gradient_an_early_one_does_not() -> None:
    work = make_work(2, 2, 2, **BYTES)
    late = dependencies(lower([plan_of(*RECOMPUTED, late_recompute=True)], work))
    early = dependencies(lower([plan_of(*RECOMPUTED)], work))
    assert ("send 0m0>0", "0:1R0") in late
    assert ("send 0m0>0", "0:1R0") not in early
    assert ("send 0m0>0", "0:1B0") in early


def test_streamed_weights_go_up_before_a_visit_and_gradients_down_after_it() -> None:
    plan = plan_of(
        "0:1F0 0:1F1 1:2F0 1:2B0 1:2F1 1:2B1 0:1R0 0:1B0 0:1R1 0:1B1",
        weights="streamed",
        optimizer_on="host",
        activations="host",
    )
    assert lanes(lower([plan], make_work(2, 1, 2, **BYTES))) == {
        "gpu0 compute": [
            "0:1F0",
            "0:1F1",
            "1:2F0",
            "1:2B0",
            "1:2F1",
            "1:2B1",
            "0:1R0",
            "0:1B0",
            "0:1R1",
            "0:1B1",
        ],
        "gpu0 h2d": ["upload 0", "upload 1", "upload 0"],
        "gpu0 d2h": ["download 1", "download 0"],
        "host optimizer": ["update 1", "update 0"],
    }


IN_PIECES = (
    "0:1F0 1:2F0 0:2F1 2:3F0 2:3B0 2:3F1 2:3B1 1:2R0 1:2B0 1:2R1 1:2B1 0:1R0 0:1B0 0:1R1 0:1B1"
)


def test_a_visit_may_begin_with_forwards_of_some_of_its_layers() -> None:
    """It is one visit, whose ops wait for the layers that they work on."""
    rules = {"weights": "streamed", "optimizer_on": "host", "activations": "host"}
    program = lower([plan_of(IN_PIECES, **rules)], make_work(3, 1, 2, **BYTES))
    assert lanes(program)["gpu0 h2d"][:3] == ["upload 0", "upload 1", "upload 2"]
    waits = [(name, op) for name, op in dependencies(program) if name.startswith("upload")]
    assert {op for name, op in waits if name == "upload 1"} == {"1:2F0", "1:2R0"}
    assert {op for name, op in waits if name == "upload 0"} == {"0:1F0", "0:1R0"}
    # The visit after the next one waits for its end.
    assert ("0:2F1", "upload 1") in dependencies(program)
    weights = program.buffers.label == LABEL_CODE["weights"]
    assert np.count_nonzero(weights & (program.buffers.pool == 0)) == 5


def test_pieces_wait_for_their_own_layers_updates_of_the_step_before() -> None:
    rules = {"weights": "streamed", "optimizer_on": "host", "activations": "host"}
    plan = plan_of(IN_PIECES, **rules)
    found = dependencies(lower([plan, plan], make_work(3, 1, 2, **BYTES)))
    waits = {(update, op) for update, op in found if update.startswith("update") and "F" in op}
    assert waits == {("update 0", "0:1F0"), ("update 1", "1:2F0"), ("update 2", "2:3F0")}


@pytest.mark.parametrize(
    ("ops", "visits"),
    [
        ("0:1F0 1:2F0 0:2F1", ["0:2"]),
        ("0:1F0 0:1F1 0:2F2", ["0:2"]),
        # A forward of other layers ends a visit.
        ("0:1F0 0:1F1 1:2F0 1:3F1", ["0:1", "1:3"]),
        # Only forwards begin another's visit, and only a forward of all is begun.
        ("0:1F0 0:1F1 1:2F0 1:2F1 1:3R0", ["0:1", "1:2", "1:3"]),
        ("0:1F0 0:1B0 0:1F1 0:2F2", ["0:1", "0:2"]),
        ("0:2F0 0:1F1 1:2F1", ["0:2", "0:1", "1:2"]),
    ],
)
def test_what_begins_a_visit(ops: str, visits: list[str]) -> None:
    rules = {"weights": "streamed", "optimizer_on": "host", "activations": "host"}
    found = Visits.of(OpTable.of([plan_of(ops, **rules)], make_work(3, 1, 3, **BYTES)))
    assert [
        f"{first}:{stop}" for first, stop in zip(found.first, found.stop, strict=True)
    ] == visits


def test_uploads_wait_for_room_and_for_the_update_of_the_step_before() -> None:
    plan = plan_of(
        "0:1F0 1:2F0 1:2B0 0:1R0 0:1B0",
        weights="streamed",
        optimizer_on="host",
        activations="host",
    )
    work = make_work(2, 1, 1, **BYTES)
    assert ("0:1F0", "upload 0") in dependencies(lower([plan], work))
    assert ("update 0", "upload 0") not in dependencies(lower([plan], work))
    assert ("update 0", "upload 0") in dependencies(lower([plan, plan], work))
    assert ("update 1", "upload 1") in dependencies(lower([plan, plan], work))


def test_a_stale_step_uses_the_update_before_the_last() -> None:
    plan = plan_of(
        "0:1F0 1:2F0 1:2B0 0:1R0 0:1B0",
        weights="streamed",
        optimizer="stale",
        optimizer_on="host",
        activations="host",
    )
    work = make_work(2, 1, 1, **BYTES)
    assert ("update 0", "upload 0") not in dependencies(lower([plan, plan], work))
    program = lower([plan, plan, plan], work)
    steps = {
        (int(program.step[before]), int(program.step[after]))
        for before, after in zip(program.dep_before, program.dep_after, strict=True)
        if program.source[after] == -1 and program.source[before] == program.target[before] == -1
    }
    assert steps == {(0, 2)}


def test_activations_wait_on_the_host_for_a_recompute_elsewhere() -> None:
    plan = plan_of(
        "0:1F0 0:1F1 1:2R0 1:2B0 1:2R1 1:2B1",
        "1:2F0 1:2F1 2:3F0 2:3B0 2:3F1 2:3B1 0:1R0 0:1B0 0:1R1 0:1B1",
        weights="streamed",
        optimizer_on="host",
        activations="host",
    )
    rows = lanes(lower([plan], make_work(3, 2, 2, output_bytes=8)))
    assert rows["gpu0 d2h"] == ["offload 0m0", "offload 0m1"]
    assert rows["gpu0 h2d"] == ["fetch 0m0", "fetch 0m1"]
    assert rows["gpu0 peer"] == ["send 0m0>1", "send 0m1>1", "send 0m0>1", "send 0m1>1"]


def test_activations_on_the_device_are_sent_where_the_recompute_is() -> None:
    plan = plan_of(
        "0:1F0 1:2R0 1:2B0",
        "1:2F0 2:3F0 2:3B0 0:1R0 0:1B0",
        weights="streamed",
        optimizer_on="host",
        activations="device",
    )
    rows = lanes(lower([plan], make_work(3, 2, 1, output_bytes=8)))
    assert rows["gpu0 peer"] == ["send 0m0>1", "send 0m0>1"]
    assert "gpu0 d2h" not in rows


def test_what_the_next_stage_waits_for_is_sent_before_what_a_recompute_will_need() -> None:
    plan = plan_of(
        "0:2F0",
        "1:2R0 1:2B0 0:1R0 0:1B0",
        "2:3F0 2:3B0",
        weights="streamed",
        optimizer_on="host",
        activations="device",
    )
    rows = lanes(lower([plan], make_work(3, 3, 1, output_bytes=8)))
    assert rows["gpu0 peer"] == ["send 1m0>2", "send 0m0>1"]


def test_large_uploads_go_in_chunks_and_a_fetch_passes_between_them() -> None:
    plan = plan_of(
        "0:1F0 0:1F1 1:2F0 1:2F1 2:3F0 2:3B0 2:3F1 2:3B1 "
        "1:2R0 1:2B0 1:2R1 1:2B1 0:1R0 0:1B0 0:1R1 0:1B1",
        weights="streamed",
        optimizer_on="host",
        activations="host",
    )
    work = make_work(3, 1, 2, output_bytes=8, param_bytes=2 * CHUNK_BYTES + 1)
    program = lower([plan], work)
    assert lanes(program)["gpu0 h2d"] == (
        [
            "upload 0",
            "upload 0+1",
            "upload 0+2",
            "upload 1",
            "upload 1+1",
            "upload 1+2",
            "upload 2",
            "upload 2+1",
            "fetch 0m0",
            "upload 2+2",
            "upload 1",
            "fetch 0m1",
            "upload 1+1",
            "upload 1+2",
            "upload 0",
            "upload 0+1",
            "upload 0+2",
        ]
    )
    sizes = program.nbytes[program.lane_tasks[program.lane_start[1] :][:3]].tolist()
    assert sizes == [CHUNK_BYTES, CHUNK_BYTES, 1]


def test_resident_weights_updated_on_the_host_come_back_before_the_next_step() -> None:
    plan = plan_of(*TWO_DEVICES, optimizer_on="host")
    program = lower([plan, plan], make_work(2, 2, 2, **BYTES))
    rows = lanes(program)
    assert rows["gpu0 d2h"] == ["download 0", "download 0"]
    assert rows["gpu0 h2d"] == ["upload 0", "upload 0"]
    assert rows["host optimizer"] == ["update 1", "update 0", "update 1", "update 0"]
    assert ("upload 0", "0:1F0") in dependencies(program)


def test_the_loss_comes_before_the_backward_that_starts_from_it() -> None:
    plan = plan_of(
        "0:1F0 1:2R0 1:2B0",
        "1:2F0 0:1R0 0:1B0",
        weights="streamed",
        optimizer_on="host",
        activations="host",
    )
    assert ("1:2F0", "1:2B0") in dependencies(lower([plan], make_work(2, 2, 1, **BYTES)))


def test_what_waits_on_the_host_is_fetched_for_the_next_visit_at_most() -> None:
    """With one microbatch a visit has two ops; four ops ahead would be the visit after it."""
    policy = RoundRobin((1, 1, 1), (1, 1, 1, 1), activations="host")
    work = make_work(4, 1, 1, **BYTES)
    before = dependencies(lower([policy.plan(work, 0)], work))
    assert {("2:3F0", "fetch 1m0"), ("3:4B0", "fetch 0m0")} <= before


def test_room_for_a_layer_is_taken_whole_with_its_first_chunk() -> None:
    policy = RoundRobin((1,), (1, 1))
    work = make_work(2, 1, 1, **{**BYTES, "param_bytes": 3 * CHUNK_BYTES})
    program = lower([policy.plan(work, 0)], work)
    buffers = program.buffers
    rows = np.flatnonzero((buffers.label == LABELS.index("weights")) & (buffers.alloc >= 0))
    # Two visits forward, one of them backward too, and one backward.
    assert buffers.nbytes[rows].tolist() == [3 * CHUNK_BYTES] * 3
    assert program.part[buffers.alloc[rows]].tolist() == [0] * 3
    assert np.count_nonzero(program.kind == KIND_CODE["upload"]) == 9


def test_states_pass_through_the_device_a_few_layers_at_a_time() -> None:
    plan = through_device("0:3F0 0:3B0")
    machine = make_machine(1, memory_bytes=32 * BYTES["optimizer_bytes"] - 1)
    program = lower([plan], Work(make_trace(3, **BYTES), machine, 1))
    rows = lanes(program)
    assert rows["gpu0 compute"] == ["0:3F0", "0:3B0"]
    assert rows["gpu0 h2d"] == [f"upload {layer}" for layer in (0, 1, 2)]
    # Nothing that an op waits for is behind them.
    assert rows["gpu0 optimizer"] == [f"upload {layer}" for layer in (2, 1, 0)]
    # The last weights, which the next step waits for, are not behind the state before them.
    assert rows["gpu0 d2h"] == [
        *("update 2", "download 2", "download 2 states"),
        *("update 1", "download 1"),
        *("update 0", "download 0"),
        *("download 1 states", "download 0 states"),
    ]
    before = dependencies(program)
    assert {("download 2 states", "upload 0"), ("0:3B0", "update 2")} <= before
    assert not {("download 1 states", "upload 0"), ("download 2", "upload 0")} & before


@pytest.mark.parametrize("memory_bytes", [32 * BYTES["optimizer_bytes"], 0])
def test_states_pass_through_with_one_more_where_they_are_small(memory_bytes: int) -> None:
    plan = through_device("0:4F0 0:4B0")
    machine = make_machine(1, memory_bytes=memory_bytes)
    before = dependencies(lower([plan], Work(make_trace(4, **BYTES), machine, 1)))
    assert {("download 3 states", "upload 0"), ("0:4B0", "upload 1")} <= before
    assert not {("download 2 states", "upload 0"), ("download 3 states", "upload 1")} & before


def test_the_next_step_waits_for_new_weights_but_not_for_states_on_their_way_down() -> None:
    plan = through_device("0:3F0 0:3B0")
    program = lower([plan, plan], make_work(3, 1, 1, **BYTES))
    down, up = (np.flatnonzero(program.kind == KIND_CODE[kind]) for kind in ("download", "upload"))
    weights, states = (
        {int(program.first[each]): each for each in down if tells(each)}
        for tells in (
            lambda task: program.part[task] == 0 and program.step[task] == 0,
            lambda task: program.part[task] == STATES and program.step[task] == 0,
        )
    )
    waits = set(zip(program.dep_before.tolist(), program.dep_after.tolist(), strict=True))
    later = [task for task in up if program.step[task] == 1]
    of_weights = [task for task in later if program.lanes[program.lane[task]].kind == "h2d"]
    of_states = [task for task in later if program.lanes[program.lane[task]].kind == "optimizer"]
    assert len(of_weights) == len(of_states) == 3
    for task in of_weights:
        assert (weights[int(program.first[task])], task) in waits
        assert not any((state, task) in waits for state in states.values())
    # The first come when their visit has let go of what it saved, in this step too.
    (backward,) = np.flatnonzero((program.kind == KIND_CODE["B"]) & (program.step == 1))
    assert all((backward, task) in waits for task in of_states)
    assert all((states[int(program.first[task])], task) in waits for task in of_states)


def test_last_weights_come_down_in_parts_that_go_up_again_each_when_it_is_down() -> None:
    plan = through_device("0:3F0 0:3B0")
    work = make_work(3, 1, 1, **{**BYTES, "param_bytes": 2 * CHUNK_BYTES + 1})
    program = lower([plan, plan], work)
    down, up = (np.flatnonzero(program.kind == KIND_CODE[kind]) for kind in ("download", "upload"))
    d2h = tasks_on(program, "gpu0 d2h")
    mine = [task for task in d2h if program.step[task] == 0 and task in down]
    assert [
        (int(program.first[task]), int(program.part[task]), int(program.nbytes[task]))
        for task in mine
    ] == [
        (2, 0, 2 * CHUNK_BYTES + 1),
        (2, STATES, 24),
        (1, 0, 2 * CHUNK_BYTES + 1),
        *((0, 0, CHUNK_BYTES), (0, 1, CHUNK_BYTES), (0, 2, 1)),
        *((1, STATES, 24), (0, STATES, 24)),
    ]
    waits = set(zip(program.dep_before.tolist(), program.dep_after.tolist(), strict=True))
    later = [task for task in up if program.step[task] == 1 and program.nbytes[task] != 24]
    assert len(later) == 9
    for task in later:
        layer, part = int(program.first[task]), int(program.part[task])
        waited = {
            int(program.part[each])
            for each in mine
            if (each, task) in waits and program.first[each] == layer
        }
        assert waited == ({part} if layer == 0 else {0})
    # An op reads all of it, and the visit's copy stays until all is down.
    (last,) = (each for each in mine if program.first[each] == 0 and program.part[each] == 2)
    (first,) = np.flatnonzero((program.kind == KIND_CODE["F"]) & (program.step == 1))
    assert (last, first) in waits
    freed = {
        task
        for buffer, task in zip(
            program.buffers.use_buffer.tolist(), program.buffers.use_task.tolist(), strict=True
        )
        if program.buffers.layer[buffer] == 0
        and program.buffers.label[buffer] == LABEL_CODE["weights"]
    }
    assert last in freed


def test_beside_a_stale_step_states_come_down_in_turn() -> None:
    """There is no end of a step where nothing else goes on."""
    plan = through_device("0:3F0 0:3B0", optimizer="stale")
    rows = lanes(lower([plan], make_work(3, 1, 1, **BYTES)))
    assert rows["gpu0 d2h"] == [
        row
        for layer in (2, 1, 0)
        for row in (f"update {layer}", f"download {layer}", f"download {layer} states")
    ]


@pytest.mark.parametrize("steps", [1, 2])
def test_each_device_has_an_end_of_each_step(steps: int) -> None:
    policy = RoundRobin((1, 1, 1), (1, 1, 1, 1), optimizer_on="device")
    work = make_work(4, 2, 4, **BYTES)
    program = lower([policy.plan(work, step) for step in range(steps)], work)
    for lane in ("gpu0 d2h", "gpu1 d2h"):
        for step in range(steps):
            tasks = [
                task
                for task in tasks_on(program, lane)
                if program.step[task] == step
                and KINDS[program.kind[task]] in ("update", "download")
            ]
            first, last = (int(program.first[task]) for task in tasks[-2:])
            assert first != last
            assert [int(program.part[task]) for task in tasks[-2:]] == [STATES, STATES]
            assert {int(program.first[task]) for task in tasks[-6:]} == {first, last}


def test_a_state_is_on_the_device_until_it_is_down_with_what_waited_for_it() -> None:
    plan = through_device(TWO_ROUNDS)
    program = lower([plan], make_work(2, 1, 2, **BYTES))
    buffers = program.buffers
    mine = np.flatnonzero((buffers.label == LABEL_CODE["optimizer state"]) & (buffers.pool == 0))
    assert sorted(buffers.layer[mine].tolist()) == [0, 1]
    # The first round's gradients came up with it.
    assert buffers.nbytes[mine].tolist() == [24 + 4] * 2
    for buffer in mine.tolist():
        uses = buffers.use_task[buffers.use_buffer == buffer].tolist()
        states = [task for task in uses if program.part[task] == STATES]
        assert [int(program.first[task]) for task in states] == [int(buffers.layer[buffer])]


@pytest.mark.parametrize(("room", "lane"), [(24, "gpu0 d2h"), (25, "gpu0 compute")])
def test_an_update_that_needs_much_room_takes_its_turn_among_the_ops(room: int, lane: str) -> None:
    plan = through_device("0:3F0 0:3B0")
    program = lower([plan], make_work(3, 1, 1, **BYTES, update_workspace_bytes=room))
    rows = lanes(program)
    updates = [f"update {layer}" for layer in (2, 1, 0)]
    assert [row for row in rows[lane] if "update" in row] == updates
    assert ("update 2", "download 2") in dependencies(program)


def test_of_visits_at_the_same_time_one_updates_in_turns_and_gets_the_others_gradients() -> None:
    policy = LayerToLayer((1, 1, 1), (1, 1, 1, 1), optimizer_on="device")
    work = make_work(4, 2, 4, **BYTES)
    program = lower([policy.plan(work, 0)], work)
    rows = lanes(program)
    assert [row for row in rows["gpu0 d2h"] if "update" in row] == ["update 2", "update 0"]
    assert [row for row in rows["gpu1 d2h"] if "update" in row] == ["update 3", "update 1"]
    sends = np.flatnonzero(program.kind == KIND_CODE["send"])
    ends = zip(program.first[sends], program.source[sends], program.target[sends], strict=True)
    assert sorted(map(tuple, ends)) == [(0, 1, 0), (1, 0, 1), (2, 1, 0), (3, 0, 1)]
    assert program.nbytes[sends].tolist() == [4] * 4
    downs = program.nbytes[program.kind == KIND_CODE["download"]]
    # Weights, and states behind them; no gradient takes the host's way.
    assert sorted(downs.tolist()) == [4] * 4 + [24] * 4
    # A gradient comes when the visit there has let go of what it saved.
    before = dependencies(program)
    assert {("3:4B1", "send 3>1"), ("3:4B3", "send 3>1"), ("send 3>1", "update 3")} <= before


@pytest.mark.parametrize("weights", ["streamed", "resident"])
def test_an_update_on_a_device_has_room_while_it_runs(weights: Weights) -> None:
    plan = plan_of("0:3F0 0:3B0", weights=weights, optimizer_on="device")
    work = make_work(3, 1, 1, **BYTES)
    layers = [
        each.model_copy(update={"update_workspace_bytes": 1000 + number})
        for number, each in enumerate(work.trace.layers)
    ]
    trace = work.trace.model_copy(update={"layers": tuple(layers)})
    program = lower([plan], replace(work, trace=trace))
    buffers = program.buffers
    rooms = np.flatnonzero(buffers.nbytes >= 1000)
    assert [LABELS[code] for code in buffers.label[rooms]] == ["workspace"] * 3
    assert buffers.pool[rooms].tolist() == [0] * 3
    assert sorted(buffers.nbytes[rooms].tolist()) == [1000, 1001, 1002]
    for room in rooms.tolist():
        (user,) = buffers.use_task[buffers.use_buffer == room].tolist()
        assert user == buffers.alloc[room]
        assert program.kind[user] == KIND_CODE["update"]
        assert program.first[user] == buffers.nbytes[room] - 1000


@pytest.mark.parametrize("place", ["host", "device"])
def test_updates_of_a_layer_come_in_the_order_of_the_steps(place: Place) -> None:
    """Stale steps on several devices at the same time: a later one may have its gradients first."""
    policy = RoundRobin((), (1,), optimizer="stale", optimizer_on=place)
    work = Work(make_trace(1, **BYTES), make_machine(3, params_per_s=10**9), 1)
    program = lower([policy.plan(work, step) for step in range(6)], work)
    timeline = simulate_program(program, "test")
    updates = np.flatnonzero(program.kind == KIND_CODE["update"])
    updates = updates[np.argsort(program.step[updates])]
    assert program.step[updates].tolist() == list(range(6))
    ends = timeline.end_ns[updates]
    if place == "device":
        # The state must be down before it goes up again, to whichever device.
        follows = np.isin(program.dep_before, updates)
        downs = program.dep_after[follows]
        ends = timeline.end_ns[downs[np.argsort(program.step[downs])]]
    assert (timeline.start_ns[updates[1:]] >= ends[:-1]).all()


def test_gradients_of_earlier_rounds_wait_on_the_host_for_the_update_on_the_device() -> None:
    plan = through_device(TWO_ROUNDS)
    program = lower([plan], make_work(2, 1, 2, **BYTES))
    assert lanes(program)["gpu0 compute"][5:] == ["0:1F1", "1:2F1", "1:2B1", "0:1R1", "0:1B1"]
    d2h = program.tasks_of(2)
    assert [(int(program.first[task]), int(program.nbytes[task])) for task in d2h] == [
        *((1, 4), (0, 4)),  # gradients
        *((1, 0), (1, 4)),  # an update, then the new weights
        *((0, 0), (0, 4)),
        *((1, 24), (0, 24)),  # the last states
    ]
    ups = program.tasks_of(4)
    # States with the first round's gradients.
    assert program.nbytes[ups].tolist() == [24 + 4, 24 + 4]


def test_clipping_waits_for_every_gradient() -> None:
    plan = plan_of(*TWO_DEVICES, clip=True)
    program = lower([plan], make_work(2, 2, 2, **BYTES))
    assert lanes(program)["host optimizer"] == ["norm 0"]
    assert {("0:1B1", "norm 0"), ("1:2B1", "norm 0")} <= dependencies(program)
    assert {("norm 0", "update 0"), ("norm 0", "update 1")} <= dependencies(program)


def test_a_frozen_layer_has_no_gradient_and_no_update() -> None:
    work = make_work(2, 2, 2, **BYTES)
    frozen = {"grad_bytes": 0, "optimizer_bytes": 0}
    layers = (work.trace.layers[0].model_copy(update=frozen), work.trace.layers[1])
    work = replace(work, trace=work.trace.model_copy(update={"layers": layers}))
    rows = lanes(lower([plan_of(*TWO_DEVICES, optimizer_on="host")], work))
    assert "gpu0 d2h" not in rows
    assert rows["gpu1 d2h"] == ["download 1"]
    assert rows["host optimizer"] == ["update 1"]


def test_a_trace_of_times_only_still_steps_synchronously() -> None:
    plan = plan_of(
        "0:1F0 1:2F0 1:2B0 0:1R0 0:1B0",
        weights="streamed",
        optimizer_on="host",
        activations="host",
    )
    program = lower([plan, plan], make_work(2, 1, 1))
    assert lanes(program)["host optimizer"] == ["update 1", "update 0"] * 2
    assert "gpu0 d2h" not in lanes(program)
    assert {("update 0", "0:1F0"), ("update 1", "1:2F0")} <= dependencies(program)


def test_a_forward_that_a_recompute_follows_takes_its_own_time() -> None:
    work = make_work(3, 1, 1, forward_only_ns=4, recompute_ns=9)
    work = replace(work, machine=make_machine(1))
    plan = plan_of("0:2F0 2:3F0 2:3B0 0:2R0 0:2B0")
    program = lower([plan], work)
    of_ops = program.duration_ns[:5].tolist()
    assert of_ops == [2 * 4, 10, 20, 2 * 9, 2 * 20]
    free = replace(work, trace=make_trace(3, recompute_ns=9))
    assert lower([plan], free).duration_ns[:5].tolist() == [2 * 10, 10, 20, 2 * 9, 2 * 20]


def test_a_recompute_takes_less_of_the_layer_behind_which_its_backward_comes() -> None:
    """Not of the model's last layer, whose output the loss reads."""
    trace = make_trace(3, recompute_ns=9, recompute_last_ns=5)
    work = Work(trace, make_machine(1), 1)
    assert work.spared_ns == [4, 4, 0]
    for plan, wanted in (
        ("0:2F0 2:3F0 2:3R0 2:3B0 0:2R0 0:2B0", {(0, 2): 9 + 5, (2, 3): 9}),
        ("0:3F0 0:3R0 0:3B0", {(0, 3): 27}),
        ("0:1F0 1:3F0 1:3R0 1:3B0 0:1R0 0:1B0", {(0, 1): 5, (1, 3): 18}),
    ):
        program = lower([plan_of(plan)], work)
        again = np.flatnonzero(program.kind == KIND_CODE["R"])
        ranges = zip(program.first[again].tolist(), program.stop[again].tolist(), strict=True)
        assert dict(zip(ranges, program.duration_ns[again].tolist(), strict=True)) == wanted
        for (first, stop), time_ns in wanted.items():
            assert (
                work.op_ns(Op("R", first, stop, 0)) == visit_ns(work, "R", first, stop) == time_ns
            )
            assert visit_ns(work, "RB", first, stop) == time_ns + 20 * (stop - first)
    slower = Work(make_trace(2, recompute_last_ns=12), make_machine(1), 1)
    assert slower.spared_ns == [0, 0]  # Of noise.
