"""Models and data by name: presets, Hugging Face folders, and functions in a user's file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..policies.user_file import failure, is_in_file, run_file
from ..traces.errors import InputError, shown
from .compute import LossFunction
from .decoder import decoder_layers
from .layers import Layers
from .presets import PRESETS
from .text import TextBatches, load_tokens
from .token_loss import token_loss
from .training_loop import Batches


@dataclass(frozen=True)
class Model:
    """Layers, the loss of the last one's output, and how many tokens it knows, where it says."""

    layers: Layers
    loss_fn: LossFunction
    vocabulary: int | None = None


def load_model(
    source: str,
    *,
    tied: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    empty: bool = False,
    ffn_chunk: int | None = None,
    draw_on: torch.device | None = None,
) -> Model:
    """The model called `source`; `empty`: without memory for weights, which no function's has.

    A preset; a Hugging Face config.json (new weights) or folder (its weights where it has any); or
    `file.py:function`, which returns layers or (layers, loss_fn). Raises InputError.
    """
    torch.manual_seed(seed)
    if source in PRESETS:
        preset = PRESETS[source]
        layers = decoder_layers(
            preset.shape,
            tied,
            dropout,
            rotary_base=preset.rotary_base,
            dtype=dtype,
            device="meta" if empty else "cpu",
            head_in_loss=True,
            ffn_chunk=ffn_chunk,
            draw_on=draw_on,
        )
        return Model(Layers(layers), token_loss, preset.shape.vocabulary)
    if tied or dropout or ffn_chunk:
        raise InputError(
            "model: tied, dropout and ffn_chunk are for presets; set them in the model itself"
        )
    if is_in_file(source):
        return _from_function(source)
    return _from_hugging_face(source, dtype, empty)


def tokenizer_of(source: str) -> str | None:
    """The tokenizer.json in a Hugging Face model's folder, if there is one."""
    path = Path(source)
    folder = path.parent if path.name == "config.json" else path
    file = folder / "tokenizer.json"
    return str(file) if (folder / "config.json").is_file() and file.is_file() else None


def load_batches(
    source: str | Sequence[str],
    *,
    batch: int,
    sequence: int,
    held_out: float,
    seed: int,
    tokenizer: str | None = None,
) -> Batches:
    """The data called `source`: texts (see `load_tokens`), or the batches of a user's function.

    A `file.py:function` is called with batch, sequence and seed by name, and returns `Batches`.
    Raises InputError.
    """
    names = [source] if isinstance(source, str) else list(source)
    if len(names) == 1 and is_in_file(names[0]):
        return _batches_of(names[0], batch=batch, sequence=sequence, seed=seed)
    tokens = load_tokens(names, tokenizer)
    return TextBatches(tokens, batch, sequence, held_out=held_out, seed=seed)


def check_vocabulary(model: Model, batches: Batches) -> None:
    """Raises InputError where the text has a token that the model does not know."""
    known = model.vocabulary
    if known is not None and isinstance(batches, TextBatches) and batches.largest >= known:
        raise InputError(
            f"data: has the token {batches.largest}, the model only knows {known}; "
            "use the model's own tokenizer"
        )


def _batches_of(source: str, **arguments: int) -> Batches:
    made = _call(source, load_function(source, "data"), **arguments)
    if not hasattr(made, "batch") or not hasattr(made, "held_out"):
        raise InputError(f"{source}: must return an object with batch and held_out")
    return made  # type: ignore[no-any-return]


def load_function(source: str, what: str) -> Callable[..., Any]:
    """The function of a `file.py:function`; `what` it is for. Raises InputError."""
    name, _, function = source.rpartition(":")
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{what}: {shown(path)}: no such file")
    try:
        module = run_file(path)
    except (Exception, SystemExit) as error:
        raise InputError(f"{shown(path)}: {failure(error, path)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise InputError(f"{shown(path)}: no function {function!r} in it")
    return found  # type: ignore[no-any-return]


def _call(source: str, function: Callable[..., Any], **arguments: object) -> Any:
    path = Path(source.rpartition(":")[0])
    try:
        return function(**arguments)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{source}: {failure(error, path)}") from error


def _from_function(source: str) -> Model:
    made = _call(source, load_function(source, "model"))
    layers, loss_fn = made, token_loss
    if isinstance(made, tuple) and len(made) == 2 and not isinstance(made[1], nn.Module):
        layers, loss_fn = made
    if not isinstance(layers, Layers):
        is_modules = isinstance(layers, Sequence | nn.Sequential)
        if not is_modules or not all(isinstance(each, nn.Module) for each in layers):
            raise InputError(f"{source}: must return layers (modules), or (layers, loss_fn)")
        layers = Layers(layers)
    return Model(layers, loss_fn)


def _from_hugging_face(source: str, dtype: torch.dtype, empty: bool) -> Model:
    path = Path(source)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model: no model {source!r}; use a preset ({', '.join(PRESETS)}), a Hugging Face "
            "config.json or folder with one, or file.py:function"
        )
    try:
        transformers = import_module("transformers")
    except ImportError:
        raise InputError(f"model: {source} needs: pip install transformers") from None
    from .huggingface import split_causal_lm

    has_weights = path.is_dir() and any(path.glob("*.safetensors")) and not empty
    try:
        with _without_bars(transformers.utils.logging), torch.device("meta" if empty else "cpu"):
            model = _hugging_face_model(transformers, folder, dtype, has_weights)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model: {shown(folder)}: {reason}") from error
    return Model(split_causal_lm(model, head_in_loss=True), token_loss, model.config.vocab_size)


def _hugging_face_model(
    transformers: Any, folder: Path, dtype: torch.dtype, has_weights: bool
) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    make = transformers.AutoModelForCausalLM
    if has_weights:
        return make.from_pretrained(folder, dtype=dtype, local_files_only=True)
    # Not by `to` afterwards, which would round the rotary frequencies, and hold all weights twice.
    return make.from_config(config, dtype=dtype)


@contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    """Transformers shows no progress bars of its own."""
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            logging.enable_progress_bar()
