"""ProgramTables: what the engine looks up of a program, made once per program."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from ..policies.estimate import gone_before
from ..policies.lower_transit import IN_TRANSIT
from ..policies.program import LABEL_CODE, STATES, Program
from ..policies.visits import AT_A_TIME
from ..traces.timeline import COMPUTE_KINDS, KIND_CODE, KINDS
from .run import Before, before_of
from .store import Lifetimes

ACTIVATIONS, GRADIENTS, SAVED = "boundary activations", "boundary gradients", "saved activations"


class ProgramTables:
    """What the engine looks up of a program, made once per program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.before = before_of(program)
        self.lifetimes = Lifetimes.of(program)
        self.allocs = _by_alloc(program)
        self.splits = bool((program.kind == KIND_CODE["I"]).any())
        self.parts = _parts(program)
        last_ops = _last_ops(program)
        self.weights_end = _weights_end(program, last_ops)
        self.ungated = _ungated_uploads(program, self.parts, last_ops)
        self.weights_down, self.states_down = _ways_down(program)
        self.update_of = _update_of(program)
        returns = self.states_down.union(self.weights_down)
        self.gradients_of = _gradients_of(program, returns)
        self.feeds = _feeds(program, returns)
        self.loss_tasks = np.flatnonzero(
            (program.kind == KIND_CODE["F"]) & (program.stop == program.work.layers)
        ).tolist()
        self.visit_ends = _visit_ends(program, self.weights_end)
        uploads = np.flatnonzero(program.kind == KIND_CODE["upload"]).tolist()
        self.ends = _ends(program, returns)
        self.states_up = [task for task in uploads if task not in self.parts]

    @cached_property
    def first_before(self) -> Before:
        """`before` in a step that is the first with tensors of their shapes.

        Memory is taken on the host then for what comes down: slow. So that no more waits on a
        device for its way down than was planned, ops wait for what should have gone by then.
        """
        before = [[*waits] for waits in self.before]
        for transfer, op in gone_before(self.program):
            before[op].append(transfer)
        return before

    def after(self, earlier: "ProgramTables") -> dict[int, list[int]]:
        """Tasks of the step before that uploads of this one wait for.

        New weights and states come down beside it: what goes up of them waits, part for part. To
        keep within memory: within a step an upload waits for the end of the visit before the
        last one on its device; of a device's first two visits that is a visit of the step before.
        States of few layers at a time are on a device, likewise. And a layer's do not go up before
        they are down.
        """
        result: dict[int, list[int]] = defaultdict(list)
        for device, visits in self.ungated.items():
            ends = earlier.visit_ends.get(device, [])
            for number, uploads in enumerate(visits[:AT_A_TIME]):
                place = len(ends) - AT_A_TIME + number
                if place >= 0:
                    for upload in uploads:
                        result[upload].append(ends[place])
        for upload, waits in self._weights_after(earlier):
            result[upload] += waits
        down = {int(earlier.program.first[task]): task for task in earlier.states_down}
        downs = _by_device(earlier.program, earlier.states_down)
        for device, ups in _by_device(self.program, set(self.states_up)).items():
            for number, up in enumerate(ups):
                waits = downs.get(device, [])[-IN_TRANSIT:][number : number + 1]
                layer = int(self.program.first[up])
                result[up] = list({*waits, down[layer]} if layer in down else waits)
        return result

    def _weights_after(self, earlier: "ProgramTables") -> Iterator[tuple[int, list[int]]]:
        """(upload, what it waits for of the weights that came down in the step before)."""
        if self.program.rules.optimizer == "stale":
            return  # It reads older ones.
        down: dict[int, list[int]] = defaultdict(list)
        for task in sorted(earlier.weights_down):
            down[int(earlier.program.first[task])].append(task)
        for upload, parts in self.parts.items():
            tasks = down[int(self.program.first[upload])]
            if len(tasks) == parts:
                tasks = [tasks[int(self.program.part[upload])]]
            yield upload, tasks


def _by_alloc(program: Program) -> dict[int, set[tuple[str, int]]]:
    """(label, layer) of the buffers that each task makes, of those that pass between ops."""
    buffers = program.buffers
    result: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for label in (ACTIVATIONS, GRADIENTS, SAVED):
        rows = np.flatnonzero(buffers.label == LABEL_CODE[label])
        for task, layer in zip(
            buffers.alloc[rows].tolist(), buffers.layer[rows].tolist(), strict=True
        ):
            result[task].add((label, layer))
    return result


def _weight_rows(program: Program) -> Any:
    buffers = program.buffers
    is_weights = buffers.label == LABEL_CODE["weights"]
    return np.flatnonzero(is_weights & (buffers.alloc >= 0))


def _parts(program: Program) -> dict[int, int]:
    """How many parts the upload has that each weight upload task is a part of."""
    parts: dict[int, int] = {}
    for first in program.buffers.alloc[_weight_rows(program)].tolist():
        stop = first + 1
        while stop < len(program) and program.part[stop] > 0:
            stop += 1
        parts |= dict.fromkeys(range(first, stop), stop - first)
    return parts


def _last_ops(program: Program) -> dict[int, int]:
    """The last op that computes with it, by buffer of streamed weights."""
    buffers = program.buffers
    last: dict[int, int] = {}
    rows = set(_weight_rows(program).tolist())
    computes = [lane.kind == "compute" for lane in program.lanes]
    for buffer, task in zip(buffers.use_buffer.tolist(), buffers.use_task.tolist(), strict=True):
        if buffer in rows and computes[program.lane[task]]:
            last[buffer] = max(last.get(buffer, -1), task)
    return last


