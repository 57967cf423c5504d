"""The library: published traces, machine presets, and how they are found by name."""

from itertools import combinations
from pathlib import Path

import networkx as nx
import pytest

from roundel.traces import published
from roundel.traces.errors import InputError
from roundel.traces.library import (
    load_machine,
    load_trace,
    machine_names,
    preset_for,
    trace_names,
)
from roundel.traces.machine import Machine
from roundel.traces.published import HOP_NS, PUBLISHED_NAMES, ms_to_ns, published_trace
from roundel.traces.trace import Trace

MACHINES = {"8x-rtx4090": 8, "8x-a800-nvlink": 8, "1x-h100": 1, "2x-h200-nvlink": 2}


def graph(machine: Machine) -> "nx.Graph[str]":
    """Nodes and links; the weight of a link is the time of 64 MiB."""
    result: nx.Graph[str] = nx.Graph()
    for link in machine.links:
        weight = link.latency_ns + 2**26 * 1e9 / link.bytes_per_s
        result.add_edge(link.a, link.b, weight=weight)
    return result


def route(machine: Machine, start: str, end: str) -> list[str]:
    return nx.shortest_path(graph(machine), start, end, weight="weight")


def test_names() -> None:
    assert trace_names() == tuple(sorted(PUBLISHED_NAMES))
    assert machine_names() == tuple(sorted(MACHINES))


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_files_are_what_the_generator_writes(name: str, tmp_path: Path) -> None:
    published.write_library(tmp_path)
    folder = Path(published.__file__).parent / "library"
    assert (folder / f"{name}.json").read_bytes() == (tmp_path / f"{name}.json").read_bytes()


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_published_traces(name: str) -> None:
    trace = load_trace(name)
    assert trace == published_trace(name)
    assert (trace.device, trace.microbatch_tokens) == ("NVIDIA GeForce RTX 4090", 8192)
    assert trace.provenance.startswith("published: arXiv 2604.27085")
    blocks = [f"block.{number}" for number in range(len(trace.layers) - 1)]
    assert [layer.name for layer in trace.layers] == [*blocks, "head"]
    assert all(layer.backward_input_ns is None for layer in trace.layers)
    assert len({layer.saved_bytes for layer in trace.layers[:-1]}) == 1


def test_published_times() -> None:
    layers = load_trace("qwen3-1.7b-rtx4090").layers
    assert (layers[0].forward_ns, layers[27].backward_ns) == (7_429_000, 15_831_000)
    assert (layers[28].forward_ns, layers[28].backward_ns) == (22_065_500, 43_707_000)
    assert load_trace("llama-3.1-8b-rtx4090").layers[0].forward_ns == 18_503_703


def test_a_published_microbatch() -> None:
    """28 x (forward, recompute, backward) and the head: 925 ms, 8,856 tokens/s on one GPU."""
    trace = load_trace("qwen3-1.7b-rtx4090")
    blocks = sum(2 * layer.forward_ns + layer.backward_ns for layer in trace.layers[:-1])
    total_ns = blocks + trace.layers[-1].forward_ns + trace.layers[-1].backward_ns
    assert total_ns == 925_064_500
    assert round(trace.microbatch_tokens / total_ns * 1e9) == 8856


@pytest.mark.parametrize(
    ("text", "ns"), [("0", 0), ("1.6", 1_600_000), ("0.0000004", 0), ("41.20659375", 41_206_594)]
)
def test_milliseconds_to_the_nearest_nanosecond(text: str, ns: int) -> None:
    assert ms_to_ns(text) == ns


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_hops_move_the_boundary_tensor_at_pcie_rate(name: str) -> None:
    moved_bytes = load_trace(name).layers[0].output_bytes
    assert 20.9 < moved_bytes / HOP_NS[name] < 21.05


@pytest.mark.parametrize(
    ("name", "layers", "param_gb", "trainable"),
    [
        ("qwen3-1.7b-rtx4090", 29, 4.06, 2_031_739_904),
        ("llama-3.1-8b-rtx4090", 33, 16.06, 8_030_261_248),
        ("gpt-oss-20b-rtx4090", 25, 41.82, 20_907_927_360),
        ("qwen3-32b-rtx4090", 65, 65.52, 32_762_123_264),
        ("qwen3-235b-lora-rtx4090", 95, 470.29, 94 * 16 * (12288 + 4608 + 4608 + 12288)),
    ],
)
def test_totals(name: str, layers: int, param_gb: float, trainable: int) -> None:
    trace = load_trace(name)
    assert len(trace.layers) == layers
    assert round(sum(layer.param_bytes for layer in trace.layers) / 1e9, 2) == param_gb
    assert sum(layer.params_to_update for layer in trace.layers) == trainable
    assert sum(layer.grad_bytes for layer in trace.layers) == 2 * trainable
    assert sum(layer.optimizer_bytes for layer in trace.layers) == 12 * trainable


