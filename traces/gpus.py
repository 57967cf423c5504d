"""Specifications of real GPUs, for traces that are computed, not measured (`analytic.py`).

`flops_per_s` is the peak of dense 16-bit matrix products that are added up in float32, as cuBLAS
and PyTorch do by default, without sparsity. GeForce cards do those at half the rate of products
added up in 16 bits (RTX 4090: 165.2 and 330.3 TFLOP/s), data-centre cards at one rate. The higher
rate is `flops_per_s_16`, at which the library's published RTX 4090 traces were measured.

Sources, as published by NVIDIA: the whitepapers "NVIDIA Ada GPU Architecture" (RTX 4090) and
"NVIDIA Ampere GA102 GPU Architecture" (RTX 3090), appendix A; the datasheets of A100 80GB SXM,
H100 SXM, H200 SXM and L40S (the last three print rates with sparsity; dense is half).

`matmul` is the share of `flops_per_s` that large products reach:

- RTX 4090, 0.95: PyTorch 2.7 reached 152 to 160 TFLOP/s in bf16 on sizes from 4096 to 10240
  (github.com/zzc0721/torch-performance-test-data, issue 78).
- H100, 0.75: measured on one H100 SXM on 2026-11-24, PyTorch 2.11, bf16, 8192 tokens by the
  matrices of Llama-3.1-8B and Qwen3-1.7B: 0.66 to 0.84. Assumed for all GPUs without a figure.
"""

from dataclasses import dataclass

from .errors import InputError

GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """One GPU: peaks in FLOP/s and bytes/s, memory in bytes, and the share that products reach.

    `name` is what CUDA calls it, so that `preset_for` finds a machine with it.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    memory_bytes: int
    matmul: float = 0.75
    flops_per_s_16: float | None = None


GPUS = {
    "rtx-4090": Gpu(
        "NVIDIA GeForce RTX 4090", 165.2e12, 1008e9, 24 * GIB, matmul=0.95, flops_per_s_16=330.3e12
    ),
    "rtx-3090": Gpu("NVIDIA GeForce RTX 3090", 71e12, 936e9, 24 * GIB, flops_per_s_16=142e12),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 312e12, 2039e9, 80 * GIB),
    "h100-sxm": Gpu("NVIDIA H100 80GB HBM3", 989.4e12, 3350e9, 80 * GIB),
    "h200-sxm": Gpu("NVIDIA H200", 989.4e12, 4800e9, 141 * 10**9),
    "l40s": Gpu("NVIDIA L40S", 362.05e12, 864e9, 48 * GIB),
}
"""The GPUs by the names that the command line takes."""


def find_gpu(name: str) -> Gpu:
    """The GPU of this name. Raises InputError for an unknown one."""
    if name not in GPUS:
        raise InputError(f"--gpu: no GPU {name!r}; there are {', '.join(GPUS)}")
    return GPUS[name]