def _weights_end(program: Program, last_ops: dict[int, int]) -> dict[int, list[tuple[int, int]]]:
    """(device, layer) of the streamed weights that each op is the last to compute with."""
    buffers = program.buffers
    ends: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for buffer, task in last_ops.items():
        ends[task].append((int(buffers.pool[buffer]), int(buffers.layer[buffer])))
    return ends


def _update_of(program: Program) -> dict[tuple[int, int], int]:
    """The update on a device by (op, layer): the op is the last of the visit that it follows.

    Only where weights are streamed; resident ones stay for theirs.
    """
    if program.rules.weights == "resident":
        return {}
    is_update = program.kind[program.dep_after] == KIND_CODE["update"]
    follows = (
        is_update & _is_op(program, program.dep_before) & (program.source[program.dep_after] >= 0)
    )
    pairs = zip(
        program.dep_before[follows].tolist(), program.dep_after[follows].tolist(), strict=True
    )
    return {(op, int(program.first[update])): update for op, update in pairs}


def _is_op(program: Program, tasks: Any) -> Any:
    return np.isin(program.kind[tasks], [KIND_CODE[kind] for kind in COMPUTE_KINDS])


def _visit_ends(
    program: Program, weights_end: dict[int, list[tuple[int, int]]]
) -> dict[int, list[int]]:
    """The last op of each visit to each device, in order."""
    ends: dict[int, list[int]] = defaultdict(list)
    for task in program.lane_tasks.tolist():
        for device in {device for device, _ in weights_end.get(task, ())}:
            ends[device].append(task)
    return dict(ends)


def _ungated_uploads(
    program: Program, parts: dict[int, int], last_ops: dict[int, int]
) -> dict[int, list[list[int]]]:
    """By device and visit, in order, the weight uploads that wait for no op of their step."""
    gated = set(program.dep_after[_is_op(program, program.dep_before)].tolist())
    place = np.empty(len(program), dtype=np.int64)
    place[program.lane_tasks] = np.arange(len(program))
    visits: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for buffer, op in last_ops.items():
        first = int(program.buffers.alloc[buffer])
        for upload in range(first, first + parts[first]):
            if upload not in gated:
                visits[int(program.target[upload])][int(place[op])].append(upload)
    return {device: [found[key] for key in sorted(found)] for device, found in visits.items()}


def _by_device(program: Program, tasks: set[int]) -> dict[int, list[int]]:
    """Transfers between the host and a device, by the device, in the order of its lane."""
    result: dict[int, list[int]] = defaultdict(list)
    for task in program.lane_tasks.tolist():
        if task in tasks:
            result[max(int(program.source[task]), int(program.target[task]))].append(task)
    return dict(result)


def _gradients_of(program: Program, returns: set[int]) -> dict[int, list[tuple[int, int]]]:
    """(transfer, layer) of the gradients that each op completes and that leave its device.

    They go down, or where weights are streamed to the device that updates them.
    """
    result: dict[int, list[tuple[int, int]]] = defaultdict(list)
    leave = program.kind == KIND_CODE["download"]
    if program.rules.weights == "streamed":
        leave |= (program.kind == KIND_CODE["send"]) & (program.microbatch < 0)
    for row in np.flatnonzero(leave[program.dep_after]).tolist():
        before, after = int(program.dep_before[row]), int(program.dep_after[row])
        mine = program.source[before] == program.source[after]
        if after not in returns and mine:
            result[before].append((after, int(program.first[after])))
    return result


def _feeds(program: Program, returns: set[int]) -> list[tuple[int, int]]:
    """(task, layer) of the transfers that bring gradients to where they are summed.

    Earlier microbatches' first: so they come, and few wait for their turn.
    """
    ops = program.microbatch[program.dep_before] >= 0
    order: dict[int, int] = {}
    for row in np.flatnonzero(ops & (program.microbatch[program.dep_after] < 0)).tolist():
        before, after = int(program.dep_before[row]), int(program.dep_after[row])
        if KINDS[program.kind[after]] in ("download", "send") and after not in returns:
            order[after] = max(order.get(after, -1), int(program.microbatch[before]))
    tasks = sorted(order, key=lambda task: (order[task], task))
    return [(task, int(program.first[task])) for task in tasks]


def _ways_down(program: Program) -> tuple[dict[int, int], set[int]]:
    """Downloads of the weights that were updated on a device, and of their states.

    With each of the former in how many parts those weights come down.
    """
    download = program.kind == KIND_CODE["download"]
    states = np.flatnonzero(download & (program.part == STATES))
    is_after = download[program.dep_after] & np.isin(program.dep_after, states, invert=True)
    updates = program.kind[program.dep_before] == KIND_CODE["update"]
    weights = np.unique(program.dep_after[is_after & updates])
    parts = np.bincount(program.first[weights], minlength=program.work.layers)
    counts = parts[program.first[weights]].tolist()
    return dict(zip(weights.tolist(), counts, strict=True)), set(states.tolist())


def _ends(program: Program, returns: set[int]) -> list[int]:
    """Each lane's last task but for what updates leave to come down; there the next step starts."""
    ends = []
    for lane in range(len(program.lanes)):
        mine = [task for task in program.tasks_of(lane) if task not in returns]
        ends += mine[-1:]
    return ends
