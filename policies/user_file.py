"""A user's own Python file: run, and what went wrong in it."""

import sys
import traceback
from contextlib import redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def is_in_file(name: str) -> bool:
    """Whether this names something in a user's file: `file.py:NAME`."""
    return name.rpartition(":")[0].endswith(".py")


def run_file(path: Path) -> ModuleType:
    """The module in a file that is there, run anew. Raises whatever it raises.

    What it prints goes to standard error: output that programs read is not its own.
    """
    # The absolute path as the module's name collides with no other, and dataclasses look it up.
    spec = spec_from_file_location(str(path.resolve()), path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    with redirect_stdout(sys.stderr):
        spec.loader.exec_module(module)
    return module


def failure(error: BaseException, path: Path | None = None) -> str:
    """Where and what an exception is, in one line: the last line in the file at `path`, or
    without one in whichever file."""
    frames = list(traceback.extract_tb(error.__traceback__))
    if path is not None:
        frames = [each for each in frames if Path(each.filename).resolve() == path.resolve()]
    line = frames[-1].lineno if frames else None
    if isinstance(error, SyntaxError) and path is not None:
        line = error.lineno
    file = f"{Path(frames[-1].filename).name} " if frames and path is None else ""
    where = f"{file}line {line}: " if line else ""
    message = " ".join(str(error).split())
    return f"{where}{type(error).__name__}" + (f": {message}" if message else "")
