"""The user's mistakes, in one line each."""

import json
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class InputError(ValueError):
    """A wrong input. Its message is one line that says what is wrong and what to do."""


def read_json(path: Path, what: str) -> Any:
    """The JSON value in `path`; `what` names the kind of file in the error message."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what} file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read this {what} file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a {what} file: it is not text") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: not a {what} file: no JSON at line {error.lineno}: {error.msg}"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not a {what} file: {error}") from None


def parse_model(model: type[Model], data: Any, where: str) -> Model:
    """`data` as a `model`, or an InputError that names `where`, the field and the mistake."""
    if not isinstance(data, dict):
        raise InputError(f"{where}: must be a JSON object, not {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_mistake(error)}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON allows")


def _first_mistake(error: ValidationError) -> str:
    first, *others = error.errors()
    field = ".".join(str(part) for part in first["loc"])
    message = _PLAIN.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    more = f" (and {len(others)} more)" if others else ""
    shown = repr(first["input"])
    got = f", got {shown}" if first["type"] not in ("missing", "value_error") else ""
    got = got if len(got) < 60 else ""
    return f"{field}: {message}{got}{more}" if field else f"{message}{more}"


_PLAIN = {
    "missing": "missing; add it",
    "extra_forbidden": "no such field; check the spelling",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "greater_than_equal": "must not be negative",
}
