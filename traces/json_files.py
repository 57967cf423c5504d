"""JSON that people write, as pydantic models: read, checked, and written."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .errors import InputError, escaped, shown

Model = TypeVar("Model", bound=BaseModel)


def read_model(model: type[Model], path: str | Path, what: str) -> Model:
    """The `model` in a JSON file; `what` names the kind of file ("trace") in error messages.

    Raises InputError naming the file, the field and the mistake. The file's `format` must be the
    model's default.
    """
    data = read_json(Path(path), what)
    tag = model.model_fields["format"].default
    if isinstance(data, dict) and "format" not in data:
        raise InputError(f'{shown(path)}: format: missing; add "format": "{tag}"')
    if isinstance(data, dict) and data["format"] != tag:
        got = _short(data["format"]) or "something else"
        raise InputError(f'{shown(path)}: format: must be "{tag}", got {got}')
    return parse_model(model, data, shown(path))


def read_json(path: Path, what: str) -> Any:
    """The JSON value in `path`; `what` names the kind of file in the error message.

    NaN and Infinity come back as floats, so that the field that holds them can be named.
    """
    name, text = shown(path), read_text(path, f"{what} file", f"{what} file")
    try:
        return json.loads(text, parse_int=_parse_int, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name}: not a {what} file: no JSON at line {error.lineno}: {error.msg}"
        ) from None
    except RecursionError:
        raise InputError(f"{name}: not a {what} file: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{name}: not a {what} file: {error}") from None


def read_text(path: Path, file: str, kind: str) -> str:
    """What is in a text file, called `file`, or a `kind` where it is not one, in error messages.

    Raises InputError. A byte order mark at its beginning, as some editors write, is left out.
    """
    name = shown(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{name}: no such {file}") from None
    except OSError as error:
        raise InputError(f"{name}: cannot read this {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{name}: not a {kind}: it is not text") from None


def parse_model(model: type[Model], data: Any, where: str) -> Model:
    """`data` as a `model`, or an InputError that names `where`, the field and the mistake."""
    if not isinstance(data, dict):
        raise InputError(f"{where}: must be a JSON object, got {_short(data) or 'something else'}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_mistake(error)}") from None


def write_model(model: BaseModel, path: str | Path) -> None:
    """Write `model` as JSON that `read_model` reads back equal. Raises InputError if it cannot."""
    try:
        Path(path).write_text(model.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot write this file: {error.strerror}") from None


def _parse_int(text: str) -> int:
    # Python refuses to read very long numbers, without naming the field. This many digits are
    # beyond the limit of every field already.
    return int(text[:100])


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{escaped(twice)}: given twice in one object")
    return result


def _first_mistake(error: ValidationError) -> str:
    # pydantic finds a list too short when its only element is wrong. A misspelt field is also a
    # missing one; the misspelling is the mistake to show.
    mistakes = [each for each in error.errors() if each["type"] != "too_short" or not each["input"]]
    first, *others = sorted(mistakes, key=lambda mistake: mistake["type"] == "missing")
    field = ".".join(escaped(str(part)) for part in first["loc"])
    kind = first["type"]
    plain = _PLAIN.get(kind, first["msg"].removeprefix("Value error, "))
    message = plain.format(**first.get("ctx", {})) if kind in _PLAIN else plain
    got = "" if kind in _WITHOUT_INPUT else _short(first["input"])
    parts = [f"{field}: " if field else "", message, f", got {got}" if got else ""]
    return "".join(parts) + (f" (and {len(others)} more)" if others else "")


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) < 60 else ""


_PLAIN = {
    "missing": "missing; add it",
    "extra_forbidden": "no such field; check the spelling",
    "int_type": "must be a whole number",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "model_type": "must be a JSON object",
    "too_short": "must not be empty",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must not be negative",
    "less_than_equal": "must be at most {le}",
}
_WITHOUT_INPUT = ("missing", "extra_forbidden", "value_error", "too_short")
