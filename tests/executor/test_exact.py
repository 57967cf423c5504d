"""Training by a policy is plain training: losses and weights equal to the last bits of float64."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import roundel
from roundel.executor.compute import Computer, Randomness
from roundel.executor.trainer import Trainer
from roundel.policies.op import Op
from roundel.policies.streamed import Streamed

from ..costs import make_machine, make_trace
from . import toy

mse = nn.functional.mse_loss

RESIDENT = [
    policy
    for recompute in ("none", "early", "late", "needed")
    for place in ("device", "host")
    for policy in toy.every_policy(recompute=recompute, optimizer_on=place)
    if not isinstance(policy, Streamed)
]
BY_LAYER = [
    policy
    for recompute in ("early", "late", "needed")
    for size in (1, 2)
    for policy in toy.every_policy(recompute=recompute, recompute_layers=size)
    if not isinstance(policy, Streamed)
]
STREAMED = [
    kind(
        **toy.CUTS,
        recompute=recompute,
        optimizer_on=place,
        activations=waits,
        optimizer=optimizer,
    )
    for kind in (roundel.RoundRobin, roundel.LayerToLayer)
    for recompute in ("early", "late")
    for place in ("device", "host")
    for waits in ("device", "host")
    for optimizer in ("sync", "stale")
]


def name(policy: roundel.Policy) -> str:
    values = [v for k, v in vars(policy).items() if isinstance(v, str)]
    return "-".join([policy.name, *values])


def assert_same(got: tuple, expected: tuple) -> None:
    losses, weights = got
    assert losses == pytest.approx(expected[0], abs=1e-12)
    for mine, theirs in zip(weights, expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("policy", [*RESIDENT, *BY_LAYER], ids=name)
def test_resident_policies_train_exactly(policy: roundel.Policy) -> None:
    batches = toy.vectors()
    got = toy.train(toy.blocks(), mse, batches, policy, race=1)
    assert_same(got, toy.plain(toy.blocks(), mse, batches))


@pytest.mark.parametrize("policy", STREAMED, ids=name)
@pytest.mark.parametrize("seed", range(3))
def test_streamed_policies_train_exactly_and_stale_exactly_one_step_late(
    policy: roundel.RoundRobin, seed: int
) -> None:
    batches = toy.vectors(steps=4)
    reference = toy.one_step_stale if policy.optimizer == "stale" else toy.plain
    got = toy.train(toy.blocks(), mse, batches, policy, race=seed)
    assert_same(got, reference(toy.blocks(), mse, batches))


@pytest.mark.parametrize(
    "policy", [each for each in STREAMED if each.optimizer == "sync"], ids=name
)
def test_a_step_whose_first_forward_goes_in_pieces_trains_exactly(policy: Streamed) -> None:
    machine = make_machine(3)
    work = roundel.make_work(make_trace(8, param_bytes=100), microbatches=9, machine=machine)
    begins = [ops[:3] for ops in policy.plan(work, 0).devices if ops[0].stop - ops[0].first == 1]
    assert [Op("F", 0, 1, 0), Op("F", 1, 2, 0), Op("F", 2, 3, 0)] in map(list, begins)
    batches = toy.vectors()
    got = toy.train(toy.blocks(), mse, batches, policy, race=5, microbatches=9, machine=machine)
    assert_same(got, toy.plain(toy.blocks(), mse, batches))


def test_stale_differs_from_synchronous() -> None:
    batches = toy.vectors(steps=4)
    sync = toy.train(toy.blocks(), mse, batches, roundel.RoundRobin(**toy.CUTS))[0]
    stale = toy.train(
        toy.blocks(), mse, batches, roundel.RoundRobin(**toy.CUTS, optimizer="stale")
    )[0]
    assert sync[:1] == stale[:1]
    assert abs(sync[-1] - stale[-1]) > 1e-6


@pytest.mark.parametrize("policy", toy.every_policy(), ids=name)
@pytest.mark.parametrize(("devices", "microbatches"), [(1, 1), (1, 3), (2, 2), (4, 3), (4, 9)])
def test_any_number_of_devices_and_microbatches(
    policy: roundel.Policy, devices: int, microbatches: int
) -> None:
    batches = toy.vectors(steps=2)
    got = toy.train(
        toy.blocks(), mse, batches, policy, devices=devices, microbatches=microbatches, race=2
    )
    assert_same(got, toy.plain(toy.blocks(), mse, batches))


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("place", ["device", "host"])
def test_tied_embedding_and_head_with_and_without_clipping(clip: float | None, place: str) -> None:
    batches = toy.tokens()
    expected = toy.plain(toy.tied_model(), toy.token_loss, batches, clip)
    ways = ({}, {"recompute": "early", "recompute_layers": 3})
    for policy in (
        policy
        for way in ways
        for policy in toy.every_policy(optimizer_on=place, clip=clip is not None, **way)
    ):
        if isinstance(policy, Streamed) and (place == "device" or policy.recompute == "early"):
            continue
        got = toy.train(toy.tied_model(), toy.token_loss, batches, policy, race=3, clip_norm=clip)
        assert_same(got, expected)


def test_tied_layers_that_stream_with_states_through_the_device_are_refused() -> None:
    policy = roundel.RoundRobin(**toy.CUTS, optimizer_on="device")
    with pytest.raises(roundel.InputError, match="share parameters need optimizer_on host"):
        toy.train(toy.tied_model(), toy.token_loss, toy.tokens(), policy)


@pytest.mark.parametrize("policy", [*toy.every_policy(recompute="early"), *BY_LAYER[:7]], ids=name)
def test_frozen_layers_stay_and_the_others_train_exactly(policy: roundel.Policy) -> None:
    def model() -> list[nn.Module]:
        layers = toy.blocks()
        for layer in (0, 1, 4):
            layers[layer].requires_grad_(False)
        layers[5][0].weight.requires_grad_(False)
        return layers

    batches = toy.vectors()
    got = toy.train(model(), mse, batches, policy, race=4)
    assert_same(got, toy.plain(model(), mse, batches))
    torch.testing.assert_close(got[1][0], next(model()[0].parameters()).detach())


class Reentrant(nn.Linear):
    """Makes no gradients, its own neither, where its input wants none."""

    def forward(self, value: Tensor) -> Tensor:
        run = partial(checkpoint, super().forward, use_reentrant=True)
        return value + run(value)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("policy", [*RESIDENT[::5], *STREAMED[::4]], ids=name)
def test_layers_behind_one_that_passes_no_gradient_get_none(policy: roundel.Policy) -> None:
    def model() -> list[nn.Module]:
        torch.manual_seed(5)
        linear = [nn.Linear(toy.WIDTH, toy.WIDTH) for _ in range(4)]
        layers = [*(Reentrant(toy.WIDTH, toy.WIDTH) for _ in range(4)), *linear]
        return [each.double() for each in layers]

    batches = toy.vectors()
    expected = toy.plain(model(), mse, batches)
    got = toy.train(model(), mse, batches, policy)
    assert_same(got, expected)
    first = [each.detach() for layer in model()[:4] for each in layer.parameters()]
    for mine, untouched in zip(got[1], first, strict=False):
        torch.testing.assert_close(mine, untouched.to(mine.device), rtol=0, atol=0)


@pytest.mark.parametrize("recompute", ["early", "late", "needed"])
def test_dropout_draws_the_same_numbers_again(recompute: str) -> None:
    """With and without recompute, by any cut: the same masks, so the same losses and weights."""
    batches = toy.vectors()
    expected = toy.train(toy.blocks(dropout=0.3), mse, batches, roundel.GPipe(), devices=1, seed=7)
    by_layer = [each for each in BY_LAYER if each.recompute == recompute]
    for policy in [*toy.every_policy(recompute=recompute), *by_layer]:
        got = toy.train(toy.blocks(dropout=0.3), mse, batches, policy, race=5, seed=7)
        assert_same(got, expected)
    other = toy.train(toy.blocks(dropout=0.3), mse, batches, roundel.GPipe(), seed=8)
    assert abs(other[0][0] - expected[0][0]) > 1e-6


def test_dropout_is_plain_dropout_with_the_seeds_of_layer_step_and_microbatch() -> None:
    from roundel.executor.compute import layer_seed

    inputs, targets = (each.to(toy.DEVICE) for each in toy.vectors(steps=1, size=8)[0])
    layers = [layer.to(toy.DEVICE) for layer in toy.blocks(2, dropout=0.5)]
    total = 0.0
    for number in range(4):
        value = inputs[2 * number : 2 * number + 2]
        for layer, module in enumerate(layers):
            torch.manual_seed(layer_seed(9, layer, 0, number))
            value = module(value)
        total += mse(value, targets[2 * number : 2 * number + 2]).item() / 4
    got = toy.train(
        toy.blocks(2, dropout=0.5),
        mse,
        [(inputs, targets)],
        roundel.OneFOneB(recompute="late"),
        devices=2,
        seed=9,
    )
    assert got[0][0] == pytest.approx(total, abs=1e-12)


class Pair(nn.Module):
    """Tuples and dicts between layers, one tensor of them without a gradient."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.left = nn.Linear(toy.WIDTH, toy.WIDTH).double()
        self.last = last

    def forward(self, value):  # type: ignore[no-untyped-def]
        if isinstance(value, torch.Tensor):
            value = {"both": (value, value * 2), "index": torch.arange(len(value)), "note": "kept"}
        first, second = value["both"]
        assert value["note"] == "kept"
        first, second = torch.tanh(self.left(first)) + second, second * 0.5
        if self.last:
            return first + second
        return {**value, "both": (first, second)}


