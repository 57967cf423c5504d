"""The balanced cut against all cuts of small models."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from roundel.policies.balance import balanced_cut, slowest_stage_ns

Bounds = tuple[int, ...]

times = st.lists(st.integers(0, 30), min_size=1, max_size=9)


def all_cuts(layers: int, stages: int) -> Iterator[Bounds]:
    for inner in combinations(range(1, layers), stages - 1):
        yield (0, *inner, layers)


def stage_times(layer_ns: Sequence[int], bounds: Sequence[int]) -> list[int]:
    return [sum(layer_ns[first:stop]) for first, stop in pairwise(bounds)]


def device_times(layer_ns: Sequence[int], sizes: Sequence[int], homes: Sequence[int]) -> list[int]:
    load = [0] * (max(homes) + 1)
    bounds = [0, *accumulate(sizes)]
    for home, time in zip(homes, stage_times(layer_ns, bounds), strict=True):
        load[home] += time
    return load


def distance_from_even(layer_ns: Sequence[int], bounds: Bounds) -> list[tuple[int, int]]:
    """Per boundary: how far it is from its even share, times the number of stages; its layer."""
    stages = len(bounds) - 1
    return [
        (abs(stages * sum(layer_ns[:bound]) - sum(layer_ns) * stage), bound)
        for stage, bound in enumerate(bounds)
    ]


@given(layer_ns=times, data=st.data())
@settings(max_examples=300, deadline=None)
def test_it_is_the_most_even_of_the_cuts_with_the_fastest_slowest_stage(
    layer_ns: list[int], data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(layer_ns)))
    cuts = list(all_cuts(len(layer_ns), stages))
    slowest = min(max(stage_times(layer_ns, bounds)) for bounds in cuts)
    best = min(
        (bounds for bounds in cuts if max(stage_times(layer_ns, bounds)) == slowest),
        key=lambda bounds: distance_from_even(layer_ns, bounds),
    )
    assert slowest_stage_ns(layer_ns, stages) == slowest
    sizes = balanced_cut(layer_ns, range(stages))
    assert (0, *accumulate(sizes)) == best


@given(layer_ns=st.lists(st.integers(0, 30), min_size=4, max_size=10), v_shape=st.booleans())
@example(layer_ns=[1, 1, 1, 1, 1, 4], v_shape=False)
@settings(max_examples=300, deadline=None)
def test_relief_keeps_the_slowest_stage_and_never_slows_the_slowest_device(
    layer_ns: list[int], v_shape: bool
) -> None:
    homes = [0, 1, 1, 0] if v_shape else [0, 1, 0, 1]
    sizes = balanced_cut(layer_ns, homes)
    even = balanced_cut(layer_ns, range(4))
    assert sum(sizes) == len(layer_ns)
    assert min(sizes) >= 1
    bounds = [0, *accumulate(sizes)]
    assert max(stage_times(layer_ns, bounds)) == slowest_stage_ns(layer_ns, 4)
    slowest = max(device_times(layer_ns, sizes, homes))
    assert slowest <= max(device_times(layer_ns, even, homes))


def test_equal_layers_share_evenly() -> None:
    assert balanced_cut([5] * 10, range(4)) == (2, 3, 2, 3)
    assert balanced_cut([5] * 8, range(4)) == (2, 2, 2, 2)


def test_a_heavy_head_gets_a_stage_of_its_own() -> None:
    assert balanced_cut([1, 1, 1, 1, 1, 6], range(2)) == (5, 1)


def test_a_device_with_the_head_gets_light_other_chunks() -> None:
    """Qwen3-1.7b on 8 devices x 2 chunks: the even cut has one 21 % above the best."""
    layer_ns, homes = [*[23_260] * 28, 65_773], [*range(8), *range(8)]
    even = max(device_times(layer_ns, balanced_cut(layer_ns, range(16)), homes))
    relieved = max(device_times(layer_ns, balanced_cut(layer_ns, homes), homes))
    assert even == 2 * 23_260 + 65_773
    assert relieved == 4 * 23_260
