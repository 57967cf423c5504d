"""Trace files: what is written is read back equal, and every mistake gets one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundel.traces.errors import InputError
from roundel.traces.trace import MAX_COUNT, LayerCost, Trace

BIG = str(MAX_COUNT)


def layer(**changes: Any) -> dict[str, Any]:
    return {"name": "block", "forward_ns": 3, "backward_ns": 7, **changes}


def trace(*layers: Any, **changes: Any) -> dict[str, Any]:
    return {
        "format": "roundel.trace/1",
        "name": "tiny",
        "device": "none",
        "provenance": "written by hand",
        "microbatch_tokens": 8,
        "layers": list(layers) or [layer(), layer()],
        **changes,
    }


def without(data: dict[str, Any], field: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != field}


def message_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        Trace.load(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


names = st.text(st.characters(codec="utf-8"), max_size=8)
counts = st.integers(0, 2**40)
splits = st.one_of(st.tuples(st.none(), st.none()), st.tuples(counts, counts))


@st.composite
def layer_costs(draw: st.DrawFn) -> LayerCost:
    given_fields = draw(
        st.sets(st.sampled_from(sorted(set(LayerCost.model_fields) - {"name", "tied_to"})))
    )
    inputs, weights = draw(splits)
    values: dict[str, Any] = {field: draw(counts) for field in sorted(given_fields)}
    values |= {"forward_ns": draw(counts), "backward_ns": draw(counts)}
    values |= {"backward_input_ns": inputs, "backward_weight_ns": weights}
    if inputs is not None and weights is not None:
        values["backward_ns"] = min(values["backward_ns"], inputs + weights)
    return LayerCost(**{**values, "name": draw(names)})


@given(st.lists(layer_costs(), min_size=1, max_size=4), names, names, names, counts)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    layers: list[LayerCost],
    name: str,
    device: str,
    provenance: str,
    tokens: int,
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    wanted = Trace(
        name=name,
        device=device,
        provenance=provenance,
        microbatch_tokens=tokens,
        layers=tuple(layers),
    )
    wanted.save(path)
    assert Trace.load(path) == wanted


def test_absent_and_null_fields(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    nulls = (
        *("recompute_ns", "recompute_last_ns", "forward_only_ns"),
        *("backward_input_ns", "backward_weight_ns", "trainable_params"),
    )
    data = trace(layer(), layer(**dict.fromkeys(nulls), grad_bytes=10))
    path.write_text(json.dumps(data), encoding="utf-8-sig")
    absent, null = Trace.load(path).layers
    assert absent == LayerCost(name="block", forward_ns=3, backward_ns=7)
    assert [getattr(null, field) for field in nulls] == [None] * 6
    assert (absent.params_to_update, null.params_to_update) == (0, 5)


MISTAKES = {
    "not an object": ([1], "must be a JSON object, got [1]"),
    "null": (None, "must be a JSON object, got null"),
    "other format": (
        trace(format="roundel.machine/1"),
        'format: must be "roundel.trace/1", got "roundel.machine/1"',
    ),
    "no format": (
        without(trace(), "format"),
        'format: missing; add "format": "roundel.trace/1"',
    ),
    "missing at the top": (without(trace(), "device"), "device: missing; add it"),
    "missing in a layer": (
        trace(layer(), without(layer(), "forward_ns")),
        "layers.1.forward_ns: missing; add it",
    ),
    "misspelt": (
        trace(layer(save_bytes=1)),
        "layers.0.save_bytes: no such field; check the spelling",
    ),
    "misspelt and so missing": (
        trace({"name": "block", "forwrd_ns": 3, "backward_ns": 7}),
        "layers.0.forwrd_ns: no such field; check the spelling (and 1 more)",
    ),
    "misspelt at the top": (trace(nam="x"), "nam: no such field; check the spelling"),
    "field name with a line break": (
        trace(layer(**{"a\nb": 1})),
        "layers.0.a\\nb: no such field; check the spelling",
    ),
    "negative": (
        trace(*[layer()] * 3, layer(forward_ns=-5)),
        "layers.3.forward_ns: must not be negative, got -5",
    ),
    "fraction": (
        trace(layer(forward_ns=7.5)),
        "layers.0.forward_ns: must be a whole number, got 7.5",
    ),
    "float": (trace(layer(forward_ns=7.0)), "layers.0.forward_ns: must be a whole number, got 7.0"),
    "bool": (
        trace(layer(backward_ns=True)),
        "layers.0.backward_ns: must be a whole number, got true",
    ),
    "NaN": (
        trace(layer(forward_ns=float("nan"))),
        "layers.0.forward_ns: must be a whole number, got NaN",
    ),
    "Infinity": (
        trace(layer(forward_ns=float("inf"))),
        "layers.0.forward_ns: must be a whole number, got Infinity",
    ),
    "null time": (
        trace(layer(forward_ns=None)),
        "layers.0.forward_ns: must be a whole number, got null",
    ),
    "text for a number": (
        trace(layer(saved_bytes="12")),
        'layers.0.saved_bytes: must be a whole number, got "12"',
    ),
    "number for a text": (trace(name=5), "name: must be a string, got 5"),
    "no layers": (trace(layers=[]), "layers: must not be empty"),
    "layers as an object": (
        trace(layers={"block": 1}),
        'layers: must be a list, got {"block": 1}',
    ),
    "layers as a text": (trace(layers="many"), 'layers: must be a list, got "many"'),
    "layer as a number": (trace(4), "layers.0: must be a JSON object, got 4"),
    "half a split": (
        trace(layer(backward_input_ns=3)),
        "layers.0: backward_input_ns and backward_weight_ns: give both or neither",
    ),
    "beyond the limit": (
        trace(layer(forward_ns=MAX_COUNT + 1)),
        f"layers.0.forward_ns: must be at most {BIG}, got {MAX_COUNT + 1}",
    ),
    "beyond int64": (
        trace(layer(param_bytes=2**64)),
        f"layers.0.param_bytes: must be at most {BIG}, got {2**64}",
    ),
    "sum beyond the limit": (
        trace(*[layer(param_bytes=MAX_COUNT)] * 2),
        f"layers: param_bytes sums to more than {BIG}",
    ),
    "two mistakes": (
        trace(layer(forward_ns=-1, backward_ns=-1)),
        "layers.0.forward_ns: must not be negative, got -1 (and 1 more)",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake(case: str, tmp_path: Path) -> None:
    data, message = MISTAKES[case]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(data))
    assert message_of(path) == f"{path}: {message}"


RAW = {
    "empty": (b"", "not a trace file: no JSON at line 1: Expecting value"),
    "not JSON": (
        b'{"format":\n "roundel.trace/1",}',
        "not a trace file: no JSON at line 2: Expecting property name enclosed in double quotes",
    ),
    "binary": (b"\x93NUMPY\xff\x00", "not a trace file: it is not text"),
    "field twice": (b'{"name": 1, "name": 2}', "not a trace file: name: given twice in one object"),
    "nested": (b"[" * 100_000, "not a trace file: nested too deeply"),
}


@pytest.mark.parametrize("case", RAW)
def test_wrong_text(case: str, tmp_path: Path) -> None:
    data, message = RAW[case]
    path = tmp_path / "trace.json"
    path.write_bytes(data)
    assert message_of(path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("digits", "reason"),
    [("9" * 5000, f"must be at most {BIG}"), ("-" + "9" * 5000, "must not be")],
)
def test_number_longer_than_python_reads(digits: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace(layer(forward_ns="X"))).replace('"X"', digits))
    assert message_of(path).startswith(f"{path}: layers.0.forward_ns: {reason}")


def test_no_file(tmp_path: Path) -> None:
    assert message_of(tmp_path / "absent.json").endswith("absent.json: no such trace file")


def test_folder(tmp_path: Path) -> None:
    assert message_of(tmp_path) == f"{tmp_path}: cannot read this trace file: Is a directory"


def test_file_name_with_a_line_break(tmp_path: Path) -> None:
    assert message_of(tmp_path / "a\nb").endswith("a\\nb: no such trace file")


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "trace.json"
    with pytest.raises(InputError) as caught:
        Trace.model_validate(trace()).save(path)
    assert str(caught.value) == f"{path}: cannot write this file: No such file or directory"


def test_a_layer_is_tied_to_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace(layer(), layer(tied_to=0))))
    assert Trace.load(path).layers[1].tied_to == 0
    for number in (1, 7, MAX_COUNT):
        path.write_text(json.dumps(trace(layer(), layer(tied_to=number))))
        expected = "layers.1.tied_to: must be the number of an earlier layer, counted from 0, got"
        assert f"{expected} {number}" in message_of(path)