@pytest.mark.parametrize("policy", [*toy.every_policy(recompute="late"), *BY_LAYER[7:14]], ids=name)
def test_tuples_and_dicts_between_layers(policy: roundel.Policy) -> None:
    def model() -> list[nn.Module]:
        torch.manual_seed(2)
        return [*(Pair() for _ in range(7)), Pair(last=True)]

    batches = toy.vectors()
    got = toy.train(model(), mse, batches, policy, race=6)
    assert_same(got, toy.plain(model(), mse, batches))


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
        partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
        partial(torch.optim.RMSprop, lr=1e-3),
        partial(torch.optim.Adagrad, lr=1e-2),
        partial(torch.optim.NAdam, lr=1e-2),
    ],
    ids=lambda factory: factory.func.__name__,
)
@pytest.mark.parametrize(
    "policy",
    [
        roundel.OneFOneB(),
        roundel.RoundRobin(**toy.CUTS),
        roundel.RoundRobin(**toy.CUTS, optimizer_on="device"),
    ],
)
def test_any_torch_optimizer(optimizer, policy: roundel.Policy) -> None:  # type: ignore[no-untyped-def]
    batches = toy.vectors(steps=4)
    got = toy.train(toy.blocks(), mse, batches, policy, race=7, optimizer=optimizer)
    assert_same(got, toy.plain(toy.blocks(), mse, batches, optimizer=optimizer))