def test_no_other_published_trace() -> None:
    with pytest.raises(InputError, match="no published trace 'gpt-2'; there are"):
        published_trace("gpt-2")


@pytest.mark.parametrize("name", MACHINES)
def test_presets_are_connected(name: str) -> None:
    machine = load_machine(name)
    assert (machine.name, len(machine.devices)) == (name, MACHINES[name])
    links = graph(machine)
    assert set(links) == {"host", *machine.switches, *(device.name for device in machine.devices)}
    for count in range(1, MACHINES[name] + 1):
        cut = graph(machine.first_devices(count))
        assert all(nx.has_path(cut, f"gpu{number}", "host") for number in range(count))


@pytest.mark.parametrize("name", MACHINES)
def test_a_path_is_never_a_matter_of_taste(name: str) -> None:
    """Two paths of one cost would make the route depend on the order of the links."""
    machine = load_machine(name)
    links = graph(machine)
    memories = ["host", *(device.name for device in machine.devices)]
    for pair in combinations(memories, 2):
        assert len(list(nx.all_shortest_paths(links, *pair, weight="weight"))) == 1


def test_gpus_use_nvlink_where_there_is_one() -> None:
    a800, h200 = load_machine("8x-a800-nvlink"), load_machine("2x-h200-nvlink")
    assert route(a800, "gpu0", "gpu7") == ["gpu0", "nvswitch", "gpu7"]
    assert route(h200, "gpu0", "gpu1") == ["gpu0", "gpu1"]
    rtx4090 = load_machine("8x-rtx4090")
    assert route(rtx4090, "gpu3", "gpu4") == ["gpu3", "socket0", "host", "socket1", "gpu4"]


@pytest.mark.parametrize("name", ["8x-rtx4090", "8x-a800-nvlink"])
def test_all_gpus_of_a_socket_share_its_memory(name: str) -> None:
    for number in range(8):
        path = route(load_machine(name), f"gpu{number}", "host")
        assert path == [f"gpu{number}", f"socket{number // 4}", "host"]


def test_names_and_files(tmp_path: Path) -> None:
    trace, machine = load_trace("qwen3-1.7b-rtx4090"), load_machine("1x-h100")
    trace.save(tmp_path / "trace.json")
    machine.save(tmp_path / "machine.json")
    assert load_trace(str(tmp_path / "trace.json")) == trace
    assert load_machine(tmp_path / "machine.json") == machine


@pytest.mark.parametrize("name", ["qwen4", "a\nb", "x" * 5000, "a\0b"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_trace(name)
    message = str(caught.value)
    assert message.endswith(
        ": no such file, and no such trace in the library, which has gpt-oss-20b-rtx4090, "
        "llama-3.1-8b-rtx4090, qwen3-1.7b-rtx4090, qwen3-235b-lora-rtx4090, qwen3-32b-rtx4090"
    )
    assert len(message.splitlines()) == 1
    with pytest.raises(InputError, match="no such machine in the library, which has 1x-h100, 2x"):
        load_machine(name)


@pytest.mark.parametrize(
    ("device", "devices", "preset"),
    [
        ("NVIDIA GeForce RTX 4090", 8, "8x-rtx4090"),
        ("NVIDIA GeForce RTX 4090", 1, "8x-rtx4090"),
        ("NVIDIA GeForce RTX 4090", 9, None),
        ("NVIDIA GeForce RTX 4090 D", 1, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 1, None),
        ("NVIDIA A800-SXM4-80GB", 4, "8x-a800-nvlink"),
        ("NVIDIA H100 80GB HBM3", 1, "1x-h100"),
        ("NVIDIA H200", 2, "2x-h200-nvlink"),
        ("NVIDIA GH200 480GB", 1, None),
        ("cpu", 1, None),
        ("", 1, None),
    ],
)
def test_preset_for(device: str, devices: int, preset: str | None) -> None:
    machine = preset_for(device, devices)
    if preset is None:
        assert machine is None
    else:
        assert machine == load_machine(preset).first_devices(devices)


def test_preset_for_no_device() -> None:
    with pytest.raises(InputError, match="0 were asked for"):
        preset_for("NVIDIA H200", 0)


def test_every_published_trace_has_a_preset() -> None:
    for name in trace_names():
        assert isinstance(load_trace(name), Trace)
        assert preset_for(load_trace(name).device, 8) is not None
