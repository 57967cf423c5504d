"""A user's own Python file."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def run_file(path: Path) -> ModuleType:
    """The module in a file that is there, run anew. Raises whatever it raises."""
    # The absolute path as the module's name collides with no other, and dataclasses look it up.
    spec = spec_from_file_location(str(path.resolve()), path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