def test_parameter_groups_and_a_scheduler() -> None:
    batches = toy.vectors(steps=4)

    def groups(named):  # type: ignore[no-untyped-def]
        bias = [each for name, each in named.items() if name.endswith("bias")]
        rest = [each for name, each in named.items() if not name.endswith("bias")]
        return [{"params": rest, "weight_decay": 0.3}, {"params": bias, "weight_decay": 0.0}]

    layers = toy.blocks()
    model = nn.Sequential(*layers)
    steps = toy.ADAMW(groups(dict(model.named_parameters())))
    scheduler = torch.optim.lr_scheduler.StepLR(steps, 1, gamma=0.5)
    expected = []
    for inputs, targets in batches:
        steps.zero_grad()
        loss = mse(model(inputs), targets)
        loss.backward()
        steps.step()
        scheduler.step()
        expected.append(loss.item())

    with Trainer(
        toy.blocks(),
        mse,
        policy=roundel.RoundRobin(**toy.CUTS),
        optimizer=toy.ADAMW,
        devices=toy.devices(2),
        microbatches=3,
        parameter_groups=groups,
    ) as trainer:
        scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1, gamma=0.5)
        got = []
        for batch in batches:
            got.append(trainer.step(*batch).loss)
            scheduler.step()
    assert got == pytest.approx(expected, abs=1e-12)


def test_an_update_in_the_background_has_the_rate_of_its_own_step() -> None:
    """A scheduler steps while a stale update still waits for its turn."""
    batches = toy.vectors(steps=4)

    def run(wait: bool) -> list[torch.Tensor]:
        layers = toy.blocks()
        with Trainer(
            layers,
            mse,
            policy=roundel.RoundRobin(**toy.CUTS, optimizer="stale"),
            optimizer=toy.ADAMW,
            devices=toy.devices(2),
            microbatches=3,
        ) as trainer:
            toy.make_races_likely(trainer, seed=3, most_s=0.01)
            scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1, gamma=0.1)
            for batch in batches:
                trainer.step(*batch)
                if wait:
                    trainer.flush()
                scheduler.step()
            trainer.flush()
            return [each.detach().cpu().clone() for each in nn.Sequential(*layers).parameters()]

    for got, expected in zip(run(wait=False), run(wait=True), strict=True):
        assert torch.equal(got, expected)


