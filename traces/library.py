"""The library: traces and machines that come with Roundel, by name.

Traces are in `library/`, see `published.py`. Machines are in `presets/`; JSON has no comments, so
where their numbers come from is said here. A switch passes data on and stores nothing: the
link between host and socket is that socket's memory channels, which all its GPUs share
(`duplex` false: reads and writes share them), the link between socket and GPU is PCIe at the
rate that copies from pinned memory reach, in each direction. `optimizer_params_per_s` takes
AdamW with a float32 master copy as bound by memory: about 30 bytes a parameter (it reads a 16-bit
gradient, master and two moments, 14 bytes, and writes them and a 16-bit weight, 14 bytes), at the
GPU's published bandwidth, and on a host that was not measured at half its memory's peak.
`sum_params_per_s` takes 6 bytes at the same rate: two 16-bit gradients read, their sum written.

- `8x-rtx4090`: 24 GiB, 1008 GB/s; PCIe 4.0 x16 at 25 GB/s. Two sockets of 8 channels of DDR4-3200,
  204.8 GB/s peak, three quarters of it for copies. 1 TiB of host memory, for 470 GB are
  the weights of qwen3-235b alone. GeForce cards have no
  peer-to-peer copies, so that data between GPUs goes through their sockets, at PCIe's rate;
  between two sockets it takes both sockets' memory channels, within one it is not charged to them.
- `8x-a800-nvlink`: 80 GiB, 2039 GB/s; the host as above; NVLink through a switch at 200 GB/s a
  direction (400 GB/s in all).
- `1x-h100`: H100 SXM, 80 GiB, 3350 GB/s; PCIe 5.0 x16 at 55 GB/s, one socket of 8 channels of
  DDR5-4800, 307 GB/s peak, three quarters of it for copies, 256 GiB.
- `2x-h200-nvlink`: measured on one server: 143771 MiB a GPU, 55 GB/s a direction between one GPU
  and pinned memory, 109 GB/s for both GPUs together, 380 GB/s from GPU to GPU, and 6e9
  parameters/s of AdamW on 32 cores of the host, which has 256 GiB. Published: 4800 GB/s.

Latencies, 10 us for a copy over PCIe and 5 us over NVLink, are of the usual size, not measured.
"""

import os
import re
from pathlib import Path

from .errors import InputError, shown
from .machine import Machine
from .trace import Trace

_HERE = Path(__file__).parent
_GPU_OF_PRESET = {
    "8x-rtx4090": r"rtx 4090(?! (d|laptop)\b)",
    "8x-a800-nvlink": r"a800",
    "1x-h100": r"h100",
    "2x-h200-nvlink": r"h200",
}


def trace_names() -> tuple[str, ...]:
    """Names of the library's traces, in alphabetical order."""
    return _names("library")


def machine_names() -> tuple[str, ...]:
    """Names of the library's machines, in alphabetical order."""
    return _names("presets")


def load_trace(name_or_path: str | Path) -> Trace:
    """The library's trace of this name, or else the trace in this file.

    Raises InputError if there is neither, or if the file is wrong.
    """
    return Trace.load(_find(name_or_path, "library", "trace"))


def load_machine(name_or_path: str | Path) -> Machine:
    """The library's machine of this name, or else the machine in this file.

    Raises InputError if there is neither, or if the file is wrong.
    """
    return Machine.load(_find(name_or_path, "presets", "machine"))


def preset_for(device: str, devices: int | None = None) -> Machine | None:
    """The first `devices` devices, or all, of the preset with this GPU; None if it has too few.

    `device` is a GPU's full name, as in a trace: "NVIDIA GeForce RTX 4090". None for an unknown
    GPU. Raises InputError if `devices` is less than 1.
    """
    words = " ".join(re.findall(r"[a-z0-9]+", device.lower()))
    for name, gpu in _GPU_OF_PRESET.items():
        if re.search(rf"\b{gpu}\b", words):
            machine = load_machine(name)
            count = len(machine.devices) if devices is None else devices
            return machine.first_devices(count) if count <= len(machine.devices) else None
    return None


def _names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (_HERE / folder).glob("*.json")))


def _find(name_or_path: str | Path, folder: str, what: str) -> Path:
    names = _names(folder)
    if name_or_path in names:
        return _HERE / folder / f"{name_or_path}.json"
    if not os.path.exists(name_or_path):
        raise InputError(
            f"{shown(name_or_path)}: no such file, and no such {what} in the library, "
            f"which has {', '.join(names)}"
        )
    return Path(name_or_path)
