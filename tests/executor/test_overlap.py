"""A stale step begins while the one before it ends, within the same memory."""

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roundel
from roundel.executor import engine
from roundel.executor.program_tables import ProgramTables
from roundel.executor.transit import Transit
from roundel.policies import chunks
from roundel.policies.lowering import lower
from roundel.policies.streamed import Streamed
from roundel.traces.timeline import KINDS

from ..costs import make_machine, make_work
from . import toy

mse = nn.functional.mse_loss
Spans = list[tuple[int, str, float, float]]

POLICIES = [
    roundel.RoundRobin(**toy.CUTS, optimizer="stale"),
    roundel.RoundRobin(**toy.CUTS, optimizer="stale", round_size=2),
    roundel.LayerToLayer(**toy.CUTS, optimizer="stale"),
]


def watched(
    policy: roundel.Policy,
    layers: list[nn.Module],
    look: Callable[[Any], None] = lambda engine: None,
    **options: Any,
) -> Spans:
    """(step, kind, start, end) of the compute tasks of four steps."""
    spans: Spans = []
    with toy.make(layers, policy, **options) as trainer:

        def around(run: Any) -> Callable[[int], None]:
            engine = run.__self__

            def timed(task: int) -> None:
                kind = KINDS[engine._program.kind[task]]
                start = time.perf_counter()
                if kind in ("F", "R", "B"):
                    time.sleep(0.002)
                look(engine)
                run(task)
                if kind in ("F", "R", "B"):
                    spans.append((engine._step, kind, start, time.perf_counter()))

            return timed

        trainer._around = around
        for batch in toy.vectors(4):
            trainer.step(*batch)
    return spans


def begins_before_the_last_one_ends(spans: Spans) -> list[bool]:
    starts = [min(start for step, _, start, _ in spans if step == number) for number in range(4)]
    ends = [max(end for step, _, _, end in spans if step == number) for number in range(4)]
    return [start < end for start, end in zip(starts[1:], ends[:-1], strict=True)]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_stale_steps_overlap(policy: roundel.Policy) -> None:
    assert any(begins_before_the_last_one_ends(watched(policy, toy.blocks())))


def test_synchronous_steps_do_not() -> None:
    spans = watched(roundel.RoundRobin(**toy.CUTS), toy.blocks())
    assert not any(begins_before_the_last_one_ends(spans))


def test_steps_that_draw_random_numbers_do_not() -> None:
    """Who draws between two steps would else draw what a layer's recompute is to draw again."""
    spans = watched(POLICIES[0], toy.blocks(dropout=0.5))
    assert not any(begins_before_the_last_one_ends(spans))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_no_more_than_two_visits_weights_are_on_a_device(policy: Streamed) -> None:
    most = [0, 0]

    def look(engine: Any) -> None:
        for number, weights in enumerate(engine._machinery.weights):
            held = sum(len(copies) for copies in list(weights._copies.values()))
            most[number] = max(most[number], held)

    watched(policy, toy.blocks(), look)
    # Visits have two layers or three.
    assert max(most) <= 6


