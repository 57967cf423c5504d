import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundel.policies.op import OP_KINDS, Op
from roundel.traces.errors import InputError

numbers = st.integers(0, 10**6)


@given(st.sampled_from(OP_KINDS), numbers, numbers, numbers)
def test_parse_undoes_str(kind: str, first: int, stop: int, microbatch: int) -> None:
    op = Op(kind, first, stop, microbatch)
    assert Op.parse(str(op)) == op


def test_an_op_reads_as_layers_kind_microbatch() -> None:
    assert str(Op("F", 0, 4, 2)) == "0:4F2"
    assert Op.parse(" 3:5R12 ") == Op("R", 3, 5, 12)


@pytest.mark.parametrize("text", ["", "F", "0:4X2", "0-4F2", "0:4F", "-1:4F2", "0:4F2 1:2F3"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not an op"):
        Op.parse(text)
