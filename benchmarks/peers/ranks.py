"""One process a device, joined by torch.distributed: NCCL between GPUs, gloo on the CPU."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException, spawn
from training_common import Result, cap_memory, devices_of, peak_bytes, wait_for_gpu

Work = Callable[[int, argparse.Namespace], Result]
"""What each process does, given its rank; the last rank's result counts."""


def run_ranks(work: Work, arguments: argparse.Namespace, capped: bool) -> Result:
    """`work` in a process for each device. Raises what a rank raised, in one line.

    capped: within the memory of `--memory`.
    """
    count = len(devices_of(arguments))
    with TemporaryDirectory() as folder:
        try:
            spawn(_rank, args=(work, arguments, capped, Path(folder)), nprocs=count)  # type: ignore[no-untyped-call]
        except ProcessRaisedException as error:
            print(error, file=sys.stderr)
            raise RuntimeError(str(error).strip().splitlines()[-1]) from None
        results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    peaks = [each["peak_allocated_bytes"] for each in results]
    peak = max((each for each in peaks if each is not None), default=None)
    return {**results[-1], "peak_allocated_bytes": peak, "peaks_by_rank": peaks}


def wait_for_all() -> None:
    """Until every rank's device has done what it was given."""
    wait_for_gpu()
    dist.barrier()
    wait_for_gpu()


def _rank(rank: int, work: Work, arguments: argparse.Namespace, capped: bool, folder: Path) -> None:
    devices = devices_of(arguments)
    device = devices[rank]
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if capped:
        cap_memory(arguments, device)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // len(devices)))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=len(devices),
        device_id=device if cuda else None,
    )
    result = work(rank, arguments) | {"peak_allocated_bytes": peak_bytes(device)}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    # Only where all went well: both wait for the others, which may still be at work.
    wait_for_all()
    dist.destroy_process_group()
    # All is written: threads of gloo that outlive their group abort an interpreter that winds up.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
