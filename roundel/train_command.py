"""`roundel train`."""

import traceback

import typer

from . import options as opt
from . import train_options as own
from .traces.errors import InputError
from .train_run import run_training
from .train_settings import read_settings


def train(
    what: own.What = None,
    model: own.Model = None,
    tied: own.Tied = None,
    dropout: own.Dropout = None,
    ffn_chunk: own.FfnChunk = None,
    dtype: own.Dtype = None,
    compute_dtype: own.ComputeDtype = None,
    autocast: own.Autocast = None,
    data: own.Data = None,
    tokenizer: own.Tokenizer = None,
    sequence: own.Sequence = None,
    held_out: own.HeldOut = None,
    policy: own.PolicyName = None,
    partition: opt.Partition = None,
    recompute: opt.RecomputeOption = None,
    recompute_layers: opt.RecomputeLayers = None,
    chunks: opt.Chunks = None,
    round_size: opt.RoundSize = None,
    optimizer: opt.OptimizerOption = None,
    optimizer_on: opt.OptimizerOn = None,
    activations: opt.Activations = None,
    clip: opt.Clip = None,
    weight_share: opt.WeightShare = None,
    own_knobs: opt.Set = None,
    devices: own.DeviceNames = None,
    microbatches: own.Microbatches = None,
    batch: own.Batch = None,
    steps: own.Steps = None,
    optim: own.Optim = None,
    lr: own.Lr = None,
    weight_decay: own.WeightDecay = None,
    schedule: own.Schedule = None,
    warmup: own.Warmup = None,
    clip_norm: own.ClipNorm = None,
    memory: own.Memory = None,
    host_memory: own.HostMemory = None,
    seed: own.Seed = None,
    on_nan: own.OnNan = None,
    checkpoints: own.Folder = None,
    save_every: own.SaveEvery = None,
    keep: own.Keep = None,
    resume: own.Resume = None,
    log: own.Log = None,
    evaluate_every: own.EvaluateEvery = None,
    timeline: own.TimelinePicture = None,
    timeline_step: own.TimelineStep = None,
    perfetto: own.Perfetto = None,
    debug: own.Debug = False,
) -> None:
    """Train a model with a policy, for real: a TOML file, flags, or flags over a file."""
    path, flags = own.flags_of(locals())
    try:
        code = run_training(read_settings(path, flags), debug)
    except InputError:
        if debug:
            traceback.print_exc()
        raise
    raise typer.Exit(code)
