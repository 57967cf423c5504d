"""What a training is made of, from its settings."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console

from .analysis.units import counted, human_rate
from .auto import (
    WEIGHT_SHARE,
    NothingFits,
    candidates,
    choose,
    load_choice,
    microbatch_counts,
    save_choice,
)
from .console import busy, say
from .options import policies_of
from .policies.catalog import known_knobs
from .policies.plan import Place
from .policies.policy import Policy, policy_name
from .policies.user_file import is_in_file
from .policies.work import Work
from .remedies import Given
from .traces.errors import InputError, shown
from .train_settings import AUTO, TrainConfig

if TYPE_CHECKING:
    from .executor.masters import OptimizerFactory
    from .executor.measure import Told
    from .executor.model_source import Model
    from .executor.places import Devices
    from .executor.trainer import Trainer
    from .executor.training_loop import Batches, LoopSettings

PROFILE_REPEATS = 10
"""How often a layer is run to measure it for a prediction."""

PROFILE_WARM_S = 3.0
"""How long a GPU works on it before: under steady work its clocks fall, by 2 % more after 0.5 s."""

GAPS = 0.02
"""The share of a device's memory that no plan of `auto` takes: an allocator has gaps."""

ON_CPU = (
    "on the CPU devices share cores, and Python: steps may take twice as long as predicted, "
    "and in another order"
)

CHOICE = "policy.json"
"""Where the policy that `auto` took is written down, beside the checkpoints."""


