"""Traces computed from a model's `config.json` and a GPU's specification, without a GPU.

Each part of a layer takes max(FLOPs / (peak x efficiency), bytes / (bandwidth x efficiency)),
parts add up (the roofline model, Williams et al., CACM 52(4), 2009); `costs.py` has the FLOPs and
bytes, `shapes.py` the memory, `gpus.py` the GPUs. What no formula knows is left out: kernel
launches, unfused operations, a mixture's uneven experts, clocks that fall under load. So real
layers are slower: the library's published ones took 1.1 to 1.5 times as long as computed here
(dense, from 8 B on, and heads), 1.9 times (1.7 B), 2.3 to 4.3 times (mixtures), at their rate of
products added up in 16 bits. `tests/traces/test_analytic.py` holds these bounds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from .costs import LayerWork, Part, block_work, embedding_work, head_work
from .errors import InputError
from .gpus import Gpu
from .model_config import ModelConfig, read_config
from .shapes import OPTIMIZER_BYTES, LayerBytes, block_bytes, head_bytes, with_embedding
from .trace import LayerCost, Trace

MOST_TOKENS = 2**26
MOST_RANK = 2**16


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that kernels reach; assumptions.

    `matmul` None: the GPU's own (`gpus.py`). The others were measured on one H100 SXM on
    2026-11-24 with PyTorch 2.11 in bf16: causal flash attention of 4 x 2048 tokens, 32 heads of
    128, 0.55 forward and 0.32 backward (more for longer sequences: 0.63 and 0.50 at 8192); a copy
    0.90 of the bandwidth.
    """

    matmul: float | None = None
    attention: float = 0.55
    attention_backward: float = 0.32
    memory: float = 0.90

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value <= 1:
                raise InputError(f"efficiency: {name}: must be above 0 and at most 1, got {value}")

    def seconds(self, part: Part, gpu: Gpu) -> float:
        """Seconds of one part on `gpu`."""
        shares = {
            "matmul": self.matmul or gpu.matmul,
            "attention": self.attention,
            "attention_backward": self.attention_backward,
        }
        compute = part.flops / (gpu.flops_per_s * shares.get(part.kind, 1.0))
        return max(compute, part.nbytes / (gpu.bytes_per_s * self.memory))


MEASURED = Efficiency()


def analytic_trace(
    config: Mapping[str, Any],
    gpu: Gpu,
    *,
    sequence: int,
    batch: int,
    lora_rank: int = 0,
    name: str = "",
    efficiency: Efficiency = MEASURED,
) -> Trace:
    """The trace of a `config.json` (as a dict) for microbatches of `batch` x `sequence` tokens.

    With `lora_rank` above 0 only adapters on attention's linear layers are trained. Raises
    InputError for a config that is not understood or sizes that are out of range.
    """
    model = read_config(config)
    _check(model, sequence, batch, lora_rank)
    try:
        return Trace(
            name=name or model.family,
            device=gpu.name,
            provenance=_provenance(gpu, sequence, batch, lora_rank, efficiency),
            microbatch_tokens=sequence * batch,
            layers=model_layers(model, gpu, sequence, batch, lora_rank, efficiency),
        )
    except ValidationError:
        raise InputError(
            "config: this model and microbatch are too large for a trace; give smaller sizes"
        ) from None


def model_layers(
    model: ModelConfig,
    gpu: Gpu,
    sequence: int,
    batch: int,
    lora_rank: int = 0,
    efficiency: Efficiency = MEASURED,
) -> tuple[LayerCost, ...]:
    """The layers of `analytic_trace`: blocks, the first with the embedding, and the head."""
    shape, tokens, frozen = model.shape, sequence * batch, lora_rank > 0
    sizes = block_bytes(shape, tokens, lora_rank)
    embedding = embedding_work(shape, tokens, trained=not frozen)
    layers = []
    for number, window in enumerate(model.windows):
        work = block_work(shape, sequence, batch, lora_rank, window)
        size = sizes if number else with_embedding(sizes, shape, frozen)
        timed = work if number else work.plus(embedding)
        layers.append(layer_cost(f"block.{number}", timed, size, gpu, efficiency))
    head = head_bytes(shape, tokens, frozen)
    head = _tied(head, model) if model.tied and not frozen else head
    work = head_work(shape, tokens, trained=not frozen)
    last = layer_cost("head", work, head, gpu, efficiency)
    return (*layers, last.model_copy(update={"tied_to": 0}) if model.tied and not frozen else last)


def layer_cost(
    name: str, work: LayerWork, size: LayerBytes, gpu: Gpu, efficiency: Efficiency = MEASURED
) -> LayerCost:
    """A layer of a trace: times from its work, bytes from its size."""

    def nanoseconds(parts: Iterable[Part]) -> int:
        return round(1e9 * sum(efficiency.seconds(part, gpu) for part in parts))

    inputs, weights = nanoseconds(work.backward_input), nanoseconds(work.backward_weight)
    return LayerCost(
        name=name,
        forward_ns=nanoseconds(work.forward),
        backward_ns=inputs + weights,
        backward_input_ns=inputs,
        backward_weight_ns=weights,
        **size._asdict(),
    )


def _tied(head: LayerBytes, model: ModelConfig) -> LayerBytes:
    """The head without state for the embedding's matrix, which block 0 updates."""
    own = head.trainable_params - model.shape.vocabulary * model.shape.hidden
    return head._replace(trainable_params=own, optimizer_bytes=OPTIMIZER_BYTES * own)


def _check(model: ModelConfig, sequence: int, batch: int, lora_rank: int) -> None:
    for name, value in (("sequence", sequence), ("batch", batch)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name}: must be a whole number from 1, got {value!r}")
    if sequence * batch > MOST_TOKENS:
        raise InputError(f"sequence x batch: {sequence * batch} tokens; at most {MOST_TOKENS}")
    if type(lora_rank) is not int or not 0 <= lora_rank <= MOST_RANK:
        raise InputError(f"lora_rank: must be from 0 to {MOST_RANK}, got {lora_rank!r}")
    positions = model.shape.positions
    if positions and sequence > positions:
        raise InputError(f"sequence: {sequence} tokens; this model has {positions} positions")


def _provenance(gpu: Gpu, sequence: int, batch: int, rank: int, efficiency: Efficiency) -> str:
    lora = f"; LoRA rank {rank} on attention's linear layers, all else frozen" if rank else ""
    return (
        f"analytic: computed from the model's config, not measured; microbatch of {batch} x "
        f"{sequence} tokens; {gpu.flops_per_s / 1e12:g} TFLOP/s dense 16-bit with float32 "
        f"accumulation, {gpu.bytes_per_s / 1e9:g} GB/s; efficiencies assumed: matrix products "
        f"{efficiency.matmul or gpu.matmul:g}, attention {efficiency.attention:g} and "
        f"{efficiency.attention_backward:g} (backward), memory {efficiency.memory:g}{lora}"
    )
