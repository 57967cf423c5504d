"""The settings of a training: a TOML file, and flags that override it."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .executor.sizes import parse_bytes
from .options import knobs_of
from .policies.catalog import POLICIES, split_knobs
from .policies.plan import Optimizer, Place, Recompute
from .policies.user_file import is_in_file
from .traces.errors import InputError, shown
from .traces.json_files import parse_model, read_text

AUTO = "auto"

Wide = Literal["float32", "float64", "bfloat16", "float16"]
Narrow = Literal["bfloat16", "float16"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _listed(value: Any) -> Any:
    """`cpu,cpu` as a list."""
    return [each.strip() for each in value.split(",")] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    """A plain number as text."""
    return str(value) if type(value) is int else value


Names = Annotated[
    list[str], BeforeValidator(_listed), BeforeValidator(_as_text), Field(min_length=1)
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(_Section):
    """What is trained. `name`: a preset, a Hugging Face config or folder, or file.py:function.

    ffn_chunk: of a preset, tokens that go through a block's feed-forward part at a time.
    dtype: of the weights that the optimizer updates. compute_dtype: of those on the devices.
    """

    name: str = "decoder-tiny"
    tied: bool = False
    dropout: Share = 0.0
    ffn_chunk: Positive | None = None
    dtype: Wide = "float32"
    compute_dtype: Narrow | None = None
    autocast: Narrow | None = None


class DataSection(_Section):
    """What it is trained on. `source`: texts (files, folders, names), or file.py:function.

    tokenizer: a tokenizer.json, or `bytes`; None: the Hugging Face model's own, else bytes.
    """

    source: Names = ["python-stdlib"]
    tokenizer: str | None = None
    sequence: Positive = 128
    held_out: Share = 0.1


class PolicySection(_Section):
    """How the work is scheduled, and the policy's knobs, as `roundel simulate` has them."""

    name: str = AUTO
    partition: str | None = None
    recompute: Recompute | None = None
    recompute_layers: Positive | None = None
    chunks: Positive | None = None
    round_size: Positive | None = None
    optimizer: Optimizer | None = None
    optimizer_on: Place | None = None
    activations: Place | None = None
    clip: bool | None = None
    weight_share: Annotated[float, Field(ge=0, le=1)] | None = None
    set: dict[str, Any] = {}

    def knobs(self) -> dict[str, Any]:
        """The knobs that were given. Raises InputError."""
        return knobs_of(self.model_dump(exclude={"name", "set"})) | self.set


class TrainSection(_Section):
    """How it is trained.

    devices: torch's names, or a number: so many CUDA devices, or virtual ones on the CPU.
    optimizer: a class of torch.optim; `options` are arguments of its own.
    """

    devices: Names | None = None
    microbatches: Positive | None = None
    batch: Positive = 16
    steps: Positive = 100
    optimizer: str = "AdamW"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    options: dict[str, Any] = {}
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Count = 0
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    memory: Annotated[str | None, BeforeValidator(_as_text)] = None
    host_memory: Annotated[str | None, BeforeValidator(_as_text)] = None
    seed: Count = 0
    on_nan: Literal["stop", "go on"] = "stop"


class CheckpointSection(_Section):
    """Where checkpoints go: after every so many steps (0: only at the end)."""

    folder: str | None = None
    every: Count = 0
    keep: Positive = 2
    resume: bool = False


class LogSection(_Section):
    """What is written down: a JSON line a step, the picture of a real step, held-out losses."""

    file: str | None = None
    evaluate_every: Count = 0
    evaluate_batches: Positive = 8
    timeline: str | None = None
    timeline_step: Positive | None = None
    perfetto: str | None = None


class TrainConfig(_Section):
    """All settings of `roundel train`."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    policy: PolicySection = PolicySection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()


OFF = "none"
"""What turns a file's setting off, where a flag says so and `MAY_BE_OFF` has it."""