def test_bf16_on_the_device_with_float32_masters_follows_float32() -> None:
    def model() -> list[nn.Module]:
        return [layer.float() for layer in toy.blocks()]

    batches = [(x.float(), y.float()) for x, y in toy.vectors(steps=12)]
    expected, _ = toy.plain(model(), mse, batches)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return mse(output.float(), target)

    def cast(output: torch.Tensor) -> torch.Tensor:
        return output.bfloat16()

    half = [(cast(x), y) for x, y in batches]
    for policy in (
        roundel.OneFOneB(),
        roundel.OneFOneB(optimizer_on="host"),
        roundel.RoundRobin(**toy.CUTS),
        roundel.RoundRobin(**toy.CUTS, optimizer_on="device"),
    ):
        layers = model()
        got, weights = toy.train(layers, loss, half, policy, compute_dtype=torch.bfloat16)
        assert all(each.dtype == torch.float32 for each in weights)
        assert got == pytest.approx(expected, rel=0.03)


def test_resident_weights_come_up_as_they_are_computed_with() -> None:
    """The host converts what it has updated once; to convert for a copy would hold that up."""
    layers = [layer.float() for layer in toy.blocks(6)]
    layers[1].requires_grad_(False)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return mse(output.float(), target.float())

    x, y = toy.vectors()[0]
    with Trainer(
        layers,
        loss,
        policy=roundel.GPipe(optimizer_on="host"),
        optimizer=toy.ADAMW,
        devices=toy.devices(2),
        microbatches=2,
        compute_dtype=torch.bfloat16,
    ) as trainer:
        before = [each.clone() for each in layers[0].parameters()]
        trainer.step(x.bfloat16(), y)
        trainer.flush()
        ready = trainer._ready
        assert ready is not None
        copies = ready.machinery.host_copies
        assert sorted(copies) == [0, 2, 3, 4, 5]
        assert all(len(each.flats) == 1 for each in copies.values())
        for device in ready.machinery.weights:
            for layer in set(device.held()) & set(copies):
                for name, there in device.current(layer).parameters.items():
                    master = layers[layer].get_parameter(name)
                    assert torch.equal(copies[layer].named(0)[name], master.bfloat16())
                    assert torch.equal(there.cpu(), master.bfloat16())
        assert not torch.equal(before[0], layers[0].get_parameter("0.weight"))


