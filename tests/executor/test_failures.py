"""What goes wrong says so, where it happened, and leaves no thread behind."""

import faulthandler
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roundel
from roundel.executor import fitting, memory_cap, placement
from roundel.executor import trainer as trainer_module
from roundel.executor.engine import StepEngine
from roundel.executor.fitting import refuse_what_cannot_fit
from roundel.executor.lanes import LaneThread
from roundel.executor.layers import Layers
from roundel.executor.memory_cap import MemoryCap
from roundel.executor.run import Run
from roundel.executor.trainer import NotANumber, Trainer
from roundel.executor.transit import Transit
from roundel.policies.lowering import lower

from ..costs import make_work
from . import toy

mse = nn.functional.mse_loss


class Breaks(nn.Module):
    """Raises at its n-th run with a gradient, or the first one without."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.inner = nn.Linear(toy.WIDTH, toy.WIDTH).double()
        self.left = at
        self.error = error

    def __deepcopy__(self, memo: dict) -> "Breaks":
        copy = Breaks(self.left, self.error)
        copy.inner.weight = memo.get(id(self.inner.weight), copy.inner.weight)
        copy.inner.bias = memo.get(id(self.inner.bias), copy.inner.bias)
        return copy

    def forward(self, value: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise self.error
        return self.inner(value)


class Custom(RuntimeError):
    """An error of the user's."""


make = partial(toy.make, count=3)


def ours() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("roundel")]


@pytest.mark.parametrize("policy", toy.every_policy(recompute="early"), ids=lambda p: p.name)
@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_failing_layer_is_raised_as_it_is_with_layer_and_microbatch(
    policy: roundel.Policy, at: int
) -> None:
    layers = toy.blocks()
    error = Custom("no luck")
    layers[5] = Breaks(at, error)
    # In evaluation mode and with a trace nothing is measured: the first run is the step's.
    trainer = make([each.eval() for each in layers], policy, trace=roundel_trace(layers))
    start = time.perf_counter()
    with pytest.raises(Custom) as caught, trainer:
        for batch in toy.vectors():
            trainer.step(*batch)
    assert caught.value is error
    assert any("in layer 5 (Breaks), microbatch" in note for note in error.__notes__)
    assert not ours()
    assert time.perf_counter() - start < (10 if toy.DEVICE == "cpu" else 60)


def roundel_trace(layers: list[nn.Module]) -> roundel.Trace:
    cost = roundel.LayerCost(
        name="layer",
        forward_ns=10,
        backward_ns=20,
        param_bytes=1000,
        grad_bytes=1000,
        output_bytes=100,
        saved_bytes=100,
        optimizer_bytes=1000,
        trainable_params=100,
    )
    return roundel.Trace(
        name="t", device="d", provenance="p", microbatch_tokens=1, layers=(cost,) * len(layers)
    )


def test_a_layer_that_fails_while_it_is_measured_is_named() -> None:
    layers = toy.blocks()
    layers[5] = Breaks(1, Custom("no luck"))
    trainer = make(layers, roundel.GPipe())
    with pytest.raises(Custom) as caught, trainer:
        trainer.step(*toy.vectors()[0])
    assert "in layer 5 (Breaks), while it was measured" in caught.value.__notes__
    assert not ours()


