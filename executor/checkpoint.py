"""Checkpoints: all that a training needs to go on as if it had never stopped.

`FOLDER/step-00000010/` holds the state after ten steps:

    model.safetensors   the masters of all weights, and persistent buffers, by the model's names
    optimizer.pt        the optimizer's state and groups, by the same names; of a very large weight
                        that is updated in slices by `name[row:]`, a slice's first row
    older.safetensors   in stale mode only: the weights that the next step still works on
    rng.pt              the process's random numbers: torch's, CUDA's, Python's and NumPy's
    trainer.json        step, seed, versions, and size and checksum of each of the other files

Nothing in it depends on the policy, the devices or the cut, so it loads under any others. What is
the user's own is not in it: a learning-rate scheduler, and where in the data the training stood.
"""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..policies.policy import policy_name
from ..traces.errors import InputError, shown
from ..traces.json_files import read_model, write_model
from ..traces.trace import Count, Trace
from .folders import checksum, clean, discard, whole_folders, write_whole
from .older import older_weights
from .optimizer_state import OptimizerFile, save_optimizer
from .places import device_name
from .random_state import random_state, set_random_state
from .weight_file import WeightFile, save_weights

if TYPE_CHECKING:
    from .trainer import Trainer

FORMAT: Final = "roundel.checkpoint/1"
NAME = r"step-\d{8,}"
MODEL, OPTIMIZER, OLDER = "model.safetensors", "optimizer.pt", "older.safetensors"
RANDOM, MANIFEST = "rng.pt", "trainer.json"


class FileSum(BaseModel):
    """What a file of a checkpoint must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nbytes: Count
    crc32: Count


class Manifest(BaseModel):
    """`trainer.json`. Of two checkpoints in a folder, the one with the higher `serial` is newer.

    trace: what the layers cost, which is true where training goes on under the same `conditions`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["roundel.checkpoint/1"] = FORMAT
    step: Count
    serial: Count
    seed: Annotated[int, Field(strict=True)]
    policy: str
    optimizer: str
    versions: dict[str, str]
    files: dict[str, FileSum]
    conditions: str
    microbatch: str = ""
    trace: Trace | None


def save_checkpoint(trainer: "Trainer", folder: Path, keep: int = 2) -> Path:
    """Write a checkpoint into `folder`, then delete all there but the newest `keep`.

    Waits for the last step's updates. Killed at any moment, the process leaves the last whole
    checkpoint as it was. Only one process at a time may save into a folder. Raises InputError where
    the checkpoint cannot be written, and what went wrong in an update.
    """
    if keep < 1:
        raise InputError(f"keep: must be at least 1, got {keep}")
    if trainer._closed:
        raise InputError("this trainer is closed; save before it is")
    trainer.flush()
    path = folder / f"step-{trainer.step_number:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder, NAME)
        serial = 1 + max(_serials(folder).values(), default=0)
        write_whole(path, lambda unfinished: _write(trainer, unfinished, serial))
        serials = _serials(folder)
        for each in sorted(serials, key=lambda each: serials[each])[:-keep]:
            discard(each)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{shown(folder)}: cannot save a checkpoint: {_reason(error)}") from error
    return path


def load_checkpoint(trainer: "Trainer", folder: Path) -> int:
    """Go on from the newest checkpoint in `folder`, or from `folder` where it is one itself.

    Returns the number of steps done. The process's random numbers go on from the checkpoint's. The
    optimizer's groups get the checkpoint's hyperparameters, such as the learning rate: make a
    scheduler before, and load its own state after. Raises InputError, with nothing changed, where
    there is no checkpoint, or a damaged one, or one of another model or optimizer.
    """
    path = folder if (folder / MANIFEST).exists() else latest(folder)
    if path is None:
        raise InputError(f"{shown(folder)}: there is no checkpoint here")
    manifest = _checked_manifest(path, type(trainer.optimizer).__name__)
    weights = WeightFile(trainer.layers, path / MODEL)
    optimizer = OptimizerFile(trainer.masters, path / OPTIMIZER)
    older = load_file(path / OLDER) if OLDER in manifest.files else {}
    trainer.flush()
    trainer._release()
    optimizer.apply(weights.apply())
    trainer._older = older
    trainer.step_number = manifest.step
    trainer._randomness.seed = manifest.seed
    if manifest.conditions == _conditions(trainer):
        trainer._earlier = manifest.microbatch, manifest.trace
    set_random_state(torch.load(path / RANDOM, weights_only=True))
    return manifest.step