@dataclass(frozen=True)
class Job:
    """What a training is made of."""

    config: TrainConfig
    policies: dict[str, Policy]
    devices: "Devices"
    batches: "Batches"
    model: "Model"
    optimizer: "OptimizerFactory"
    empty: bool = False

    @classmethod
    def of(cls, config: TrainConfig, empty: bool = False) -> "Job":
        """Find policies, devices, data and model, what takes longest last. Raises InputError.

        `empty`: a model without memory for its weights, to be measured.
        """
        from .executor.model_source import (
            check_vocabulary,
            load_batches,
            tokenizer_of,
        )
        from .executor.places import find_devices
        from .executor.training_setup import optimizer_factory

        part, data, train = config.model, config.data, config.train
        _refuse_to_mix(config)
        devices = find_devices(train.devices)
        policies = _policies(config, _microbatches(config, devices))
        decay = {} if train.weight_decay is None else {"weight_decay": train.weight_decay}
        optimizer = optimizer_factory(train.optimizer, train.lr, {**train.options, **decay})
        batches = load_batches(
            data.source,
            batch=train.batch,
            sequence=data.sequence,
            held_out=data.held_out,
            seed=train.seed,
            tokenizer=data.tokenizer or tokenizer_of(part.name),
        )
        empty = empty and not is_in_file(part.name)
        model = _model(config, devices, empty)
        check_vocabulary(model, batches)
        return cls(config, policies, devices, batches, model, optimizer, empty)

    def loaded(self) -> "Job":
        """This job with its model's weights. Raises InputError where the host cannot hold them."""
        if not self.empty:
            return self
        model = _model(self.config, self.devices, empty=False)
        return replace(self, model=model, empty=False)

    @property
    def microbatches(self) -> int:
        """The microbatches of a step."""
        return _microbatches(self.config, self.devices)

    @property
    def folder(self) -> Path | None:
        """Where checkpoints go."""
        folder = self.config.checkpoint.folder
        return Path(folder) if folder else None

    def settled(self, console: Console) -> "tuple[Job, Policy, Work | None]":
        """This job with its microbatches, the policy, and the work that it was chosen for, if any.

        `auto` takes more microbatches where they were not asked for and nothing fits.
        """
        if self.config.policy.name != AUTO:
            return self, self.policies[self.config.policy.name], None
        written = self.folder / CHOICE if self.folder else None
        if written and self.config.checkpoint.resume:
            before = load_choice(written, self._about())
            if before is not None:
                policy, count = before
                say(console, f"{policy_name(policy)}, as {shown(written)} has it")
                return self.with_microbatches(count), policy, None
        job, chosen, work = self._chosen(console)
        if written:
            save_choice(chosen, job.microbatches, written, self._about())
        return job, chosen, work

    def _about(self) -> dict[str, Any]:
        """All that a choice depends on: what is measured, and what may be chosen from."""
        from .executor.places import device_name

        config = self.config
        free = {"steps", "lr", "schedule", "warmup", "final_share", "seed", "on_nan"}
        return {
            "model": config.model.model_dump(mode="json"),
            "sequence": config.data.sequence,
            "policy": config.policy.model_dump(mode="json"),
            "train": config.train.model_dump(mode="json", exclude=free),
            "devices": [f"{each}: {device_name(each)}" for each in self.devices],
        }

    def _chosen(self, console: Console) -> "tuple[Job, Policy, Work]":
        train = self.config.train
        *fewer, most = (
            [train.microbatches]
            if train.microbatches
            else microbatch_counts(self.microbatches, train.batch)
        )
        for count in fewer:
            job = self.with_microbatches(count)
            try:
                return job, *job._fastest(console, last=False)
            except NothingFits:
                say(console, f"with {count} microbatches nothing fits; trying more")
        job = self.with_microbatches(most)
        return job, *job._fastest(console)

    def _fastest(self, console: Console, last: bool = True) -> "tuple[Policy, Work]":
        with busy("measuring", console):
            work = self._measured_if_it_fits()
        with busy("simulating", console) as tell:
            room = work
            if self.devices[0].type == "cuda":
                room = with_gaps(work)
                say(console, f"{GAPS:.0%} of each GPU's memory is left to its allocator")
            else:
                say(console, ON_CPU)
            given = Given(
                samples=self.config.train.batch // self.microbatches,
                autocast=self.config.model.autocast is not None,
            )
            return choose(room, self.policies, console, tell, last, given), work

    def _measured_if_it_fits(self) -> "Work":
        from .executor.training_setup import explain, is_out_of_memory

        try:
            return self.measured()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise NothingFits(f"policy auto: {explain(error)}") from error

    def with_microbatches(self, count: int) -> "Job":
        """The same job with so many microbatches a step."""
        train = self.config.train.model_copy(update={"microbatches": count})
        config = self.config.model_copy(update={"train": train})
        return replace(self, config=config, policies=_policies(config, count))

    def measured(
        self,
        told: "Told" = lambda layer, count, name: None,
        repeats: int = PROFILE_REPEATS,
        split: bool = True,
        updates_on: Collection[Place] = (),
    ) -> Work:
        """The work of a step, with what layers and machine cost, measured now.

        `split`: backward's parts, too. `updates_on`: where updates are measured; nothing is as the
        settings say, and both places where they do not.
        """
        from .executor.places import host_memory, memory_limits
        from .executor.sizes import parse_bytes
        from .executor.training_setup import dtype_of, measured_work

        part, train = self.config.model, self.config.train
        place = self.config.policy.optimizer_on
        return measured_work(
            self.model,
            self.batches,
            self.devices,
            self.microbatches,
            memory_limits(self.devices, parse_bytes(train.memory)),
            self.optimizer,
            compute=dtype_of(part.compute_dtype),
            autocast=dtype_of(part.autocast),
            updates_on=updates_on or ([place] if place else get_args(Place)),
            host_memory_bytes=parse_bytes(train.host_memory, "host memory") or host_memory(),
            name=_short(part.name),
            told=told,
            repeats=repeats,
            split=split,
            warm_s=PROFILE_WARM_S,
        )

    def trainer(self, policy: Policy, work: Work | None) -> "Trainer":
        """The trainer; `work` has what was measured already."""
        from .executor.trainer import Trainer
        from .executor.training_setup import decay_groups, dtype_of

        part, train = self.config.model, self.config.train
        return Trainer(
            self.model.layers,
            self.model.loss_fn,
            policy=policy,
            optimizer=self.optimizer,
            devices=self.devices,
            microbatches=self.microbatches,
            memory_limit=train.memory,
            host_memory_limit=train.host_memory,
            trace=work.trace if work else None,
            machine=work.machine if work else None,
            compute_dtype=dtype_of(part.compute_dtype),
            autocast=dtype_of(part.autocast),
            parameter_groups=decay_groups(train.weight_decay) if train.weight_decay else None,
            clip_norm=train.clip_norm,
            on_nan=train.on_nan,
            seed=train.seed,
        )

    def resumed(self, trainer: "Trainer", console: Console) -> int:
        """The steps that are done already."""
        from .executor.checkpoint import latest, load_checkpoint
        from .executor.training_setup import set_rate

        if self.folder is None or not self.config.checkpoint.resume:
            return 0
        if latest(self.folder) is None:
            say(console, f"no checkpoint in {shown(self.folder)} yet: starting at step 0")
            return 0
        step = load_checkpoint(trainer, self.folder)
        set_rate(trainer.optimizer, self.config.train.lr)
        say(console, f"going on after step {step}")
        return step

    def loop(self) -> "LoopSettings":
        """How to train."""
        from .executor.training_loop import LoopSettings

        train, log, checkpoint = self.config.train, self.config.log, self.config.checkpoint
        return LoopSettings(
            steps=train.steps,
            schedule=train.schedule,
            warmup=train.warmup,
            final_share=train.final_share,
            evaluate_every=log.evaluate_every,
            evaluate_batches=log.evaluate_batches,
            evaluate_size=max(1, train.batch // self.microbatches),
            save_every=checkpoint.every,
            folder=self.folder,
            keep=checkpoint.keep,
        )

    def summary(self, policy: Policy) -> str:
        """What is trained, where and how, in a line."""
        layers = self.model.layers
        count = sum(each.numel() for _, each in layers.named_parameters())
        places = ", ".join(map(str, self.devices))
        return (
            f"training {self.config.model.name}, {human_rate(count)} parameters in {len(layers)} "
            f"layers, with {policy_name(policy)} on {places}: "
            f"{counted(self.config.train.steps, 'step')} of "
            f"{counted(self.config.train.batch, 'sample')} in "
            f"{counted(self.microbatches, 'microbatch')}"
        )


def with_gaps(work: Work) -> Work:
    """The same work with a little less memory on the devices."""
    devices = tuple(
        each.model_copy(update={"memory_bytes": int(each.memory_bytes * (1 - GAPS))})
        for each in work.machine.devices
    )
    return replace(work, machine=work.machine.model_copy(update={"devices": devices}))


def _model(config: TrainConfig, devices: "Devices", empty: bool) -> "Model":
    from .executor.model_source import load_model
    from .executor.training_setup import dtype_of, explain, is_out_of_memory

    part = config.model
    dtype = dtype_of(part.dtype)
    assert dtype is not None
    try:
        return load_model(
            part.name,
            tied=part.tied,
            dropout=part.dropout,
            dtype=dtype,
            seed=config.train.seed,
            empty=empty,
            ffn_chunk=part.ffn_chunk,
            draw_on=devices[0] if devices[0].type == "cuda" else None,
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = explain(error).partition(";")[0]
        advice = "use a smaller model, or weights of fewer bytes (--dtype bfloat16)"
        raise InputError(
            f"model: {part.name}: no room for its weights: {reason}; {advice}"
        ) from None


def _short(source: str) -> str:
    """What a model is called: of a config.json, its folder."""
    path = Path(source)
    return path.parent.name if path.name == "config.json" and path.parent.name else source


def _microbatches(config: TrainConfig, devices: "Devices") -> int:
    return config.train.microbatches or min(config.train.batch, 2 * len(devices))


def _policies(config: TrainConfig, microbatches: int) -> dict[str, Policy]:
    """The policy that was named, or those that `auto` compares, with their knobs, by name."""
    if config.policy.name == AUTO:
        clip = {"clip": True} if config.train.clip_norm else {}
        return candidates({**config.policy.knobs(), **clip}, microbatches)
    return named_policies(config, [config.policy.name])


def named_policies(config: TrainConfig, names: list[str]) -> dict[str, Policy]:
    """The policies of these names, with their knobs; all that can clip do where training does.

    Those that split backward know how, too, where layers are measured without a split.
    """
    known = {knob for name in names for knob in known_knobs(name)}
    share = {"weight_share": WEIGHT_SHARE} if "weight_share" in known else {}
    clip = {"clip": True} if config.train.clip_norm and "clip" in known else {}
    policies = policies_of(names, {**share, **config.policy.knobs(), **clip})
    return dict(zip(names, policies, strict=True))


def _refuse_to_mix(config: TrainConfig) -> None:
    """Checkpoints of another training are not to be overwritten."""
    from .executor.checkpoint import latest

    folder = config.checkpoint.folder
    if folder and not config.checkpoint.resume and latest(Path(folder)) is not None:
        raise InputError(
            f"{shown(folder)}: there are checkpoints here already; go on from them with --resume, "
            "or name another folder"
        )