class Counts(nn.Module):
    """Counts its runs in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, value: Tensor) -> Tensor:
        self.runs += 1
        return value


def test_a_layer_that_changes_a_buffer_is_refused() -> None:
    layers = [*toy.blocks(), Counts()]
    with pytest.raises(
        roundel.InputError, match=r"8.Counts: its forward changes the buffer 'runs'"
    ):
        make(layers, roundel.GPipe()).step(*toy.vectors()[0])


def test_a_failing_loss_is_raised_and_a_closed_trainer_says_so() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise Custom("loss")

    with pytest.raises(Custom, match="loss"):
        Trainer(
            toy.blocks(),
            loss,
            policy=roundel.GPipe(),
            optimizer=toy.ADAMW,
            devices=[toy.DEVICE],
            microbatches=1,
        ).step(*toy.vectors()[0])

    trainer = make(toy.blocks(), roundel.GPipe())
    trainer.step(*toy.vectors()[0])
    trainer.close()
    with pytest.raises(roundel.InputError, match="this trainer is closed"):
        trainer.step(*toy.vectors()[0])


@pytest.mark.parametrize("recompute", ["none", "early", "late"])
def test_a_loss_with_dimensions_is_refused_wherever_it_is_seen_first(recompute: Any) -> None:
    policy = roundel.GPipe(recompute=recompute)
    with pytest.raises(roundel.InputError, match="must return a mean, without dimensions"):
        make(toy.blocks(), policy, lambda output, goal: (output - goal).pow(2).mean(0)).step(
            *toy.vectors()[0]
        )
    assert not ours()


@pytest.mark.parametrize("policy", toy.every_policy(recompute="early"), ids=repr)
def test_the_loss_is_the_forwards_and_read_when_it_is_there(
    policy: roundel.Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recompute's would be the same number, but it may be under way when it is read."""
    seen: list[int] = []
    wait_for, fetch = Run.wait_for, StepEngine.fetch_loss

    def waited(run: Run, tasks: Iterable[int]) -> None:
        tasks = list(tasks)
        seen.extend(tasks)
        wait_for(run, tasks)

    def fetched(engine: StepEngine, task: int) -> None:
        assert task in seen
        time.sleep(0.02)
        fetch(engine, task)

    def forward_alone(output: Tensor, goal: Tensor) -> Tensor:
        return mse(output, goal) + (1.0 if output.requires_grad else 0.0)

    monkeypatch.setattr(Run, "wait_for", waited)
    monkeypatch.setattr(StepEngine, "fetch_loss", fetched)
    batch = toy.vectors()[0]
    expected = toy.plain(toy.blocks(), mse, [batch])[0][0]
    with make(toy.blocks(), policy, forward_alone) as trainer:
        loss = trainer.step(*batch).loss
        assert trainer._ready is not None
        ops = [op for ops in policy.plan(trainer._ready.work, 0).devices for op in ops]
    # Where the last layers are not recomputed it is their forward that keeps a graph.
    recomputed = any(op.kind == "R" and op.stop == len(toy.blocks()) for op in ops)
    assert loss == pytest.approx(expected + (0.0 if recomputed else 1.0), abs=1e-9)


def test_nothing_starts_before_the_first_step_and_all_ends_at_close() -> None:
    trainer = make(toy.blocks(), roundel.RoundRobin())
    assert not ours()
    trainer.step(*toy.vectors()[0])
    assert len(ours()) == 3 * 5 + 1
    trainer.close()
    assert not ours()
    trainer.close()


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A process that a shell started in the background ignores SIGINT: not in here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_leaves_cleanly() -> None:
    class Interrupts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(toy.WIDTH, toy.WIDTH).double()
            self.runs = 0

        def forward(self, value: Tensor) -> Tensor:
            self.runs += 1
            if self.runs == 2:
                import _thread

                _thread.interrupt_main()
                time.sleep(0.05)
            return self.inner(value)

    layers = toy.blocks()
    layers[4] = Interrupts()
    with pytest.raises(KeyboardInterrupt), make(layers, roundel.OneFOneB()) as trainer:
        for _ in range(20):
            for batch in toy.vectors():
                trainer.step(*batch)
    assert not ours()


def test_a_loss_that_is_not_a_number_stops_training_or_goes_on_as_asked() -> None:
    inputs, targets = toy.vectors()[0]
    with pytest.raises(NotANumber, match="step 1: the loss is nan"):
        with make(toy.blocks(), roundel.GPipe()) as trainer:
            trainer.step(inputs, targets)
            trainer.step(inputs * torch.nan, targets)
    with make(toy.blocks(), roundel.GPipe(), on_nan="go on") as trainer:
        assert trainer.step(inputs * torch.nan, targets).loss != trainer.step_number


