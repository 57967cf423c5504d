"""The machine that is measured: what hangs on what, and that a simulation runs on it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import roundel
from roundel.executor import measure_machine as measure_machine_module
from roundel.executor import places
from roundel.executor.measure_links import CHANNEL, Copy, Together, behind_one_channel
from roundel.executor.measure_machine import _usual_ns, measure_machine, switches_of
from roundel.executor.places import host_memory, memory_limits, sharing_cores, threads_of_updates
from roundel.traces.machine import Device, Link, Machine

CPU = torch.device("cpu")
ADAMW = partial(torch.optim.AdamW, lr=1e-3)


@pytest.mark.parametrize(
    ("allowed", "left"), [("max\n", 94), (f"{50 * 2**30}\n", 46), ("6", 3 / 2**30)]
)
def test_the_process_itself_needs_some_of_the_hosts_memory(
    allowed: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text(allowed)
    monkeypatch.setattr(places, "_CONTAINER_LIMIT", limit)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 100 * 2**18}.get)
    assert host_memory() == left * 2**30
    limit.unlink()
    assert host_memory() == 94 * 2**30


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
    assert 10**2 < machine.host.task_ns < 10**8
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
    with sharing_cores([CPU] * 2):
        assert torch.get_num_threads() == max(1, before // 2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("compute", "converts"), [(None, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_an_update_converts_where_masters_have_another_dtype(
    compute: torch.dtype | None, converts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_machine_module, "SIDE", 4)
    updated = measure_machine_module._update(ADAMW, compute, torch.bfloat16, CPU)()
    assert isinstance(updated, torch.nn.Parameter) is not converts
    assert updated.dtype == (compute or torch.bfloat16)


def test_a_gpus_updates_are_timed_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def timed(works: list[Copy], devices: object) -> int:
        rows.append(len(works))
        return 100 * len(works)

    monkeypatch.setattr(measure_machine_module, "shortest_ns", timed)
    for device in (torch.device("cuda", 0), CPU):
        assert measure_machine_module._in_a_row_ns(lambda: None, device) == 100
    assert rows == [8, 1]


def test_updates_leave_two_cores_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    for cores, expected in ((32, 28), (5, 2), (1, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        assert threads_of_updates(gpus) == expected
        assert threads_of_updates([CPU] * 2) == cores


def links(*rates: int) -> list[Link]:
    named = enumerate(rates)
    return [Link(a="host", b=f"gpu{n}", bytes_per_s=rate, latency_ns=7) for n, rate in named]


def test_devices_that_get_less_together_share_a_channel() -> None:
    shared, first, second = behind_one_channel(links(50, 50), Together(up=60, both=120))
    assert (shared.a, shared.b, shared.bytes_per_s) == ("host", CHANNEL, 60)
    assert shared.duplex
    assert [(each.a, each.b) for each in (first, second)] == [(CHANNEL, "gpu0"), (CHANNEL, "gpu1")]
    assert (first.bytes_per_s, first.latency_ns) == (50, 7)


@pytest.mark.parametrize(
    ("rates", "up", "both", "rate"),
    [((50, 50), 100, 110, 110), ((50,), 50, 70, 70), ((50, 50), 100, 90, 100)],
)
def test_memory_that_gives_less_both_ways_is_one_way(
    rates: tuple[int, ...], up: int, both: int, rate: int
) -> None:
    shared, *_ = behind_one_channel(links(*rates), Together(up, both))
    assert (shared.bytes_per_s, shared.duplex) == (rate, False)


@pytest.mark.parametrize(
    "together", [None, Together(90, 180), Together(100, 200), Together(120, 185)]
)
def test_devices_that_get_all_share_nothing(together: Together | None) -> None:
    assert behind_one_channel(links(50, 50), together) == links(50, 50)


def test_links_of_one_way_at_a_time_share_what_they_get_together() -> None:
    one_way = [each.model_copy(update={"duplex": False}) for each in links(50, 50)]
    assert behind_one_channel(one_way, Together(95, 100)) == one_way
    shared, *_ = behind_one_channel(one_way, Together(70, 70))
    assert (shared.bytes_per_s, shared.duplex) == (70, False)


def test_a_machine_with_a_shared_channel_simulates() -> None:
    shared = behind_one_channel(links(50 * 10**9, 50 * 10**9), Together(60 * 10**9, 120 * 10**9))
    nodes = {torch.device("cuda", n): f"gpu{n}" for n in range(2)}
    machine = Machine(
        name="shared",
        devices=tuple(Device(name=name) for name in nodes.values()),
        switches=switches_of(nodes, shared),
        links=tuple(shared),
    )
    simulation = roundel.simulate(
        "qwen3-1.7b-rtx4090", "layer-to-layer", microbatches=4, machine=machine
    )
    apart = machine.model_copy(update={"switches": (), "links": tuple(links(*[50 * 10**9] * 2))})
    free = roundel.simulate("qwen3-1.7b-rtx4090", "layer-to-layer", microbatches=4, machine=apart)
    assert simulation.metrics.exposed_transfer_s > 1.3 * free.metrics.exposed_transfer_s


@pytest.mark.parametrize(("sleep_s", "made", "timed"), [(0.004, 3, 5), (0.03, 1, 1)])
def test_work_on_the_host_is_timed_in_turn_as_long_as_is_asked_for(
    sleep_s: float, made: int, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 20 ms five of 4, of three of a kind in turn, each once before; of 30 ms one is enough."""
    now, runs = 0.0, list[int]()
    monkeypatch.setattr("time.perf_counter_ns", lambda: round(now * 1e9))

    def make() -> Callable[[], None]:
        number = len(set(runs))

        def work() -> None:
            nonlocal now
            runs.append(number)
            now += sleep_s

        return work

    assert _usual_ns(make, 3, 0.02) == round(sleep_s * 1e9)
    assert len(set(runs)) == made
    assert len(runs) == made + timed
    assert max(map(runs.count, set(runs))) - min(map(runs.count, set(runs))) <= 1
