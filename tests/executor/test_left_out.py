"""What a recompute leaves out: found by trial, and gradients stay what they are."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import roundel
from roundel.executor import left_out
from roundel.executor.decoder import decoder_layers
from roundel.executor.layers import Layers
from roundel.executor.left_out import leaving_out
from roundel.executor.linears import apply_linear
from roundel.executor.measure import measure_layers
from roundel.executor.presets import PRESETS
from roundel.executor.token_loss import token_loss
from roundel.traces.machine import ideal_machine

from . import toy

WIDTH = 8
mse = nn.functional.mse_loss


class Tail(nn.Module):
    """A linear layer, and what is done with what it makes."""

    def __init__(self, then: Callable[["Tail", Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.3)
        self.then = then

    def forward(self, value: Any) -> Any:
        value = value["hidden"] if isinstance(value, dict) else value
        return self.then(self, value, self.last(self.first(value).tanh()))


class Keeps(torch.autograd.Function):
    """Keeps what it gets where no hook of saved tensors sees it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.kept = value.clone()
        return value * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.kept  # type: ignore[no-any-return]


NEEDS_IT_NOT = {
    "added": lambda tail, value, made: value + made,
    "handed on": lambda tail, value, made: made,
    "dropped out": lambda tail, value, made: value + tail.dropout(made),
    "scaled, in a dict": lambda tail, value, made: {"hidden": value - 2 * made.view(-1, WIDTH)},
}
NEEDS_IT = {
    "relu": lambda tail, value, made: made.relu(),
    "gain": lambda tail, value, made: value + tail.gain * made,
    "norm": lambda tail, value, made: tail.norm(value + made),
    "kept unseen": lambda tail, value, made: Keeps.apply(made),
    "branch": lambda tail, value, made: made if made.sum() > 0 else -made,
    "other branch": lambda tail, value, made: made if made.sum() <= 0 else -made,
    "checkpoint": lambda tail, value, made: checkpoint(tail.norm, made, use_reentrant=False),
}


GO_WRONG = {
    # Of what is not finite there is none.
    "distribution": lambda tail, value, made: value + torch.distributions.Normal(made, 1.0).mean,
    # Neither for whoever looks for it.
    "only finite": lambda tail, value, made: value + _finite(made),
    # An infinite one is another case.
    "clamped": lambda tail, value, made: value + (made * made if made.isinf().any() else made),
}


def _finite(made: Tensor) -> Tensor:
    if not made.isfinite().all():
        raise ValueError("not finite")
    return made


def left_out_of(layers: list[nn.Module], **options: Any) -> dict[int, tuple[str, ...]]:
    value, device = torch.randn(4, WIDTH), torch.device("cpu")
    measured = measure_layers(Layers(layers), mse, value, value, device, **options)
    return {layer: each.names for layer, each in measured.left_out.items()}


@pytest.mark.parametrize("name", NEEDS_IT_NOT)
def test_what_only_makes_the_output_is_left_out(name: str) -> None:
    torch.manual_seed(0)
    layers = [Tail(NEEDS_IT_NOT[name]), Tail(lambda tail, value, made: made)]
    assert left_out_of(layers) == {0: ("last",), 1: ()}


