"""Cuts near another: all of them fit the model, and a descent ends where none is better."""

from hypothesis import given
from hypothesis import strategies as st

from roundel.policies.asymmetric import AsymmetricCut, good_cuts
from roundel.policies.layer_to_layer import LayerToLayer
from roundel.policies.near_cuts import TRIES, _near, backward_in_ones, descended, finer
from roundel.policies.round_robin import RoundRobin
from roundel.policies.streamed import FINER, Streamed
from roundel.policies.work import Work

from ..costs import make_machine, make_trace

sizes = st.lists(st.integers(1, 9), max_size=6).map(tuple)


@given(sizes, sizes.filter(bool))
def test_near_cuts_are_of_the_same_model(forward: tuple[int, ...], head: tuple[int, ...]) -> None:
    # The first backward stage takes what forward leaves.
    backward = (head[0], *forward[::-1])
    cut = AsymmetricCut(forward, backward)
    cut.check(sum(backward))
    for each in (*_near(cut), *finer(cut), backward_in_ones(cut)):
        each.check(sum(backward))


def test_a_descent_takes_small_changes_as_long_as_they_help_and_fit() -> None:
    start = AsymmetricCut((4, 4), (1, 4, 4))
    wanted = AsymmetricCut((8,), (1, 2, 2, 2, 2))

    def far(cut: AsymmetricCut) -> int:
        return abs(len(cut.forward) - 1) + abs(len(cut.backward) - 5)

    assert far(descended(start, far, lambda cut: True)) == far(wanted) == 0
    stays = descended(start, far, lambda cut: cut == start)
    assert stays == start


def test_a_descent_ends_after_so_many_tries() -> None:
    tried = []

    def always_better(cut: AsymmetricCut) -> int:
        tried.append(cut)
        return -len(tried)

    descended(AsymmetricCut((20,) * 20, (1, *(20,) * 20)), always_better, lambda cut: True)
    assert TRIES <= len(tried) < TRIES + 30


def test_the_best_cut_keeps_more_where_memory_allows_it() -> None:
    """What the first backward visit holds is not recomputed: worth more than even visits."""
    trace = make_trace([(10, 13, 7)] * 12, param_bytes=10, grad_bytes=10, saved_bytes=100)
    heads = []
    for memory in (500, 5000):
        machine = make_machine(1, params_per_s=10**12, memory_bytes=memory)
        policy: Streamed = LayerToLayer()
        heads.append(policy.cut(Work(trace, machine, 4)).backward[0])
    assert heads[0] < 5 < heads[1]


def test_one_forward_visit_is_found_where_the_head_takes_longest() -> None:
    """Beside a head's visit the other device runs all of forward; then single layers alternate."""
    layers = [(20, 26, 14)] * 12 + [(180, 200, 100)]
    trace = make_trace(layers, param_bytes=10, grad_bytes=10, trainable_params=10)
    work = Work(trace, make_machine(2, params_per_s=10**12), 10)
    assert len(RoundRobin(round_size=10).cut(work).forward) == 1


def test_backward_in_ones_is_found_where_no_small_changes_lead_to_it() -> None:
    trace = make_trace([(10, 13, 7)] * 12, param_bytes=10, grad_bytes=10, trainable_params=10)
    work = Work(trace, make_machine(2, params_per_s=10**12), 10)
    best = backward_in_ones(AsymmetricCut((9,), (3, 3, 3, 3)))
    assert (9,) in [cut.forward for cut in good_cuts(work, FINER)]

    class Valley(RoundRobin):
        """The best cut lies behind slow ones: all with its forward stages or backward in ones."""

        def step_ns(self, work: Work, cut: AsymmetricCut) -> int:
            behind = cut.forward == best.forward or cut == backward_in_ones(cut)
            return 1 if cut == best else 3 if behind else 2

    assert Valley(round_size=10).cut(work) == best == AsymmetricCut((9,), (3, *(1,) * 9))
