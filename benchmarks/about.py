"""What every benchmark says first: hardware, versions and command."""

import os
import platform
import sys
from importlib.metadata import version
from typing import Any

import torch

GIB = 2**30


def about(**more: Any) -> dict[str, Any]:
    """What a benchmark runs on and how it was called, which is printed, and what else is given."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    said = {
        "gpu": gpu,
        **more,
        "host_cores": len(os.sched_getaffinity(0)),
        "host_memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "roundel": version("roundel"),
        "command": " ".join(["python", *sys.argv]),
    }
    print("\n".join(f"{name}: {value}" for name, value in said.items()), flush=True)
    return said
