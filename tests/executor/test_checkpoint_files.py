"""Checkpoints as files: which is the newest, what is kept, killed saves, and what is wrong."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import roundel
from roundel.executor import checkpoint, folders
from roundel.executor.checkpoint import latest
from roundel.executor.weight_file import load_weights

from . import toy
from .test_checkpoint import make

KILLED = Path(__file__).with_name("killed.py")


def trainer_at(step: int, layers: Any = None, **options: Any) -> Any:
    """A trainer that pretends to have done some steps."""
    trainer = make(layers or toy.blocks(2), options.pop("policy", roundel.GPipe()), **options)
    trainer.step_number = step
    return trainer


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return trainer_at(step).save(folder, keep)


def load(folder: Path, layers: Any = None, **options: Any) -> int:
    return trainer_at(0, layers, **options).load(folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_nothing_else_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    assert latest(folder) is None
    for step in (1, 2, 30, 100_000_000):
        path = save(folder, step)
        (folder / "notes.txt").touch()
        (folder / "step-of-mine").mkdir(exist_ok=True)
        assert latest(folder) == path
        assert load(folder) == step
    assert names(folder) == ["notes.txt", "step-00000030", "step-100000000", "step-of-mine"]
    assert load(folder / "step-00000030") == 30


def test_the_newest_is_the_one_saved_last_not_the_one_of_the_most_steps(tmp_path: Path) -> None:
    """A run that went back, or a new one in an old folder, must not lose what it saves."""
    for step in (10, 20, 11):
        save(tmp_path, step)
    assert load(tmp_path) == 11
    assert names(tmp_path) == ["step-00000011", "step-00000020"]
    save(tmp_path, 12)
    assert names(tmp_path) == ["step-00000011", "step-00000012"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    trainer = trainer_at(5)
    with torch.no_grad():
        for each in trainer.layers.modules:
            each[0].bias.fill_(42)
    trainer.save(tmp_path)
    assert names(tmp_path) == ["step-00000005"]
    assert set(
        load_file(tmp_path / "step-00000005" / "model.safetensors")["0.0.bias"].tolist()
    ) == {42}


def test_files_have_the_models_own_names(tmp_path: Path) -> None:
    path = trainer_at(0, toy.tied_model()).save(tmp_path)
    weights = load_file(path / "model.safetensors")
    assert [name for name in weights if "table" in name or "project" in name] == ["0.table.weight"]
    assert set(weights) == {name for name, _ in roundel.Layers(toy.tied_model()).named_parameters()}


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(folders, "sync", lambda path: synced.append(str(path.name)))
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        synced.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path / "run", 7)
    *files, last_file, renaming, parent = synced
    assert set(files) == {"model.safetensors", "optimizer.pt", "rng.pt", "trainer.json"}
    assert last_file == "step-00000007.partial"
    assert renaming == "step-00000007.partial -> step-00000007"
    assert parent == "run"


@pytest.mark.parametrize("how", ["at random", "before each operation", "replacing"])
def test_killed_saves_leave_the_last_whole_checkpoint(how: str, tmp_path: Path) -> None:
    """See killed.py, which forks and kills its children many times."""
    limit = 60 if toy.DEVICE == "cpu" else 200
    subprocess.run([sys.executable, KILLED, how, tmp_path], check=True, timeout=limit)


def test_what_a_killed_save_left_is_cleaned_by_the_next(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for left in ("step-00000002.partial", "step-00000001.old.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").touch()
    assert load(tmp_path) == 1
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "save_weights", full)
    with pytest.raises(roundel.InputError, match=r"cannot save a checkpoint: .*No space left"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert load(tmp_path) == 1


# ---- what is wrong


def shrink(name: str, folder: Path) -> None:
    file = folder / "step-00000001" / name
    file.write_bytes(file.read_bytes()[:-2])


def flip(name: str, folder: Path) -> None:
    file = folder / "step-00000001" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit(folder: Path, **fields: object) -> None:
    file = folder / "step-00000001" / "trainer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def other_groups(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    first, *rest = named.values()
    return [{"params": [first]}, {"params": rest}]


def frozen() -> list[nn.Module]:
    layers = toy.blocks(2)
    layers[0].requires_grad_(False)
    return layers


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no checkpoint here"),
        (lambda folder: shutil.rmtree(folder / "step-00000001"), "there is no checkpoint here"),
        (partial(shrink, "model.safetensors"), "step-00000001/model.safetensors: damaged"),
        (partial(flip, "model.safetensors"), "step-00000001/model.safetensors: damaged"),
        (partial(flip, "optimizer.pt"), "step-00000001/optimizer.pt: damaged"),
        (partial(shrink, "rng.pt"), "step-00000001/rng.pt: damaged"),
        (partial(shrink, "trainer.json"), "trainer.json: not a checkpoint file: no JSON"),
        (
            lambda folder: (folder / "step-00000001" / "rng.pt").unlink(),
            "step-00000001/rng.pt: missing",
        ),
        (partial(edit, format="roundel.checkpoint/2"), 'format: must be "roundel.checkpoint/1"'),
        (partial(edit, step="one"), "trainer.json: step: must be a whole number"),
    ],
)
def test_what_is_not_there_or_damaged_is_said(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save(tmp_path, 0)
    save(tmp_path, 1)
    shutil.rmtree(tmp_path / "step-00000000")
    damage(tmp_path)
    assert_refused(tmp_path, message)


def wider() -> list[nn.Module]:
    layers = toy.blocks(2)
    layers[0][0], layers[0][3] = nn.Linear(6, 5).double(), nn.Linear(5, 6).double()
    return layers


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (toy.blocks(3), {}, "of another model: it has no '2.0.weight' \\(and 3 more\\)"),
        (toy.blocks(1), {}, "of another model: this model has no '1.0.bias' \\(and 3 more\\)"),
        (
            wider(),
            {},
            r"'0.0.bias' has shape \[6\] there, \[5\] here \(and 2 more\)",
        ),
        (None, {"optimizer": partial(torch.optim.SGD, lr=1)}, "its optimizer is AdamW, here it is"),
        (frozen(), {}, "optimizer.pt: '0.0.weight' was trained there, it is frozen here"),
        (None, {"parameter_groups": other_groups}, "its parameters are in other groups"),
    ],
)
def test_another_model_or_optimizer_is_refused(
    layers: Any, options: dict, message: str, tmp_path: Path
) -> None:
    save(tmp_path, 1)
    assert_refused(tmp_path, message, layers, **options)


def assert_refused(folder: Path, message: str, layers: Any = None, **options: Any) -> None:
    """With one line, and nothing changed."""
    trainer = trainer_at(0, layers, **options)
    with torch.no_grad():
        for each in nn.Sequential(*trainer.layers.modules).parameters():
            each.fill_(3)
    torch.manual_seed(1)
    with pytest.raises(roundel.InputError, match=message) as caught:
        trainer.load(folder)
    assert "\n" not in str(caught.value)
    assert trainer.step_number == 0
    assert all((each == 3).all() for each in trainer.state_dict().values())
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(1))


def test_a_damaged_newest_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 1)
    shrink("trainer.json", tmp_path)
    assert_refused(tmp_path, "step-00000001/trainer.json: not a checkpoint file")
    assert load(tmp_path / "step-00000002") == 2
    save(tmp_path, 3)
    assert_refused(tmp_path, "step-00000001/trainer.json: not a checkpoint file")


def test_wrong_saves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(roundel.InputError, match="keep: must be at least 1, got 0"):
        save(tmp_path, 1, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(roundel.InputError, match=r"file: cannot save a checkpoint: .*File exists"):
        save(tmp_path / "file", 1)
    trainer = trainer_at(1)
    trainer.close()
    with pytest.raises(roundel.InputError, match="this trainer is closed"):
        trainer.save(tmp_path)
    trainer = trainer_at(1)
    trainer.optimizer.state[next(trainer.layers.modules[0].parameters())]["odd"] = Path()
    with pytest.raises(roundel.InputError, match="its state holds more than tensors and plain"):
        trainer.save(tmp_path)
    assert names(tmp_path) == ["file"]


# ---- files of weights alone


def test_weights_alone(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "model.safetensors"
    layers = [each.float() for each in toy.blocks(2)]
    for each in nn.Sequential(*layers).parameters():
        nn.init.zeros_(each)
    load_weights(layers, path)
    for mine, theirs in zip(
        nn.Sequential(*layers).parameters(), nn.Sequential(*toy.blocks(2)).parameters(), strict=True
    ):
        assert torch.equal(mine, theirs.float())


@pytest.mark.parametrize("name", ["0.table.weight", "7.project.weight"])
def test_tied_weights_go_by_any_of_their_names(name: str, tmp_path: Path) -> None:
    weights = dict(roundel.Layers(toy.tied_model()).named_parameters())
    weights[name] = weights.pop("0.table.weight").detach() + 1
    save_file(weights, tmp_path / "weights.safetensors")
    layers = toy.tied_model()
    load_weights(roundel.Layers(layers), tmp_path / "weights.safetensors")
    assert torch.equal(layers[-1].project.weight, weights[name])
    assert layers[0].table.weight is layers[-1].project.weight


def test_wrong_files_of_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    with pytest.raises(roundel.InputError, match=r"weights.safetensors: cannot read these weights"):
        load_weights(toy.blocks(2), file)
    file.write_text("nonsense")
    with pytest.raises(roundel.InputError, match=r"weights.safetensors: cannot read these weights"):
        load_weights(toy.blocks(2), file)
    save_file({"0.0.weight": torch.zeros(6, 6)}, file)
    with pytest.raises(roundel.InputError, match=r"it has no '0.0.bias' \(and 6 more\)"):
        load_weights(toy.blocks(2), file)
