"""Imports point up the list of folders only, and importing anything starts nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "traces": {"traces"},
    "policies": {"traces", "policies"},
    "sim": {"traces", "policies", "sim"},
    "executor": {"traces", "policies", "executor"},
    "analysis": {"traces", "analysis"},
    "roundel": {"traces", "policies", "sim", "executor", "analysis", "roundel"},
}
PACKAGES = {
    "torch": {"executor"},
    "simpy": {"sim"},
    "networkx": {"sim"},
    "pandas": {"analysis"},
    "matplotlib": {"analysis"},
}
FILES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).glob("**/*.py"))]


def imported(path: Path) -> list[str]:
    """Modules that a file imports, relative ones as `roundel.folder...`."""
    folder = path.parent.name
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = {0: "", 1: f"roundel.{folder}", 2: "roundel"}[node.level]
            names.append(".".join(filter(None, (base, node.module))))
    return [name.replace("roundel.roundel", "roundel") for name in names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_up_the_list(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        first, _, rest = name.partition(".")
        if first == "roundel":
            target = rest.partition(".")[0]
            inside = target if target in MAY_IMPORT else "roundel"
            assert inside in MAY_IMPORT[folder], f"{folder} must not import {name}"
        assert folder in PACKAGES.get(first, {folder}), f"{folder} must not import {first}"


def test_importing_starts_no_thread_and_needs_no_torch() -> None:
    code = (
        "import threading, sys; before = threading.active_count(); import roundel, roundel.cli;"
        "assert threading.active_count() == before; assert 'torch' not in sys.modules;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
