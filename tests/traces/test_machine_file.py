"""Machine files, and machines cut to fewer devices."""

import json
from pathlib import Path
from typing import Any

import pytest

from roundel.traces.errors import InputError
from roundel.traces.machine import Device, Host, Link, Machine, ideal_machine
from roundel.traces.trace import MAX_COUNT

PAIR = Machine(
    name="pair",
    host=Host(memory_bytes=100, optimizer_params_per_s=10),
    devices=(Device(name="gpu0", memory_bytes=5), Device(name="gpu1")),
    switches=("socket",),
    links=(
        Link(a="host", b="socket", bytes_per_s=7, duplex=False),
        Link(a="socket", b="gpu0", bytes_per_s=5, latency_ns=3),
        Link(a="gpu1", b="socket", bytes_per_s=5),
    ),
)


def machine(**changes: Any) -> dict[str, Any]:
    devices = [{"name": "gpu0"}, {"name": "gpu1"}]
    return {"format": "roundel.machine/1", "name": "pair", "devices": devices, **changes}


def link(a: str = "host", b: str = "gpu0", **changes: Any) -> dict[str, Any]:
    return {"a": a, "b": b, "bytes_per_s": 5, **changes}


MISTAKES = {
    "not an object": ("pair", 'must be a JSON object, got "pair"'),
    "other format": (
        machine(format="roundel.machine/2"),
        'format: must be "roundel.machine/1", got "roundel.machine/2"',
    ),
    "no devices": (machine(devices=[]), "devices: must not be empty"),
    "device without a name": (machine(devices=[{}]), "devices.0.name: missing; add it"),
    "misspelt": (
        machine(devices=[{"name": "gpu0", "memory": 5}]),
        "devices.0.memory: no such field; check the spelling",
    ),
    "same device twice": (
        machine(devices=[{"name": "gpu0"}, {"name": "gpu0"}]),
        "devices.1.name: there is a node 'gpu0' already; give another name",
    ),
    "device named host": (
        machine(devices=[{"name": "host"}]),
        "devices.0.name: there is a node 'host' already; give another name",
    ),
    "switch named like a device": (
        machine(switches=["gpu1"]),
        "switches.0: there is a node 'gpu1' already; give another name",
    ),
    "link to a device that is not there": (
        machine(links=[link(), link(b="gpu2")]),
        "links.1.b: there is no device or switch 'gpu2'; the nodes are 'host', 'gpu0', 'gpu1'",
    ),
    "link to itself": (
        machine(links=[link("gpu0", "gpu0")]),
        "links.0.b: leads from 'gpu0' to itself; name another node",
    ),
    "link twice": (
        machine(links=[link(), link("gpu0", "host")]),
        "links.1: 'gpu0' and 'host' are linked by links.0 already; make one link of the two",
    ),
    "no bandwidth": (
        machine(links=[link(bytes_per_s=0)]),
        "links.0.bytes_per_s: must be more than 0, got 0",
    ),
    "bandwidth as a float": (
        machine(links=[link(bytes_per_s=25e9)]),
        "links.0.bytes_per_s: must be a whole number, got 25000000000.0",
    ),
    "endless bandwidth": (
        machine(links=[link(bytes_per_s=10**18)]),
        f"links.0.bytes_per_s: must be at most {MAX_COUNT}, got {10**18}",
    ),
    "duplex as a number": (
        machine(links=[link(duplex=1)]),
        "links.0.duplex: must be true or false, got 1",
    ),
    "negative memory": (
        machine(host={"memory_bytes": -1}),
        "host.memory_bytes: must not be negative, got -1",
    ),
    "no host": (machine(host=None), "host: must be a JSON object, got null"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake(case: str, tmp_path: Path) -> None:
    data, message = MISTAKES[case]
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        Machine.load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_round_trip(tmp_path: Path) -> None:
    PAIR.save(tmp_path / "pair.json")
    assert Machine.load(tmp_path / "pair.json") == PAIR


def test_first_devices_take_their_links() -> None:
    one = PAIR.first_devices(1)
    assert one.devices == PAIR.devices[:1]
    assert one.links == PAIR.links[:2]
    assert Machine.model_validate(one.model_dump()) == one


@pytest.mark.parametrize("count", [0, 3])
def test_first_devices_refuses(count: int) -> None:
    with pytest.raises(InputError, match=f"pair has 2 devices, {count} were asked for"):
        PAIR.first_devices(count)


def test_a_hop_replaces_the_links() -> None:
    assert PAIR.with_hop(5).hop_ns == 5
    assert ideal_machine(2, hop_ns=7).hop_ns == 7
    for wrong in (-1, MAX_COUNT + 1):
        with pytest.raises(InputError, match="hop_ns: must be from 0"):
            PAIR.with_hop(wrong)
        with pytest.raises(InputError, match="hop_ns: must be from 0"):
            ideal_machine(2, hop_ns=wrong)


def test_an_ideal_machine_has_a_device() -> None:
    with pytest.raises(InputError, match="devices: must be at least 1, got 0"):
        ideal_machine(0)
