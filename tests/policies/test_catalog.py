"""Policies by name and from a user's file, and one line for each mistake."""

import re
from pathlib import Path

import pytest

from roundel.policies.catalog import POLICIES, known_knobs, make_policy, split_knobs, split_names
from roundel.policies.policy import Policy
from roundel.traces.errors import InputError

from ..costs import make_work

MINE = """
from __future__ import annotations

from dataclasses import dataclass

from roundel.policies.gpipe import GPipe
from roundel.policies.plan import Plan
from roundel.policies.work import Work


@dataclass(frozen=True)
class Mine:
    depth: int = 1

    def plan(self, work: Work, step: int) -> Plan:
        return GPipe().plan(work, step)


class Plain:
    def plan(self, work, step):
        return GPipe().plan(work, step)


class Needy:
    def __init__(self, depth):
        pass

    def plan(self, work, step):
        pass


class Idle:
    pass
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "my_policy.py"
    path.write_text(MINE, encoding="utf-8")
    return str(path)


def refusal(name: str, **knobs: object) -> str:
    with pytest.raises(InputError) as error:
        make_policy(name, **knobs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_names_in_order() -> None:
    assert list(POLICIES) == [
        "gpipe",
        "1f1b",
        "interleaved-1f1b",
        "looped-bfs",
        "zb-h1",
        "zb-h2",
        "zb-v",
        "round-robin",
        "layer-to-layer",
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_each_works_without_arguments(name: str) -> None:
    policy = make_policy(name)
    assert isinstance(policy, Policy)
    assert policy == POLICIES[name]()
    work = make_work(8, 2, 4, param_bytes=8, output_bytes=8)
    policy.plan(work, 0).check(work)


@pytest.mark.parametrize("name", POLICIES)
def test_all_share_the_common_knobs(name: str) -> None:
    assert {"partition", "recompute", "optimizer_on", "clip"} <= set(known_knobs(name))


def test_knobs_are_set() -> None:
    assert make_policy("looped-bfs", chunks=3, recompute="late") == POLICIES["looped-bfs"](
        chunks=3, recompute="late"
    )


def test_a_name_may_bring_knobs_which_come_first() -> None:
    own = "round-robin[optimizer= stale, partition=1 2, backward_partition=(2, 1), round_size=4]"
    text = f"1f1b, zb-h1 ,{own},file.py:A[b=[1,2],c={{3: 4}}]"
    names = split_names(text)
    assert names == ["1f1b", "zb-h1", own, "file.py:A[b=[1,2],c={3: 4}]"]
    assert split_knobs(names[3]) == ("file.py:A", {"b": [1, 2], "c": {3: 4}})
    made = make_policy(own, optimizer="sync", recompute="late")
    assert made == POLICIES["round-robin"](
        optimizer="stale",
        partition=(1, 2),
        backward_partition=(2, 1),
        round_size=4,
        recompute="late",
    )
    assert make_policy("1f1b[partition=5]") == POLICIES["1f1b"](partition=(5,))
    assert known_knobs(own) == known_knobs("round-robin")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1f1b[chunks=2]", "1f1b: no knob 'chunks'"),
        ("1f1b[late]", "write NAME=VALUE, got 'late'"),
        ("1f1b[clip=True,clip=False]", "clip is there twice"),
        ("1f1b]", "no policy '1f1b]'"),
        ("1f1b[clip=True", "no policy '1f1b[clip=True'"),
        ("1f1b[clip={[]:1}]", "1f1b: "),
        (f"1f1b[partition=1 {'9' * 5000}]", "1f1b: "),
    ],
)
def test_knobs_behind_a_name_that_are_wrong(name: str, message: str) -> None:
    assert message in refusal(name)


def test_an_unknown_policy_lists_the_known() -> None:
    message = refusal("gpip")
    assert message.startswith("no policy 'gpip'; the policies are gpipe, 1f1b, ")
    assert message.endswith("layer-to-layer, or file.py:Class")


def test_an_unknown_knob_lists_the_known() -> None:
    assert refusal("1f1b", chunks=2) == (
        "1f1b: no knob 'chunks'; its knobs are partition, recompute, optimizer_on, clip, "
        "recompute_layers"
    )


def test_a_policy_of_ones_own(mine: str) -> None:
    work = make_work(4, 2, 2)
    assert known_knobs(f"{mine}:Mine") == ("depth",)
    for policy in (make_policy(f"{mine}:Mine", depth=3), make_policy(f"{mine}:Plain")):
        assert policy.plan(work, 0) == make_policy("gpipe").plan(work, 0)


def test_a_file_is_read_anew_each_time(mine: str) -> None:
    make_policy(f"{mine}:Mine")
    Path(mine).write_text(MINE.replace("class Mine", "class Yours"), encoding="utf-8")
    make_policy(f"{mine}:Yours")
    assert "no class 'Mine'" in refusal(f"{mine}:Mine")


def test_mistakes_with_a_file(mine: str, tmp_path: Path) -> None:
    assert refusal(f"{tmp_path}/none.py:Mine") == f"{tmp_path}/none.py: no such policy file"
    assert refusal(f"{mine}:Your") == (
        f"{mine}: no class 'Your'; its policies are Mine, Plain, Needy"
    )
    assert refusal(f"{mine}:Idle") == (
        f"{mine}: Idle is no policy: it must define plan(self, work, step)"
    )
    assert refusal(f"{mine}:Plain", depth=1) == f"{mine}:Plain: no knob 'depth'; it has none"
    needy = refusal(f"{mine}:Needy")
    assert needy.startswith(f"{mine}:Needy: the class must be usable without arguments")
    assert "'depth'" in needy
    assert refusal(mine).startswith(f"no policy {mine!r}; ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("def broken(:\n", r"line 1: SyntaxError: .+"),
        (
            "import no_such_module\n",
            "line 1: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("raise SystemExit\n", "line 1: SystemExit"),
        ("\nraise ValueError('two\\nlines')\n", "line 2: ValueError: two lines"),
        ("", "no class 'Mine'; it defines no policy"),
    ],
)
def test_a_file_that_does_not_import(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text, encoding="utf-8")
    assert re.fullmatch(f"{re.escape(str(path))}: {message}", refusal(f"{path}:Mine"))


def test_knobs_behind_a_name_as_people_write_them() -> None:
    text = "x[recompute-layers=2,lifo=false,clip=true,partition=7 7 / 1 3 10]"
    assert split_knobs(text)[1] == {
        "recompute_layers": 2,
        "lifo": False,
        "clip": True,
        "partition": (7, 7),
        "backward_partition": (1, 3, 10),
    }
