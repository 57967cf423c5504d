"""The options of `roundel train`, and which setting each one sets."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import knobs_of
from .traces.errors import InputError
from .train_settings import Flag, TrainConfig

MODEL, DATA, TRAINING = "The model", "The data", "Training"
KEEPING, WATCHING = "Checkpoints", "What is written down"

FLAGS: dict[str, Flag] = {
    "model": ("--model", "model", "name"),
    "tied": ("--tied", "model", "tied"),
    "dropout": ("--dropout", "model", "dropout"),
    "ffn_chunk": ("--ffn-chunk", "model", "ffn_chunk"),
    "dtype": ("--dtype", "model", "dtype"),
    "compute_dtype": ("--compute-dtype", "model", "compute_dtype"),
    "autocast": ("--autocast", "model", "autocast"),
    "data": ("--data", "data", "source"),
    "tokenizer": ("--tokenizer", "data", "tokenizer"),
    "sequence": ("--sequence", "data", "sequence"),
    "held_out": ("--held-out", "data", "held_out"),
    "policy": ("--policy", "policy", "name"),
    "partition": ("--partition", "policy", "partition"),
    "recompute": ("--recompute", "policy", "recompute"),
    "recompute_layers": ("--recompute-layers", "policy", "recompute_layers"),
    "chunks": ("--chunks", "policy", "chunks"),
    "round_size": ("--round-size", "policy", "round_size"),
    "optimizer": ("--optimizer", "policy", "optimizer"),
    "optimizer_on": ("--optimizer-on", "policy", "optimizer_on"),
    "activations": ("--activations", "policy", "activations"),
    "clip": ("--clip", "policy", "clip"),
    "weight_share": ("--weight-share", "policy", "weight_share"),
    "own_knobs": ("--set", "policy", "set"),
    "devices": ("--devices", "train", "devices"),
    "microbatches": ("--microbatches", "train", "microbatches"),
    "batch": ("--batch", "train", "batch"),
    "steps": ("--steps", "train", "steps"),
    "optim": ("--optim", "train", "optimizer"),
    "lr": ("--lr", "train", "lr"),
    "weight_decay": ("--weight-decay", "train", "weight_decay"),
    "schedule": ("--schedule", "train", "schedule"),
    "warmup": ("--warmup", "train", "warmup"),
    "clip_norm": ("--clip-norm", "train", "clip_norm"),
    "memory": ("--memory", "train", "memory"),
    "host_memory": ("--host-memory", "train", "host_memory"),
    "seed": ("--seed", "train", "seed"),
    "on_nan": ("--on-nan", "train", "on_nan"),
    "checkpoints": ("--checkpoints", "checkpoint", "folder"),
    "save_every": ("--save-every", "checkpoint", "every"),
    "keep": ("--keep", "checkpoint", "keep"),
    "resume": ("--resume", "checkpoint", "resume"),
    "log": ("--log", "log", "file"),
    "evaluate_every": ("--evaluate-every", "log", "evaluate_every"),
    "timeline": ("--timeline", "log", "timeline"),
    "timeline_step": ("--timeline-step", "log", "timeline_step"),
    "perfetto": ("--perfetto", "log", "perfetto"),
}
"""The flag of each of the command's parameters, and the section and field that it sets."""


def _option(flag: str, help: str, panel: str) -> Any:
    """An option, its default in its help."""
    names = flag.split()
    fields = [field for name, *field in FLAGS.values() if name == names[0].partition("/")[0]]
    default = getattr(getattr(TrainConfig(), fields[0][0]), fields[0][1]) if fields else None
    said = ", ".join(default) if isinstance(default, list) else default
    text = help.removesuffix(".") + (f" ({said})." if said else ".")
    return typer.Option(*names, help=text, rich_help_panel=panel)


What = Annotated[
    str | None, typer.Argument(metavar="TOML|MODEL", help="A TOML file, or what --model takes.")
]
Model = Annotated[
    str | None,
    _option(
        "--model",
        "A preset's name, a Hugging Face config.json or folder, or file.py:function, which "
        "returns layers or (layers, loss_fn).",
        MODEL,
    ),
]
Tied = Annotated[
    bool | None, _option("--tied/--untied", "A preset's head shares its embedding.", MODEL)
]
Dropout = Annotated[float | None, _option("--dropout", "Of a preset", MODEL)]
FfnChunk = Annotated[
    int | None,
    _option(
        "--ffn-chunk",
        "Of a preset: tokens in a block's feed-forward part at a time, for long sequences.",
        MODEL,
    ),
]
Dtype = Annotated[str | None, _option("--dtype", "Of the weights that are updated", MODEL)]
ComputeDtype = Annotated[
    str | None, _option("--compute-dtype", "Of the weights on the devices.", MODEL)
]
Autocast = Annotated[str | None, _option("--autocast", "Run layers under autocast.", MODEL)]

