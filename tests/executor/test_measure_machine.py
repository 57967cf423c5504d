"""The machine that is measured: what hangs on what, and that a simulation runs on it."""

from functools import partial

import torch

import roundel
from roundel.executor.measure_machine import measure_machine
from roundel.executor.places import find_devices, memory_limits, sharing_cores

CPU = torch.device("cpu")
ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def test_virtual_devices_share_the_link_to_the_host() -> None:
    machine = measure_machine([CPU] * 3, memory_limits([CPU] * 3, 5000), ADAMW)
    assert [device.memory_bytes for device in machine.devices] == [5000] * 3
    assert machine.switches == ("bus cpu",)
    assert [(link.a, link.b) for link in machine.links] == [
        *(("bus cpu", f"gpu{number}") for number in range(3)),
        ("host", "bus cpu"),
    ]
    # Anything between a hundredth and a hundred times of what machines do.
    assert all(2**27 < link.bytes_per_s < 2**43 for link in machine.links)
    assert 10**6 < machine.host.optimizer_params_per_s < 10**12
    simulation = roundel.simulate(
        "qwen3-1.7b-rtx4090", "round-robin", microbatches=6, machine=machine
    )
    assert simulation.metrics.exposed_transfer_s > 0


def test_one_device_hangs_on_the_host_itself() -> None:
    machine = measure_machine([CPU], memory_limits([CPU], 0), ADAMW)
    assert machine.devices[0].memory_bytes == 0
    assert machine.switches == ()
    assert [(link.a, link.b) for link in machine.links] == [("host", "gpu0")]


def test_virtual_devices_share_the_cores() -> None:
    before = torch.get_num_threads()
    with sharing_cores(find_devices(["2"])):
        assert torch.get_num_threads() == max(1, before // 2)
    assert torch.get_num_threads() == before