def test_an_update_that_fails_in_the_background_is_raised() -> None:
    class Bad(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            raise Custom("optimizer")

    policy = roundel.RoundRobin(optimizer="stale")
    with pytest.raises(Custom, match="optimizer"):
        with make(toy.blocks(), policy, optimizer=lambda p: Bad(p, lr=0.1)) as trainer:
            trainer.step(*toy.vectors()[0])
            trainer.flush()
    assert not ours()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": []}, "devices: name at least one"),
        ({"microbatches": 0}, "microbatches: must be at least 1"),
        ({"memory_limit": "lots"}, 'memory: write bytes, or a size such as "24GiB"'),
        ({"clip_norm": 1.0}, "clip_norm: the policy must clip too"),
        ({"layers": []}, "layers: there must be at least one"),
        ({"layers": [nn.ReLU()]}, "no parameter requires a gradient"),
        ({"layers": [nn.BatchNorm1d(3)]}, "keeps running statistics"),
        ({"layers": [nn.Embedding(3, 3, sparse=True)]}, "layer 0: Embedding makes sparse gradie"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS needs all parameters at once"),
        ({"parameter_groups": lambda named: []}, "every trained parameter must be in exactly one"),
    ],
)
def test_wrong_arguments_say_what_to_do(options: dict, message: str) -> None:
    arguments = {
        "layers": toy.blocks(2),
        "loss_fn": mse,
        "policy": roundel.GPipe(),
        "optimizer": toy.ADAMW,
        "devices": [toy.DEVICE],
        "microbatches": 1,
    }
    with pytest.raises(roundel.InputError, match=message) as caught:
        Trainer(**{**arguments, **options})
    assert "\n" not in str(caught.value)


def test_a_batch_too_small_and_a_trace_of_another_model() -> None:
    inputs, targets = toy.vectors()[0]
    with pytest.raises(roundel.InputError, match="a batch of 3 cannot be cut into 4"):
        make(toy.blocks(), roundel.GPipe()).step(inputs[:3], targets[:3])
    trace = roundel_trace(toy.blocks(5))
    with pytest.raises(roundel.InputError, match="trace: has 5 layers, the model 8"):
        make(toy.blocks(), roundel.GPipe(), trace=trace).step(inputs, targets)


def test_a_plan_that_cannot_fit_is_refused_before_anything_runs() -> None:
    layers = toy.blocks()
    inputs, targets = toy.vectors()[0]
    trainer = make(layers, roundel.GPipe(), memory_limit=3000)
    with pytest.raises(
        roundel.InputError, match=r"this plan cannot fit: gpu\d would need"
    ) as caught:
        trainer.step(inputs, targets)
    assert "recompute" in str(caught.value)
    # On a GPU this little also goes to workspace.
    assert "saved activations" in str(caught.value) or toy.DEVICE != "cpu"
    assert not ours()
    with make(toy.blocks(), roundel.GPipe(), memory_limit="1GiB") as trainer:
        trainer.step(inputs, targets)


@pytest.mark.parametrize("optimizer", ["stale", "sync"])
def test_a_failed_update_is_raised_again_and_nothing_can_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any
) -> None:
    policy = roundel.RoundRobin(**toy.CUTS, optimizer=optimizer, optimizer_on="device")
    trainer = make(toy.blocks(), policy)
    batch = toy.vectors()[0]
    trainer.step(*batch)
    trainer.flush()
    real = Transit.states_down

    def down(self: Transit, layer: int) -> None:
        time.sleep(0.1)
        if layer == 0:
            raise Custom("no luck")
        real(self, layer)

    monkeypatch.setattr(Transit, "states_down", down)
    with suppress(Custom):
        trainer.step(*batch)
    for _ in range(2):
        with pytest.raises(Custom, match="no luck"):
            trainer.state_dict()
    monkeypatch.setattr(Transit, "states_down", real)
    with pytest.raises(roundel.InputError, match="closed"):
        trainer.save(tmp_path)
    with pytest.raises(roundel.InputError, match="closed"):
        trainer.step(*batch)
    assert not ours()