Data = Annotated[
    str | None,
    _option(
        "--data",
        "Files or folders of text, python-stdlib or shakespeare, with commas between; or "
        "file.py:function.",
        DATA,
    ),
]
Tokenizer = Annotated[
    str | None, _option("--tokenizer", "A tokenizer.json, or bytes; else the model's own.", DATA)
]
Sequence = Annotated[int | None, _option("--sequence", "Tokens of a sample", DATA)]
HeldOut = Annotated[float | None, _option("--held-out", "The share that is held out", DATA)]

PolicyName = Annotated[
    str | None,
    _option(
        "--policy -p",
        "A policy's name, file.py:Class, or auto: simulate them all on this machine, take the "
        "winner.",
        "The policy's knobs",
    ),
]
DeviceNames = Annotated[
    str | None,
    _option(
        "--devices -d",
        "As in cuda:0,cuda:1 or cpu,cpu; or their number. Without it all CUDA devices, or two "
        "virtual ones on the CPU.",
        TRAINING,
    ),
]
Microbatches = Annotated[
    int | None,
    _option(
        "--microbatches -m",
        "Microbatches a step; else two a device, with auto more where nothing fits.",
        TRAINING,
    ),
]
Batch = Annotated[int | None, _option("--batch", "Samples a step", TRAINING)]
Steps = Annotated[int | None, _option("--steps", "Steps in all", TRAINING)]
Optim = Annotated[str | None, _option("--optim", "A class of torch.optim", TRAINING)]
Lr = Annotated[float | None, _option("--lr", "Learning rate", TRAINING)]
WeightDecay = Annotated[float | None, _option("--weight-decay", "Of matrices.", TRAINING)]
Schedule = Annotated[
    str | None,
    _option("--schedule", "Of the rate: constant, linear or cosine", TRAINING),
]
Warmup = Annotated[int | None, _option("--warmup", "Steps over which the rate rises.", TRAINING)]
ClipNorm = Annotated[float | None, _option("--clip-norm", "Clip gradients to this.", TRAINING)]
Memory = Annotated[
    str | None, _option("--memory", "Of each device, as in 24GiB; else all there is.", TRAINING)
]
HostMemory = Annotated[
    str | None,
    _option("--host-memory", "Of the host, as in 128GiB; else all but 4 % and 2 GiB.", TRAINING),
]
Seed = Annotated[int | None, _option("--seed", "Of weights, data and dropout", TRAINING)]
OnNan = Annotated[
    str | None,
    _option("--on-nan", "stop or 'go on' where the loss is not a number", TRAINING),
]

Folder = Annotated[
    str | None,
    _option("--checkpoints", "Folder of checkpoints; none: nowhere.", KEEPING),
]
SaveEvery = Annotated[int | None, _option("--save-every", "Steps between checkpoints.", KEEPING)]
Keep = Annotated[int | None, _option("--keep", "How many checkpoints stay", KEEPING)]
Resume = Annotated[
    bool | None, _option("--resume/--no-resume", "Go on from the newest checkpoint.", KEEPING)
]

Log = Annotated[str | None, _option("--log", "JSON lines, one a step; none: not.", WATCHING)]
EvaluateEvery = Annotated[
    int | None, _option("--evaluate-every", "Steps between held-out losses.", WATCHING)
]
TimelinePicture = Annotated[
    str | None, _option("--timeline", "Draw a real step, png, svg or pdf; none: not.", WATCHING)
]
TimelineStep = Annotated[
    int | None, _option("--timeline-step", "Which step, from 1; else the last.", WATCHING)
]
Perfetto = Annotated[
    str | None, _option("--perfetto", "Chrome trace of that step; none: not.", WATCHING)
]
Debug = Annotated[bool, _option("--debug", "Show the traceback of what goes wrong.", WATCHING)]


def flags_of(given: dict[str, Any]) -> tuple[Path | None, dict[Flag, Any]]:
    """The TOML file, if one was named, and the flags with their values. Raises InputError."""
    what, own = given["what"], given["own_knobs"]
    values = {flag: given[name] for name, flag in FLAGS.items()}
    values[FLAGS["own_knobs"]] = knobs_of({"own": own}) if own else None
    if what is None or what.endswith(".toml"):
        return (Path(what) if what else None), values
    if given["model"] not in (None, what):
        raise InputError(f"--model: {given['model']} or {what}? name one model")
    return None, {**values, FLAGS["model"]: what}