@pytest.mark.parametrize("name", NEEDS_IT)
@pytest.mark.parametrize("seed", range(3))
def test_what_backward_needs_is_not(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    assert left_out_of([Tail(NEEDS_IT[name]), nn.Linear(WIDTH, WIDTH)]) == {0: (), 1: ()}


def test_only_plain_linear_layers_that_run_once() -> None:
    class Other(nn.Linear):
        """One of its own kind, which may do anything."""

    class Twice(Tail):
        def forward(self, value: Tensor) -> Tensor:
            return self.last(self.first(value).tanh()) + self.last(value)

    def own(tail: Tail) -> Tail:
        tail.last = Other(WIDTH, WIDTH)
        return tail

    def hooked(tail: Tail) -> Tail:
        tail.last.register_forward_hook(lambda module, given, made: 2 * made)
        return tail

    def patched(tail: Tail) -> Tail:
        product = tail.last.forward
        tail.last.forward = lambda value: product(value).tanh()  # type: ignore[method-assign]
        return tail

    def inside(tail: Tail, value: Tensor) -> Tensor:
        return tail.last(tail.first(value).tanh())  # type: ignore[no-any-return]

    class Checkpointed(Tail):
        def forward(self, value: Tensor) -> Tensor:
            return checkpoint(partial(inside, self), value, use_reentrant=False)  # type: ignore[no-any-return]

    added = NEEDS_IT_NOT["added"]
    last = nn.Linear(WIDTH, WIDTH)
    changed = [change(Tail(added)) for change in (own, hooked, patched)]
    for layer in (*changed, Twice(added), Checkpointed(added)):
        assert left_out_of([layer, last]) == {0: (), 1: ()}


def test_a_blocks_last_product_is_left_out_and_takes_no_time() -> None:
    shape = PRESETS["decoder-tiny"].shape
    tokens = torch.randint(shape.vocabulary, (2, 16))
    layers = Layers(decoder_layers(shape, dropout=0.1))
    measured = measure_layers(layers, token_loss, tokens, tokens, torch.device("cpu"))
    assert {layer: each.names for layer, each in measured.left_out.items()} == {
        0: (),
        **dict.fromkeys(range(1, 5), ("down",)),
        5: (),
    }
    times = [each.recompute_last_ns for each in measured.trace.layers]
    assert [each is None for each in times] == [True, *[False] * 4, True]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, WIDTH), (2, 3, WIDTH)])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_by_hand_are_torchs_own_to_the_bit(
    bias: bool, shape: tuple[int, ...], autocast: bool
) -> None:
    torch.manual_seed(0)
    ours = nn.Linear(WIDTH, 5, bias=bias)
    theirs, value, given = copy.deepcopy(ours), torch.randn(shape), torch.randn(*shape[:-1], 5)

    def run(linear: nn.Linear, without: bool) -> list[Tensor]:
        leaf = value.clone().requires_grad_()
        with (
            torch.autocast("cpu", torch.bfloat16, autocast),
            leaving_out([linear] if without else []),
        ):
            made = linear(leaf)
        made.backward(given.to(made.dtype))
        grads = [leaf.grad, *(each.grad for each in linear.parameters())]
        return [each for each in grads if each is not None]

    for got, wanted in zip(run(ours, True), run(theirs, False), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    assert "forward" not in vars(ours)


def test_frozen_weights_get_no_gradient_and_no_job() -> None:
    linear = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    leaf = torch.randn(2, WIDTH, requires_grad=True)
    apply_linear(linear, leaf, None, lambda like, shape: like.new_empty(shape)).sum().backward()
    assert linear.weight.grad is None
    torch.testing.assert_close(leaf.grad, linear.weight.sum(0).expand(2, -1))


POLICIES = {
    "round-robin": roundel.RoundRobin(round_size=3, **toy.CUTS),
    "round-robin, stale": roundel.RoundRobin(optimizer="stale", **toy.CUTS),
    "layer-to-layer": roundel.LayerToLayer(partition=(4, 4), backward_partition=(4, 3, 1)),
    "1f1b": roundel.OneFOneB(recompute="late"),
    "1f1b, by layer": roundel.OneFOneB(recompute="late", recompute_layers=1),
    "zb-h1": roundel.ZBH1(recompute="early", weight_share=0.5),
}


@pytest.mark.parametrize("name", POLICIES)
def test_recomputes_run_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recompute leaves out one product, of its last layer; none is left out elsewhere."""

    def model() -> list[nn.Module]:
        torch.manual_seed(3)
        return [Tail(NEEDS_IT_NOT["added"]).double() for _ in range(8)]

    def nan(like: Tensor, shape: torch.Size) -> Tensor:
        left.append(tuple(shape))
        return like.new_full(shape, math.nan)

    left: list[tuple[int, ...]] = []
    batches = [(torch.randn(6, WIDTH).double(), torch.randn(6, WIDTH).double()) for _ in range(2)]
    layers = model()
    policy, machine = POLICIES[name], ideal_machine(2)
    with toy.make(layers, policy, mse, microbatches=3, machine=machine) as trainer:
        losses = [trainer.step(*batches[0]).loss]
        trainer.flush()
        monkeypatch.setattr(left_out, "filled", nan)
        result = trainer.step(*batches[1])
        losses.append(result.loss)
        trainer.flush()
        spans = [span for span in result.timeline.spans() if span.kind == "R"]
        wanted = sum(span.stop < len(layers) for span in spans)
        assert left == [(2, WIDTH)] * wanted
        assert wanted > 0
    # All are exact but the stale one.
    expected, weights = toy.plain(model(), mse, batches)
    if "stale" not in name:
        assert losses == pytest.approx(expected, abs=1e-12)
        for mine, theirs in zip(nn.Sequential(*layers).parameters(), weights, strict=True):
            torch.testing.assert_close(mine.detach().cpu(), theirs, rtol=0, atol=1e-11)
    assert all(each.isfinite().all() for each in nn.Sequential(*layers).parameters())


def test_nothing_is_left_out_for_inputs_of_another_shape() -> None:
    """There a layer may need what it did not for the shape that was tried."""

    class Refines(Tail):
        def forward(self, value: Tensor) -> Tensor:
            made = self.last(self.first(value).tanh())
            return value + made if len(value) <= 2 else value + made * made

    def model() -> list[nn.Module]:
        torch.manual_seed(4)
        return [Refines(NEEDS_IT["relu"]).double() for _ in range(8)]

    # Measured with two rows, then trained with four.
    draw = partial(torch.randn, dtype=torch.double)
    batches = [(draw(rows, WIDTH), draw(rows, WIDTH)) for rows in (4, 8)]
    layers = model()
    with toy.make(layers, POLICIES["round-robin"], mse, count=2, microbatches=2) as trainer:
        losses = [trainer.step(*batch).loss for batch in batches]
    plain = nn.Sequential(*model())
    optimizer = toy.ADAMW(plain.parameters())
    for (inputs, targets), loss in zip(batches, losses, strict=True):
        optimizer.zero_grad()
        halves = zip(inputs.chunk(2), targets.chunk(2), strict=True)
        wanted: Any = sum(mse(plain(x), y) / 2 for x, y in halves)
        wanted.backward()
        optimizer.step()
        assert loss == pytest.approx(wanted.item(), abs=1e-12)
    for mine, theirs in zip(nn.Sequential(*layers).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", GO_WRONG)
def test_where_a_trial_goes_wrong_nothing_is_left_out(name: str) -> None:
    assert left_out_of([Tail(GO_WRONG[name]), nn.Linear(WIDTH, WIDTH)]) == {0: (), 1: ()}


def test_closeness_is_told_in_float16_too() -> None:
    some, other = (torch.randn(4096, dtype=torch.float16) * 1000 for _ in range(2))
    assert left_out._are_close([some], [some])
    assert not left_out._are_close([some], [other])
    assert not left_out._are_close([some], [some, other])


def test_of_a_frozen_product_that_is_left_out_no_input_is_kept() -> None:
    saved: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    linear = nn.Linear(WIDTH, 3).requires_grad_(False)
    leaf = torch.randn(5, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        apply_linear(linear, leaf.tanh(), None, left_out.filled)
    assert saved == [torch.Size([5, WIDTH]), torch.Size([3, WIDTH])]  # tanh's output, the weight.


def test_autocast_leaves_float64_alone_by_hand_too() -> None:
    linear = nn.Linear(WIDTH, WIDTH).double()
    value = torch.randn(3, WIDTH, dtype=torch.double)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_linear(linear, value, None), linear(value))


def test_a_linear_layers_forward_that_was_put_on_its_class_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: product(self, input).tanh())
    assert left_out_of([Tail(NEEDS_IT_NOT["added"]), nn.Linear(WIDTH, WIDTH)]) == {0: (), 1: ()}