def test_an_interrupt_while_a_step_goes_to_its_lanes_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some lanes have begun, and would wait for ever for those that have not."""
    real, asked = LaneThread.submit, []

    def submit(self: LaneThread, *job: Any) -> None:
        asked.append(job)
        if len(asked) == 8:
            raise KeyboardInterrupt
        real(self, *job)

    monkeypatch.setattr(LaneThread, "submit", submit)
    trainer = make(toy.blocks(), roundel.RoundRobin(**toy.CUTS, optimizer_on="device"))
    stops = threading.Timer(30, trainer_is_stuck)
    stops.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.step(*toy.vectors()[0])
    stops.cancel()
    assert not ours()


def trainer_is_stuck() -> None:
    faulthandler.dump_traceback()
    os._exit(1)


def test_a_cap_on_memory_is_each_devices_and_ends_with_what_was_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two devices on a GPU of 1000 bytes, of which the process may have 0.75."""
    gpu, caps = torch.device("cuda", 0), list[Any]()
    whole = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(memory_cap, "gpus_of", lambda devices: [gpu])
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: whole)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.75)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *it: caps.append(it))
    MemoryCap([gpu, gpu], 0).set()
    assert not caps
    cap = MemoryCap([gpu, gpu], 200)
    cap.set()
    assert caps == [(0.4, gpu)]
    cap.lift()
    cap.lift()
    assert caps == [(0.4, gpu), (0.75, gpu)]


def test_the_cap_on_memory_ends_with_the_trainer_also_where_it_never_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caps: list[str] = []

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MemoryCap, "set", lambda self: caps.append("set"))
    monkeypatch.setattr(MemoryCap, "lift", lambda self: caps.append("lift"))
    with make(toy.blocks(), roundel.GPipe()) as trainer:
        trainer.step(*toy.vectors()[0])
        assert caps == ["set"]
    assert caps == ["set", "lift"]
    monkeypatch.setattr(placement, "_place_residents", full)
    with pytest.raises(torch.OutOfMemoryError):
        make(toy.blocks(), roundel.GPipe()).step(*toy.vectors()[0])
    assert caps[2:] == ["set", "lift"]


def test_a_loss_with_dimensions_is_refused() -> None:
    inputs, targets = toy.vectors()[0]
    trainer = Trainer(
        toy.blocks(),
        lambda output, target: mse(output, target).reshape(1),
        policy=roundel.GPipe(partition=(4, 4)),
        optimizer=toy.ADAMW,
        devices=toy.devices(2),
        microbatches=2,
    )
    with pytest.raises(roundel.InputError, match=r"loss_fn: must return a mean, .* got \(1,\)"):
        trainer.step(inputs, targets)