MAY_BE_OFF = {
    ("checkpoint", "folder"),
    ("log", "file"),
    ("log", "timeline"),
    ("log", "perfetto"),
    ("data", "tokenizer"),
}

Flag = tuple[str, str, str]
"""A flag, and the section and field that it sets."""


def read_settings(path: Path | None, flags: Mapping[Flag, Any]) -> TrainConfig:
    """The settings in a TOML file (None: the defaults), overridden by the flags that are not None.

    Raises InputError naming the file or flag, the field and the mistake.
    """
    data = {} if path is None else _read_toml(path)
    if path is not None:
        parse_model(TrainConfig, data, shown(path))
    config = parse_model(TrainConfig, data, "settings")
    for (flag, section, field), value in flags.items():
        if value is not None:
            off = value == OFF and (section, field) in MAY_BE_OFF
            changed = {**data.get(section, {}), field: None if off else value}
            data = {**data, section: changed}
            config = _parsed_flag(flag, section, field, data)
    try:
        _check(config)
    except InputError as error:
        raise InputError(f"{shown(path)}: {error}" if path else str(error)) from None
    return config


def _read_toml(path: Path) -> dict[str, Any]:
    name, text = shown(path), read_text(path, "file", "TOML file")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name}: not a TOML file: {error}") from None
    for section in TrainConfig.model_fields:
        if not isinstance(data.get(section, {}), dict):
            raise InputError(f"{name}: {section}: must be a table, [{section}]")
    return data


def _parsed_flag(flag: str, section: str, field: str, data: dict[str, Any]) -> TrainConfig:
    try:
        return parse_model(TrainConfig, data, "")
    except InputError as error:
        message = str(error).removeprefix(": ").removeprefix(f"{section}.{field}")
        raise InputError(f"{flag}{message}") from None


def _check(config: TrainConfig) -> None:
    """Mistakes between fields."""
    train, checkpoint, log, model = config.train, config.checkpoint, config.log, config.model
    if (train.microbatches or 1) > train.batch:
        raise InputError(
            f"train.microbatches: a batch of {train.batch} cannot be cut into {train.microbatches}"
        )
    for knob in config.policy.set:
        if knob != "set" and getattr(config.policy, knob, None) is not None:
            raise InputError(f"policy.set.{knob}: policy.{knob} is given, too; give one of them")
    if config.policy.clip and train.clip_norm is None:
        raise InputError("policy.clip: give the norm too, train.clip_norm (--clip-norm)")
    if checkpoint.folder is None and (checkpoint.every or checkpoint.resume):
        raise InputError("checkpoint.folder: missing; say where checkpoints are (--checkpoints)")
    if log.timeline_step and not (log.timeline or log.perfetto):
        raise InputError("log.timeline_step: say where the picture goes, log.timeline (--timeline)")
    if (log.timeline_step or 0) > train.steps:
        raise InputError(
            f"log.timeline_step: there are {train.steps} steps, got {log.timeline_step}"
        )
    if model.compute_dtype and model.autocast:
        raise InputError("model.autocast: give it or compute_dtype, not both")
    if train.warmup >= train.steps:
        raise InputError(
            f"train.warmup: must be fewer than the {train.steps} steps, got {train.warmup}; "
            "give another --warmup"
        )
    own_data = all(map(is_in_file, config.data.source))
    if log.evaluate_every and not config.data.held_out and not own_data:
        raise InputError("log.evaluate_every: nothing is held out; give a --held-out above 0")
    try:
        parse_bytes(train.memory)
        parse_bytes(train.host_memory, "host memory")
    except InputError as error:
        raise InputError(f"train.{error}") from None
    name = config.policy.name
    policy, _ = split_knobs(name)
    if name != AUTO and policy not in POLICIES and not is_in_file(policy):
        raise InputError(
            f"policy.name: no policy {name!r}; use {AUTO}, {', '.join(POLICIES)}, or file.py:Class"
        )