def latest(folder: Path) -> Path | None:
    """The checkpoint in `folder` that was saved last; None if there is none.

    One whose trainer.json is damaged counts as the last, so that it is not passed over in silence.
    """
    serials = _serials(folder)
    return max(_checkpoints(folder), key=lambda path: serials.get(path, torch.inf), default=None)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in whole_folders(folder, NAME) if (path / MANIFEST).exists()]


def _serials(folder: Path) -> dict[Path, int]:
    """The serial numbers of the checkpoints in a folder, of those that can be read."""
    serials = {}
    for path in _checkpoints(folder):
        try:
            serials[path] = read_model(Manifest, path / MANIFEST, "checkpoint").serial
        except InputError:
            continue
    return serials


def _write(trainer: "Trainer", path: Path, serial: int) -> None:
    """Fill an empty folder."""
    save_weights(trainer.layers, path / MODEL)
    save_optimizer(trainer.masters, path / OPTIMIZER)
    with (path / RANDOM).open("wb") as file:
        torch.save(random_state(trainer.devices), file)
    older = _older(trainer)
    if older:
        save_file(older, path / OLDER)
    manifest = Manifest(
        step=trainer.step_number,
        serial=serial,
        seed=trainer._randomness.seed,
        policy=policy_name(trainer.policy),
        optimizer=type(trainer.optimizer).__name__,
        versions=_versions(),
        files={each.name: _sum_of(each) for each in sorted(path.iterdir())},
        conditions=_conditions(trainer),
        microbatch=trainer._microbatch,
        trace=trainer.trace,
    )
    write_model(manifest, path / MANIFEST)


def _versions() -> dict[str, str]:
    """Who wrote this. Packages that run from their sources, not installed, have no version."""
    versions = {"python": platform.python_version()}
    for name in ("roundel", "torch", "safetensors", "numpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _reason(error: BaseException) -> str:
    """Why a file could not be written. Torch says so in what it raises on the way to its error."""
    before = error.__context__
    if isinstance(before, OSError) and not isinstance(error, OSError):
        error = before
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def _older(trainer: "Trainer") -> dict[str, Tensor]:
    if trainer._ready is None:
        return trainer._older
    copies = trainer._ready.machinery.host_copies
    return older_weights(trainer.layers, copies, trainer.step_number)


def _conditions(trainer: "Trainer") -> str:
    """What the measured costs of the layers depend on."""
    name = device_name(trainer.devices[0])
    dtypes = f"compute {trainer._compute_dtype}, autocast {trainer._autocast}"
    layers = range(len(trainer.layers))
    sizes = [
        sum(p.numel() for p in trainer.layers.parameters_of(layer).values()) for layer in layers
    ]
    return f"{trainer.microbatches} microbatches, {name}, {dtypes}, layers {sizes}"


def _sum_of(path: Path) -> FileSum:
    return FileSum(nbytes=path.stat().st_size, crc32=checksum(path))


def _checked_manifest(path: Path, optimizer: str) -> Manifest:
    """The manifest of a checkpoint whose files are whole and whose optimizer is such a one."""
    manifest = read_model(Manifest, path / MANIFEST, "checkpoint")
    for name in dict.fromkeys((MODEL, OPTIMIZER, RANDOM, *manifest.files)):
        file = path / name
        if not file.is_file():
            raise InputError(f"{shown(file)}: missing; use another checkpoint")
        if _sum_of(file) != manifest.files.get(name):
            raise InputError(f"{shown(file)}: damaged; use another checkpoint")
    if manifest.optimizer != optimizer:
        raise InputError(
            f"{shown(path)}: its optimizer is {manifest.optimizer}, here it is {optimizer}; "
            f"to begin with its weights alone, load_weights from its {MODEL}"
        )
    return manifest