class FrozenTable(nn.Module):
    """A frozen weight that a later layer reads, too, and a bias that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(toy.WIDTH, toy.WIDTH).double(), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(toy.WIDTH).double())

    def forward(self, value: Tensor) -> Tensor:
        return value @ self.weight + self.bias


class Reads(nn.Module):
    """A layer with the weights of others, and none of its own."""

    def __init__(self, *weights: nn.Parameter) -> None:
        super().__init__()
        for number, each in enumerate(weights):
            self.register_parameter(f"weight{number}", each)

    def forward(self, value: Tensor) -> Tensor:
        for each in self.parameters():
            value = value @ each.T
        return value


def frozen_and_tied() -> list[nn.Module]:
    torch.manual_seed(4)
    table = FrozenTable()
    return [table, *toy.blocks(2), Reads(table.weight)]


def frozen_and_empty() -> list[nn.Module]:
    layers = [*toy.blocks(2), nn.ReLU(), *toy.blocks(1)]
    layers[1].requires_grad_(False)
    return layers


@pytest.mark.parametrize("says_gradients", [False, True])
@pytest.mark.parametrize("model", [frozen_and_tied, frozen_and_empty])
def test_layers_that_nothing_is_trained_of_stay_where_the_host_updates(
    model: Callable[[], list[nn.Module]], says_gradients: bool
) -> None:
    """A trace may say that every layer has gradients: it may be of a model with none frozen."""
    sizes = {"param_bytes": 80, "grad_bytes": 80, "optimizer_bytes": 160}
    options = {"trace": make_trace(4, **sizes)} if says_gradients else {}
    batches = toy.vectors()
    expected = toy.plain(model(), mse, batches)
    for policy in (
        roundel.GPipe(optimizer_on="host"),
        roundel.OneFOneB(optimizer_on="host", recompute="late"),
    ):
        got = toy.train(model(), mse, batches, policy, devices=2, **options)
        assert_same(got, expected)


def test_weights_of_several_layers_in_one_are_for_one_device() -> None:
    def model(trained: bool = True) -> list[nn.Module]:
        layers = [nn.Linear(toy.WIDTH, toy.WIDTH, bias=False).double() for _ in range(3)]
        layers[1].weight.requires_grad_(trained)
        return [*layers, Reads(layers[0].weight, layers[1].weight)]

    torch.manual_seed(5)
    one = model()
    torch.manual_seed(5)
    again = model()
    batches = toy.vectors()
    expected = toy.plain(one, mse, batches)
    assert_same(toy.train(again, mse, batches, roundel.GPipe(), devices=1), expected)
    message = "layer 3 shares trained parameters with layers 0 and 1; on several devices"
    for policy in (roundel.GPipe(), roundel.RoundRobin()):
        with pytest.raises(roundel.InputError, match=message):
            toy.train(model(), mse, batches, policy, devices=2)
    # Frozen ones have no gradient that could come too late.
    toy.train(model(trained=False), mse, batches, roundel.GPipe(), devices=2)


def test_autocast_recomputes_what_it_ran() -> None:
    batches = [(x.float(), y.float()) for x, y in toy.vectors()]

    def model() -> list[nn.Module]:
        return [layer.float() for layer in toy.blocks()]

    results = [
        toy.train(model(), mse, batches, replace(policy), autocast=torch.bfloat16)[0]
        for policy in (
            roundel.GPipe(),
            roundel.GPipe(recompute="late"),
            roundel.RoundRobin(**toy.CUTS),
        )
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0] == pytest.approx(results[2], rel=1e-6)
    exact = toy.plain(model(), mse, batches)[0]
    assert results[0] == pytest.approx(exact, rel=0.03)
    assert results[0] != pytest.approx(exact, rel=1e-6)


def test_evaluation_uses_the_newest_weights_and_no_dropout() -> None:
    inputs, targets = toy.vectors(steps=1)[0]
    layers = toy.blocks(dropout=0.4)
    with Trainer(
        layers,
        mse,
        policy=roundel.RoundRobin(**toy.CUTS, optimizer="stale"),
        optimizer=toy.ADAMW,
        devices=toy.devices(2),
        microbatches=2,
    ) as trainer:
        for _ in range(3):
            trainer.step(inputs, targets)
        got = trainer.evaluate(inputs, targets)
    model = nn.Sequential(*layers).eval()
    assert got == pytest.approx(mse(model(inputs), targets).item(), abs=1e-12)


class AndASize(nn.Module):
    """Hands on a number, too, that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(toy.WIDTH, toy.WIDTH).double()

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        value = self.inner(value)
        return value, (value**2).mean()


class First(nn.Module):
    """Takes the first of what it gets."""

    def forward(self, values: tuple[Tensor, Tensor]) -> Tensor:
        return values[0]


def test_an_output_that_nothing_uses_gets_no_gradient() -> None:
    def model() -> list[nn.Module]:
        torch.manual_seed(2)
        return [AndASize(), First(), nn.Linear(toy.WIDTH, toy.WIDTH).double(), nn.Identity()]

    batches = toy.vectors(2)
    got = toy.train(model(), mse, batches, roundel.GPipe(partition=(1, 2, 1)))
    assert_same(got, toy.plain(model(), mse, batches))


def test_a_graph_does_not_keep_its_output_in_memory() -> None:
    computer = Computer(torch.device("cpu"), mse, Randomness(0), None, [True])
    layer = nn.Linear(3, 3)
    op = Op("F", 0, 1, 0)
    graph, output = computer.forward_with_graph(
        op, 0, [layer], torch.ones(2, 3), lambda value: value, defer=False, is_loss=False
    )
    there = weakref.ref(output)
    del output
    gc.collect()
    assert there() is None
    computer.backward(op, graph, [torch.ones(2, 3)])
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.full((3, 3), 2.0))


def test_weights_in_another_order_in_memory() -> None:
    """Fused kernels on the CPU take a weight and its gradient as they lie there."""

    def model() -> list[nn.Module]:
        torch.manual_seed(2)
        first = nn.Linear(toy.WIDTH, toy.WIDTH).double()
        first.weight.data = first.weight.data.t().contiguous().t()
        return [first, *toy.blocks(2)]

    fused = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    batches = toy.vectors(2)
    expected = toy.plain(model(), mse, batches)
    for policy in (roundel.OneFOneB(optimizer_on="host"), roundel.GPipe()):
        assert_same(toy.train(model(), mse, batches, policy, optimizer=fused), expected)