class FailsBackward(torch.autograd.Function):
    """Fails where its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("boom in backward")


class BreaksBackward(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return FailsBackward.apply(value)  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", [0, 3, 7])
@pytest.mark.parametrize("policy", toy.every_policy(), ids=lambda policy: type(policy).__name__)
def test_a_backward_that_fails_says_in_which_layer(policy: Any, place: int) -> None:
    layers = toy.blocks()
    layers[place] = nn.Sequential(layers[place], BreaksBackward())
    x, y = toy.vectors(1)[0]
    # In evaluation mode and with a trace nothing is measured.
    trainer = make([each.eval() for each in layers], policy, trace=roundel_trace(layers))
    with pytest.raises(RuntimeError, match="boom in backward") as caught, trainer:
        trainer.step(x, y)
    (note,) = (each for each in caught.value.__notes__ if "in layer" in each)
    # One device may have begun with another microbatch.
    assert re.match(rf"in layer {place} \(Sequential\), microbatch [0-3], op \d:\d[BI]", note)


def test_a_loss_and_an_optimizer_that_fail_say_where() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise ValueError("no loss")

    layers, batch = [each.eval() for each in toy.blocks()], toy.vectors(1)[0]
    trainer = make(layers, roundel.GPipe(), loss, trace=roundel_trace(layers))
    with pytest.raises(ValueError, match="no loss") as caught, trainer:
        trainer.step(*batch)
    assert "in the loss of microbatch 0" in caught.value.__notes__

    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if threading.current_thread().name.startswith("roundel"):
                raise ValueError("no step")

    policy = roundel.RoundRobin(**toy.CUTS)
    trainer = make(toy.blocks(), policy, optimizer=lambda each: Broken(each, 0.1))
    with pytest.raises(ValueError, match="no step") as caught, trainer:
        trainer.step(*batch)
    assert "in the optimizer's update of layer 7" in caught.value.__notes__


@pytest.mark.parametrize("frozen", [True, False])
def test_a_layer_that_changes_its_input_is_refused(frozen: bool) -> None:
    layers = toy.blocks()
    layers[0].requires_grad_(not frozen)
    layers[1] = nn.ReLU(inplace=True)
    with make(layers, roundel.GPipe(recompute="late")) as trainer:
        with pytest.raises(roundel.InputError, match=r"1\.ReLU changes its input in place"):
            trainer.step(*toy.vectors(1)[0])


class Fickle:
    """Moves its stages from device to device, returns no plan, or fails."""

    name = "fickle"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def plan(self, work: roundel.Work, step: int) -> Any:
        if self.kind == "fails":
            raise ValueError("oh")
        if self.kind == "none":
            return 3
        plan = roundel.GPipe().plan(work, 0)
        return plan if step == 0 else replace(plan, devices=plan.devices[::-1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fails", "fickle: plan failed: .*ValueError: oh"),
        ("none", "fickle: plan must return a Plan, it returned int"),
        ("moves", "layer"),
    ],
)
def test_a_users_policy_that_errs_is_told_as_the_simulator_tells_it(
    kind: str, message: str
) -> None:
    with make(toy.blocks(), Fickle(kind)) as trainer:
        with pytest.raises(roundel.InputError, match=message):
            for _ in range(2):
                trainer.step(*toy.vectors(1)[0])


def test_a_frozen_embedding_makes_no_gradients_at_all() -> None:
    frozen = nn.Embedding(3, 3, sparse=True).requires_grad_(False)
    assert len(Layers([frozen, nn.Linear(3, 3)])) == 2


class Own:
    """A policy that does not say where its updates run until it plans."""

    def plan(self, work: Any, step: int) -> roundel.Plan:
        return roundel.RoundRobin(optimizer_on="device").plan(work, step)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (roundel.RoundRobin(), "cpu"),
        (roundel.RoundRobin(optimizer_on="device"), "device"),
        (Own(), "device"),
    ],
    ids=["host", "device", "own"],
)
def test_an_update_is_tried_where_it_may_run(
    policy: roundel.Policy, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def bytes_of(*given: Any) -> Any:
        tried.append(given[3])
        raise RuntimeError("that is enough")

    monkeypatch.setattr(trainer_module, "optimizer_bytes", bytes_of)
    trainer = make(toy.blocks(), policy)
    with pytest.raises(RuntimeError, match="that is enough"):
        trainer.step(*toy.vectors()[0])
    assert tried == ["cpu" if expected == "cpu" else trainer.devices[0]]


@pytest.mark.parametrize(("optimizer", "plans"), [("sync", 1), ("stale", 2)])
def test_what_outlasts_a_step_has_to_fit_beside_the_next(
    optimizer: Any, plans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def lowered(made: Any, work: Any) -> Any:
        counts.append(len(made))
        return lower(made, work)

    monkeypatch.setattr(fitting, "lower", lowered)
    work, policy = make_work(8, 2, 4), roundel.RoundRobin(optimizer=optimizer)
    refuse_what_cannot_fit(policy, policy.plan(work, 0), work, 0)
    assert counts == [plans]
