import pytest

from roundel.policies.op import Op
from roundel.policies.plan import Plan
from roundel.traces.errors import InputError

from ..costs import make_work


def plan_of(*devices: str, **rules: object) -> Plan:
    """A plan from one line of ops per device."""
    ops = tuple(tuple(map(Op.parse, line.split())) for line in devices)
    return Plan(ops, **rules)  # type: ignore[arg-type]


GPIPE = (
    "0:1F0 0:1F1 0:1B0 0:1B1",
    "1:2F0 1:2F1 1:2B0 1:2B1",
)


def test_grid_has_a_column_per_device() -> None:
    assert plan_of("0:1F0 0:1B0", "1:12F0 1:12B0").grid() == (
        "gpu0   gpu1\n0:1F0  1:12F0\n0:1B0  1:12B0\n"
    )


def test_csv_comes_back() -> None:
    plan = plan_of(*GPIPE, late_recompute=True)
    assert plan.to_csv().splitlines()[0] == "0:1F0,0:1F1,0:1B0,0:1B1"
    assert Plan.from_csv(plan.to_csv(), late_recompute=True) == plan


def test_a_wrong_cell_names_its_row() -> None:
    with pytest.raises(InputError, match="row 2: not an op: '1:2X0'"):
        Plan.from_csv("0:1F0\n1:2X0\n")


def test_a_good_plan_passes() -> None:
    plan_of(*GPIPE).check(make_work(2, 2, 2))


@pytest.mark.parametrize(
    ("devices", "rules", "message"),
    [
        ((GPIPE[0],), {}, "the plan is for 1 devices, the machine has 2"),
        (("0:1F0 0:1F1 0:1B0 0:1B2", GPIPE[1]), {}, r"gpu0: 0:1B2: .* microbatch in 0 to 1"),
        (("0:3F0 0:1F1 0:1B0 0:1B1", GPIPE[1]), {}, r"gpu0: 0:3F0: layers must lie in 0:2"),
        (("0:1F0 0:1F1 0:1F1 0:1B0 0:1B1", GPIPE[1]), {}, "0:1F1 on gpu0 repeats work"),
        (("0:1F0 0:1F1 0:1B0", GPIPE[1]), {}, "no B or I of layer 0 for microbatch 1"),
        (("0:1F0 0:1B0 0:1B1", GPIPE[1]), {}, "no F of layer 0 for microbatch 1"),
        (("0:1F0 0:1F1 0:1I0 0:1B1", GPIPE[1]), {}, "no B or W of layer 0 for microbatch 0"),
        (("0:1B0 0:1F0 0:1F1 0:1B1", GPIPE[1]), {}, "0:1B0 on gpu0 has nothing to work from"),
        (("0:1F0 0:1F1 0:1W0 0:1I0 0:1B1", GPIPE[1]), {}, "0:1W0 on gpu0 .* needs an I"),
        (
            ("0:1F0 0:1F1 0:1B0 1:2B1", "1:2F0 1:2F1 1:2B0 0:1B1"),
            {},
            "1:2B1 on gpu0 has nothing to work from: it needs an F or R of the same layers",
        ),
        (
            ("0:1F0 0:1F1 0:1B0 0:1B1 1:2R1", GPIPE[1]),
            {},
            "1:2R1 on gpu0 is not followed|1:2B1 on gpu1 has nothing to work from",
        ),
        (
            ("0:1F0 0:1B0 1:2F1 1:2B1", "1:2F0 1:2B0 0:1F1 0:1B1"),
            {},
            r"layer \d also runs on gpu\d",
        ),
        (
            ("0:1F0 0:1B0 0:1F1 0:1B1", "1:2F1 1:2B1 1:2F0 1:2B0"),
            {},
            "can deadlock: gpu0 waits at 0:1B0, gpu1 waits at 1:2F1",
        ),
        (GPIPE, {"optimizer": "stale"}, "stale optimizer needs streamed weights"),
        (
            GPIPE,
            {"weights": "streamed", "optimizer_on": "device", "clip": True},
            "clip with streamed weights needs optimizer_on host",
        ),
        (
            ("0:1F0 1:2F0 1:2B0 0:1B0", "0:1F1 1:2F1 1:2B1 0:1R1 0:1B1"),
            {"weights": "streamed", "optimizer_on": "host"},
            "0:1B0 on gpu0: the F or R that it works from is in an earlier visit",
        ),
        (
            ("0:2F0 0:2R0 0:1F1 1:2F1 0:2R1 0:2B1 0:2B0", ""),
            {"weights": "streamed", "optimizer_on": "host"},
            "0:2B0 on gpu0: the F or R that it works from is in an earlier visit",
        ),
    ],
)
def test_a_wrong_plan_is_refused(devices: tuple[str, ...], rules: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plan_of(*devices, **rules).check(make_work(2, 2, 2))
    assert "\n" not in str(caught.value)