@pytest.mark.parametrize("optimizer", ["sync", "stale"])
@pytest.mark.parametrize("policy", [roundel.RoundRobin, roundel.LayerToLayer])
@pytest.mark.parametrize(("memory_bytes", "layers"), [(31 * 1344, 2), (0, 3)])
def test_no_more_than_two_layers_states_are_on_a_device_or_three_small_ones(
    policy: type[Streamed],
    optimizer: Any,
    memory_bytes: int,
    layers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within a step and from one to the next, whatever is slow. A layer's take 1344 bytes here."""
    here: dict[int, set[int]] = {}
    most = []
    up, down = Transit.up, Transit.states_down

    def counted_up(self: Transit, layer: int, device: Any, computes: Any) -> None:
        lane = threading.current_thread().name
        here.setdefault(int(lane.split("gpu")[1].split()[0]), set()).add(layer)
        most.append(max(map(len, here.values())))
        up(self, layer, device, computes)

    def counted_down(self: Transit, layer: int) -> None:
        time.sleep(0.05)
        down(self, layer)
        lane = threading.current_thread().name
        here[int(lane.split("gpu")[1].split()[0])].remove(layer)

    monkeypatch.setattr(Transit, "up", counted_up)
    monkeypatch.setattr(Transit, "states_down", counted_down)
    machine = make_machine(2, memory_bytes=memory_bytes)
    chosen = policy(**toy.CUTS, optimizer=optimizer, optimizer_on="device")
    watched(chosen, toy.blocks(), machine=machine)
    assert max(most) == layers


def test_what_the_next_step_waits_for_of_states_on_their_way_down() -> None:
    """A device's first two layers for its last two, and each layer for itself."""
    policy = roundel.RoundRobin(**toy.CUTS, optimizer_on="device")
    work = make_work(8, 1, 2, param_bytes=4, grad_bytes=4, optimizer_bytes=8)
    tables = ProgramTables(lower([policy.plan(work, 0)], work))
    lanes = {lane.name: number for number, lane in enumerate(tables.program.lanes)}
    first = tables.program.first

    def of(lane: str, tasks: Any) -> dict[int, int]:
        mine = tables.program.tasks_of(lanes[lane])
        return {int(first[task]): task for task in mine if task in tasks}

    ups, downs = of("gpu0 optimizer", tables.states_up), of("gpu0 d2h", tables.states_down)
    assert list(ups) == list(downs) == [7, 6, 5, 4, 3, 2, 1, 0]
    waits = tables.after(tables)
    assert {layer: set(waits[task]) for layer, task in ups.items()} == {
        7: {downs[1], downs[7]},
        6: {downs[0], downs[6]},
        **{layer: {downs[layer]} for layer in range(6)},
    }


def test_states_go_down_beside_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its weights, which that step reads; and all is down when it is asked for.

    In the first step, too: there they get their places on the host, which takes long, and would be
    on the device beside what the next step saves.
    """
    spans: list[tuple[str, int, float]] = []
    down = Transit.states_down

    def slow(self: Transit, layer: int) -> None:
        time.sleep(0.05)
        down(self, layer)
        spans.append(("down", layer, time.perf_counter()))

    monkeypatch.setattr(Transit, "states_down", slow)
    policy = roundel.RoundRobin(**toy.CUTS, optimizer_on="device")
    layers, batches = toy.blocks(), toy.vectors(3)
    with toy.make(layers, policy) as trainer:
        for batch in batches:
            trainer.step(*batch)
            spans.append(("step", -1, time.perf_counter()))
        trainer.flush()
        assert [layer for what, layer, _ in spans if what == "down"].count(0) == 3
        got = trainer.state_dict()
    ends = [at for what, _, at in spans if what == "step"]
    downs = [at for what, layer, at in spans if layer == 0]
    assert [down > end for down, end in zip(downs, ends, strict=True)] == [False, True, True]
    _, expected = toy.plain(toy.blocks(), mse, batches)
    for each, other in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-12, atol=1e-12)


def test_last_weights_go_up_again_part_by_part_while_they_come_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step ends before they are down, and trains as if it did not."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64)
    events: list[tuple[str, int, int]] = []
    down, upload = Transit.weights_down, engine.upload_part

    def slow(self: Transit, layer: int, step: int, part: int, parts: int) -> None:
        time.sleep(0.01)
        down(self, layer, step, part, parts)
        if layer == 0:
            events.append(("down", part, parts))

    def noted(weights: Any, source: Tensor, part: int, parts: int) -> None:
        if weights.parameters.keys() == first.keys():
            events.append(("up", part, parts))
        upload(weights, source, part, parts)

    monkeypatch.setattr(Transit, "weights_down", slow)
    monkeypatch.setattr(engine, "upload_part", noted)
    policy = roundel.RoundRobin(**toy.CUTS, optimizer_on="device")
    layers, batches = toy.blocks(), toy.vectors(4)
    layers[0] = nn.Sequential(layers[0])  # Its parameters have names of their own.
    first = dict(layers[0].named_parameters())
    _, expected = toy.plain(toy.blocks(), mse, batches)
    with toy.make(layers, policy) as trainer:
        toy.make_races_likely(trainer, seed=5)
        for batch in batches:
            trainer.step(*batch)
            events.append(("step", -1, -1))
        got = trainer.state_dict()
    for each, other in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-12, atol=1e-12)
    parts = next(parts for what, _, parts in events if what == "down")
    assert parts > 2
    steps = [number for number, (what, _, _) in enumerate(events) if what == "step"]
    # Part by part: some went up before all were down, none before it was down itself.
    early = 0
    for begin, end in pairwise(steps):
        mine = events[begin - parts : end]
        for part in range(parts):
            came = mine.index(("down", part, parts))
            goes = mine.index(("up", part, parts), came)
            early += ("down", parts - 1, parts) in mine[goes:]
    assert early > 0


class Late(nn.Module):
    """Fails in its backward, which is the last of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(toy.WIDTH, toy.WIDTH).double()

    def forward(self, value: Tensor) -> Tensor:
        output = self.inner(value)
        if output.requires_grad and threading.current_thread().name.startswith("roundel"):
            output.register_hook(self._fail)
        return output

    def _fail(self, grad: Tensor) -> None:
        time.sleep(0.05)
        raise RuntimeError("too late")


def test_what_fails_behind_the_loss_is_raised_with_the_next_step() -> None:
    layers = toy.blocks()
    layers[0] = Late()
    with pytest.raises(RuntimeError, match="too late"):
        watched(POLICIES[0], layers)
    assert not [each for each in threading.enumerate() if each.name.startswith("roundel")]


def test_a_batch_may_be_changed_as_soon_as_its_step_has_returned() -> None:
    expected = toy.one_step_stale(toy.blocks(), mse, toy.vectors(4))
    layers, losses = toy.blocks(), []
    with toy.make(layers, POLICIES[0]) as trainer:
        toy.make_races_likely(trainer, seed=5)
        for inputs, targets in toy.vectors(4):
            losses.append(trainer.step(inputs, targets).loss)
            inputs.fill_(torch.nan)
            targets.fill_(torch.nan)
    assert losses == pytest.approx(expected[0], abs=1e-12)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_timeline_of_a_step_that_overlaps_begins_with_its_first_task(
    policy: roundel.Policy,
) -> None:
    with toy.make(toy.blocks(), policy) as trainer:
        toy.make_races_likely(trainer, seed=1, most_s=0.005)
        results = [trainer.step(*batch) for batch in toy.vectors(3)]
        assert [int(each.timeline.start_ns.min()) for each in results] == [0, 0, 0]
        # A GPU that other processes use, too, may have a clock that is behind the host's.
        least = 1 if toy.PLACE.type == "cpu" else 0
        assert all(each.timeline.end_ns.min() >= least for each in results)
