"""ProgramBuilder: collects tasks, dependencies and buffers in columns while a plan is lowered."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..traces.timeline import KIND_CODE, LANE_KINDS, Ints, Lane, LaneKind
from .plan import Plan
from .program import HOST, LABEL_CODE, Buffers, Program
from .work import Work

TASK_COLUMNS = {
    "kind": np.uint8,
    "lane": np.int16,
    "first": np.int32,
    "stop": np.int32,
    "microbatch": np.int32,
    "step": np.int32,
    "part": np.int32,
    "nbytes": np.int64,
    "duration_ns": np.int64,
    "source": np.int16,
    "target": np.int16,
    "key": np.int32,
}


class ProgramBuilder:
    """Grows a Program batch by batch.

    Every task has a key, its place in time among the ops: not before any op that it depends on
    and before any op that depends on it. Lanes run in order of (key, task number). Together with
    dependencies that go from lower to higher task numbers among transfers and updates, this makes
    a deadlock impossible.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.lanes = lanes_of(work.devices)
        self._number = {lane: number for number, lane in enumerate(self.lanes)}
        self._count = 0
        self._tasks: dict[str, list[NDArray[np.integer]]] = {name: [] for name in TASK_COLUMNS}
        self._deps: list[tuple[Ints, Ints]] = []
        self._buffers: list[tuple[NDArray[np.integer], ...]] = []
        self._buffer_count = 0
        self._uses: list[tuple[Ints, Ints]] = []

    def tasks(self, count: int, **columns: ArrayLike) -> Ints:
        """Add `count` tasks; a column is an array or one value for all. Returns their numbers."""
        for name, dtype in TASK_COLUMNS.items():
            value = np.asarray(columns.get(name, 0))
            self._tasks[name].append(np.broadcast_to(value, (count,)).astype(dtype))
        numbers = np.arange(self._count, self._count + count)
        self._count += count
        return numbers

    def transfers(self, kind: str, lane: LaneKind, device: Ints, **columns: ArrayLike) -> Ints:
        """Add one transfer per entry of `device`, on that device's lane: by d2h down, else up."""
        ends: dict[str, ArrayLike] = {"source": HOST, "target": device}
        if lane == "d2h":
            ends = {"source": device, "target": HOST}
        lanes = self.lane(device, lane)
        return self.tasks(
            len(device), **{"kind": KIND_CODE[kind], "lane": lanes, **ends, **columns}
        )

    def sends(self, source: Ints, target: Ints, **columns: ArrayLike) -> Ints:
        """Add one transfer from device to device per entry, on the source's lane."""
        return self.tasks(
            len(source),
            kind=KIND_CODE["send"],
            lane=self.lane(source, "peer"),
            source=source,
            target=target,
            **columns,
        )

    def lane(self, device: Ints, kind: LaneKind) -> Ints:
        """Lane numbers of one kind on the devices."""
        of_kind = [self._number[Lane(number, kind)] for number in range(self.work.devices)]
        return np.array(of_kind)[device]

    @property
    def host_lane(self) -> int:
        """Number of the host's optimizer lane."""
        return self._number[Lane(HOST, "optimizer")]

    def depend(self, before: Ints, after: Ints) -> None:
        """`before[i]` must be done when `after[i]` starts; pairs with a -1 are left out."""
        real = (before >= 0) & (after >= 0)
        self._deps.append((before[real].astype(np.int32), after[real].astype(np.int32)))

    def buffers(
        self,
        label: str,
        layer: ArrayLike,
        pool: ArrayLike,
        nbytes: Ints,
        alloc: ArrayLike,
        *uses: Ints,
    ) -> Ints:
        """Add one buffer per entry of `nbytes`, freed when the tasks in `uses` are done.

        A use of -1 is none. Buffers of no bytes are left out; returns the numbers, -1 for those.
        """
        real = np.flatnonzero(nbytes > 0)
        columns = [
            np.broadcast_to(np.asarray(value), nbytes.shape)[real] for value in (pool, layer, alloc)
        ]
        numbers = np.full(len(nbytes), -1, dtype=np.int64)
        numbers[real] = np.arange(self._buffer_count, self._buffer_count + len(real))
        self._buffer_count += len(real)
        code = np.full(len(real), LABEL_CODE[label], dtype=np.uint8)
        self._buffers.append(
            (
                columns[0].astype(np.int16),
                code,
                columns[1].astype(np.int32),
                nbytes[real],
                columns[2].astype(np.int32),
            )
        )
        for use in uses:
            self.use(numbers, use)
        return numbers

    def use(self, buffers: Ints, tasks: Ints) -> None:
        """Keep `buffers[i]` until `tasks[i]` is done; pairs with a -1 are left out."""
        real = (buffers >= 0) & (tasks >= 0)
        self._uses.append((buffers[real].astype(np.int32), tasks[real].astype(np.int32)))

    def build(self, rules: Plan, steps: int) -> Program:
        """The finished program. The builder is used up by it."""
        columns = {name: np.concatenate(self._tasks.pop(name)) for name in TASK_COLUMNS}
        lane = columns["lane"]
        lane_tasks = np.lexsort((columns.pop("key"), lane)).astype(np.int32)
        lane_start = np.searchsorted(lane[lane_tasks], np.arange(len(self.lanes) + 1))
        before, after = _pairs(self._deps)
        held = (np.concatenate(parts) for parts in zip(*self._buffers, strict=True))
        pool, label, layer, nbytes, alloc = held
        buffers = Buffers(pool, label, layer, nbytes, alloc, *_pairs(self._uses))
        return Program(
            work=self.work,
            rules=rules,
            steps=steps,
            lanes=self.lanes,
            lane_tasks=lane_tasks,
            lane_start=lane_start,
            dep_before=before,
            dep_after=after,
            buffers=buffers,
            **columns,
        )


def lanes_of(devices: int) -> tuple[Lane, ...]:
    on_devices = [Lane(device, kind) for device in range(devices) for kind in LANE_KINDS]
    return (*on_devices, Lane(HOST, "optimizer"))


def _pairs(batches: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    left, right = (np.concatenate(side) for side in zip(*batches, strict=True))
    batches.clear()
    return left, right
