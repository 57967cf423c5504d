"""Traces from profiles: real ones of the CPU (or of ROUNDEL_TEST_DEVICE), and one by hand.

ROUNDEL_TEST_DEVICE=cuda:0 python -m pytest tests/traces/test_kineto.py
"""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from roundel import InputError, Trace
from roundel.traces.kineto import Imported, import_profile
from roundel.traces.kineto_assign import Occurrence, assign
from roundel.traces.kineto_file import read_export
from roundel.traces.kineto_ranges import LAYERS, layer_ranges

from . import profiles
from .profiles import ENGINE, MAIN, Block, Handmade, one_step

DEVICE = os.environ.get("ROUNDEL_TEST_DEVICE", "cpu").split(",")[0]
ON_GPU = DEVICE.startswith("cuda")
THREE = ["layer.0", "layer.1", "layer.2"]


def occurrences(path: Path, pattern: str = LAYERS) -> tuple[Occurrence, ...]:
    export = read_export(path)
    return assign(export, layer_ranges(export, pattern, "here").get)[0]


def names(imported: Imported) -> list[str]:
    return [layer.name for layer in imported.trace.layers]


def check_whole(imported: Imported) -> None:
    """Nothing is lost and nothing counts twice."""
    parts = imported.assigned_ns + imported.optimizer_ns + imported.unassigned_ns
    assert parts == imported.total_ns > 0
    assert sum(each.share for each in imported.unassigned) < 1


# Real exports.


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return profiles.export(tmp_path_factory.mktemp("profile") / "plain.json", device=DEVICE)


def test_layers_come_in_order_each_with_all_its_microbatches(plain: Path) -> None:
    imported = import_profile(plain, tokens=16)
    assert names(imported) == THREE
    assert [len(each.forward_ns) for each in imported.layers] == [3, 3, 3]
    assert [len(each.backward_ns) for each in imported.layers] == [3, 3, 3]
    assert all(layer.forward_ns > 0 and layer.backward_ns > 0 for layer in imported.trace.layers)
    assert all(layer.recompute_ns is None for layer in imported.trace.layers)
    assert imported.without_backward == ()
    assert imported.trace.microbatch_tokens == 16
    assert imported.trace.name == "plain"
    check_whole(imported)


def test_only_the_loss_is_not_assigned(plain: Path) -> None:
    """All of backward finds its layer: of autograd's functions only those of the loss are left."""
    imported = import_profile(plain, tokens=16)
    found = {each.name for each in imported.unassigned if "Backward" in each.name}
    assert found == {"MeanBackward0", "PowBackward0"}
    assert not any("AccumulateGrad" in each.name for each in imported.unassigned)
    assert imported.optimizer_steps == 1
    assert imported.optimizer_ns > 0
    assert not any("Optimizer" in each.name for each in imported.unassigned)


def test_equal_layers_have_equal_work(plain: Path) -> None:
    """By the number of stretches, which does not depend on how fast the machine is.

    Not exactly: a stretch too short for the clock is none, and layer.0's input is a leaf.
    """
    runs = occurrences(plain)
    assert [each.layer for each in runs] == THREE * 3
    for first in (0, 3, 6):  # the first microbatch's gradients are kept, others' are added to them
        forwards = [len(each.busy["forward"]) for each in runs[first : first + 3]]
        backwards = [len(each.busy["backward"]) for each in runs[first : first + 3]]
        assert max(forwards) <= 1.25 * min(forwards)
        assert max(backwards) <= 1.25 * min(backwards)


def test_a_layer_much_heavier_than_the_others_takes_most_of_the_time(tmp_path: Path) -> None:
    layers = nn.ModuleList([Block(), Block(32768 if ON_GPU else 4096), Block()])
    path = profiles.export(tmp_path / "heavy.json", layers=layers, device=DEVICE)
    # The shortest runs: on a busy machine a long one says little.
    light, heavy, other = import_profile(path, tokens=16).layers
    assert min(heavy.forward_ns) > min(light.forward_ns) + min(other.forward_ns)
    assert min(heavy.backward_ns) > min(light.backward_ns) + min(other.backward_ns)


def test_the_median_of_the_runs_is_taken_and_their_spread_is_told(plain: Path) -> None:
    imported = import_profile(plain, tokens=16)
    for layer, times in zip(imported.trace.layers, imported.layers, strict=True):
        assert layer.forward_ns == sorted(times.forward_ns)[1]
        assert layer.backward_ns == sorted(times.backward_ns)[1]
    worst = max(imported.layers, key=lambda each: each.spread)
    assert "the median of 3 run(s)" in imported.trace.provenance
    assert f"up to {100 * worst.spread:.0f} % ({worst.name})" in imported.trace.provenance


def test_a_gzipped_export_is_the_same(plain: Path, tmp_path: Path) -> None:
    packed = tmp_path / "plain.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert import_profile(packed, tokens=16).layers == import_profile(plain, tokens=16).layers
    by_torch = profiles.export(tmp_path / "torch.json.gz", device=DEVICE)
    assert names(import_profile(by_torch, tokens=16)) == THREE


def test_the_trace_is_saved_and_read_back(plain: Path, tmp_path: Path) -> None:
    trace = import_profile(plain, tokens=16, name="mine").trace
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace
    assert trace.name == "mine"


def test_modules_are_layers_too(tmp_path: Path) -> None:
    path = profiles.export(
        tmp_path / "modules.json", profiles.plain, device=DEVICE, with_stack=True
    )
    imported = import_profile(path, tokens=16)
    assert len(names(imported)) == 3
    assert all(name.startswith("Block_") for name in names(imported))
    assert [len(each.forward_ns) for each in imported.layers] == [3, 3, 3]
    assert [len(each.backward_ns) for each in imported.layers] == [3, 3, 3]
    check_whole(imported)


def test_a_pattern_picks_the_ranges_and_a_group_the_name(plain: Path) -> None:
    assert names(import_profile(plain, tokens=16, layers=r"layer\.[02]")) == ["layer.0", "layer.2"]
    assert names(import_profile(plain, tokens=16, layers=r"layer\.(\d)")) == ["0", "1", "2"]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("outside", [profiles.checkpoint_in_range, profiles.range_in_checkpoint])
def test_recompute_is_recompute_and_never_forward(
    outside: object, reentrant: bool, tmp_path: Path, plain: Path
) -> None:
    assert callable(outside)
    path = profiles.export(tmp_path / "checkpoint.json", outside(reentrant), device=DEVICE)
    imported = import_profile(path, tokens=16)
    assert names(imported) == THREE
    for times in imported.layers:
        runs = (times.forward_ns, times.backward_ns, times.recompute_ns)
        assert [len(each) for each in runs] == [3, 3, 3]
    assert all(layer.recompute_ns for layer in imported.trace.layers)
    functions = {each.name for each in imported.unassigned if "Backward" in each.name}
    assert functions == {"MeanBackward0", "PowBackward0"}
    check_whole(imported)
    if outside is profiles.range_in_checkpoint:
        # As much forward as without a checkpoint: less than twice, by number.
        usual = max(len(each.busy["forward"]) for each in occurrences(plain))
        runs = [len(each.busy["forward"]) for each in occurrences(path) if each.busy["forward"]]
        assert max(runs) <= 1.25 * usual


def test_one_checkpoint_of_several_layers_leaves_each_its_own(tmp_path: Path) -> None:
    """Not reentrant: the last layer's backward runs all of them again, in its first function."""
    layers = nn.ModuleList([Block(), Block()])

    def forward(layer: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
        def both(x: torch.Tensor) -> torch.Tensor:
            for number, each in enumerate(layers):
                x = profiles.ranged(each, f"layer.{number}", x)
            return x

        if layer is layers[0]:
            return x
        return torch.utils.checkpoint.checkpoint(both, x, use_reentrant=False)

    imported = import_profile(
        profiles.export(tmp_path / "both.json", forward, layers, DEVICE), tokens=16
    )
    assert names(imported) == ["layer.0", "layer.1"]
    for times in imported.layers:
        runs = (times.forward_ns, times.backward_ns, times.recompute_ns)
        assert [len(each) for each in runs] == [3, 3, 3]


def test_output_bytes_come_from_the_shapes(tmp_path: Path, plain: Path) -> None:
    path = profiles.export(tmp_path / "shapes.json", device=DEVICE, record_shapes=True)
    tensor = 4 * profiles.ROWS * profiles.WIDTH
    layers = import_profile(path, tokens=16).trace.layers
    assert [layer.output_bytes for layer in layers] == [tensor, tensor, 0]
    assert [each.output_bytes for each in import_profile(plain, tokens=16).trace.layers] == [0] * 3


def test_a_frozen_first_layer_has_no_backward_and_that_is_told(tmp_path: Path) -> None:
    frozen = Block().requires_grad_(False)

    def forward(layer: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
        return profiles.ranged(layer, name, x.detach() if layer is frozen else x)

    path = profiles.export(
        tmp_path / "frozen.json", forward, nn.ModuleList([frozen, Block()]), DEVICE
    )
    imported = import_profile(path, tokens=16)
    assert imported.without_backward == ("layer.0",)
    assert imported.trace.layers[0].backward_ns == 0 < imported.trace.layers[0].forward_ns


@pytest.mark.skipif(not (ON_GPU and torch.cuda.is_available()), reason="needs ROUNDEL_TEST_DEVICE")
def test_on_a_gpu_times_are_those_of_kernels(plain: Path) -> None:
    export, imported = read_export(plain), import_profile(plain, tokens=16)
    assert imported.trace.device == torch.cuda.get_device_name(DEVICE)
    kernels = export.kernels
    assert imported.total_ns == sum(each.end_ns - each.start_ns for each in kernels)
    # Every kernel was traced to the op that launched it.
    assert not {each.name for each in imported.unassigned} & {each.name for each in kernels}


# By hand: exactly known times.


def test_kernels_by_hand(tmp_path: Path) -> None:
    imported = import_profile(one_step().write(tmp_path / "hand.json"), tokens=8)
    first, second = imported.trace.layers
    # 3.002 us, and the union of [110, 114) and of the copy's [112, 117).
    assert (first.name, first.forward_ns, first.backward_ns) == ("layer.0", 10_002, 30_000)
    assert (second.name, second.forward_ns, second.backward_ns) == ("layer.1", 7_000, 13_000)
    assert first.recompute_ns is None
    assert imported.trace.device == "NVIDIA H100 80GB HBM3"
    rest = [(each.name, each.total_ns) for each in imported.unassigned]
    assert rest == [("MseLossBackward0", 3_000), ("aten::mse_loss", 2_000), ("aten::ones", 1_000)]
    assert (imported.optimizer_steps, imported.optimizer_ns) == (1, 19_000)
    assert imported.total_ns == 87_002
    assert imported.unassigned[0].share == pytest.approx(3_000 / 87_002)
    check_whole(imported)


def test_without_arrows_the_only_forward_thread_is_meant(tmp_path: Path) -> None:
    made = one_step()
    made.rows = [row for row in made.rows if row["cat"] != "fwdbwd"]
    layers = import_profile(made.write(tmp_path / "hand.json"), tokens=8).trace.layers
    assert [layer.backward_ns for layer in layers] == [30_000, 13_000]


def test_numbers_of_another_thread_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    """A second forward thread, whose functions have the same numbers, is no layer's."""
    made = one_step()
    made.add("cpu_op", "aten::other", 150, 64, 20, Sequence_number=6, Fwd_thread_id=0)
    made.backward("OtherBackward0", 280, 5, 6, thread=2)
    made.launch(ENGINE, 281, 380, 23)
    made.arrow(2, 150, 64, ENGINE, 280)
    imported = import_profile(made.write(tmp_path / "hand.json"), tokens=8)
    assert [layer.backward_ns for layer in imported.trace.layers] == [30_000, 13_000]
    assert imported.unassigned[0].name == "OtherBackward0"
    assert imported.unassigned[0].total_ns == 23_000
    made.rows = [row for row in made.rows if row["cat"] != "fwdbwd"]
    with pytest.raises(InputError, match="no backward could be assigned"):
        import_profile(made.write(tmp_path / "hand.json"), tokens=8)


def test_a_kernel_without_its_call_is_found_by_its_external_id(tmp_path: Path) -> None:
    made = one_step()
    made.add("cpu_op", "aten::late", MAIN, 85, 2, External_id=77)
    made.add("kernel", "late", 7, 135, 29, External_id=77, correlation=999)
    layers = import_profile(made.write(tmp_path / "hand.json"), tokens=8).trace.layers
    # [130, 137) and [135, 164): what overlaps counts once.
    assert layers[1].forward_ns == 34_000


def test_kernels_that_lead_nowhere_and_collectives_are_listed_by_name(tmp_path: Path) -> None:
    made = one_step()
    made.add("kernel", "lost", 7, 600, 31, correlation=998)
    made.launch(ENGINE, 242, 640, 37, "ncclDevKernel_AllReduce")
    made.launch(MAIN, 300, 700, 29, "without an op")
    imported = import_profile(made.write(tmp_path / "hand.json"), tokens=8)
    rest = [(each.name, each.total_ns) for each in imported.unassigned[:3]]
    named = [("ncclDevKernel_AllReduce", 37_000), ("lost", 31_000), ("without an op", 29_000)]
    assert rest == named
    assert imported.trace.layers[0].backward_ns == 30_000
    check_whole(imported)


def test_recompute_by_hand(tmp_path: Path) -> None:
    """A reentrant checkpoint of layer.0: its range again on the engine's thread, then its backward.

    There the engine's thread is a forward thread too, with numbers of its own, autograd's 2.
    """
    made = Handmade()
    made.forward("CheckpointFunction", 5, 50, 3)
    made.add("user_annotation", "layer.0", MAIN, 10, 40)
    made.add("cpu_op", "aten::linear", MAIN, 11, 10)
    made.launch(MAIN, 12, 100, 3)
    made.backward("CheckpointFunctionBackward", 200, 90, 3)
    made.launch(ENGINE, 201, 300, 1, "stash")
    made.add("user_annotation", "layer.0", ENGINE, 210, 20)
    made.add("cpu_op", "aten::linear", ENGINE, 211, 10, Sequence_number=1, Fwd_thread_id=0)
    made.launch(ENGINE, 212, 310, 5)
    made.backward("AddmmBackward0", 240, 10, 1, thread=2)
    made.launch(ENGINE, 241, 320, 7)
    made.arrow(1, MAIN, 5, ENGINE, 200)
    made.arrow(2, ENGINE, 211, ENGINE, 240)
    imported = import_profile(made.write(tmp_path / "hand.json"), tokens=8)
    (layer,) = imported.trace.layers
    assert (layer.forward_ns, layer.recompute_ns, layer.backward_ns) == (3_000, 5_000, 8_000)
    assert imported.unassigned == ()


def test_a_range_that_only_recompute_shows_belongs_to_the_layer_around_it(tmp_path: Path) -> None:
    """A checkpoint inside layer.1, around layer.1.mlp: in forward the outermost range was taken."""
    made = one_step()
    made.add("user_annotation", "layer.1.mlp", ENGINE, 222, 6)
    made.add("cpu_op", "aten::linear", ENGINE, 223, 4, Sequence_number=1, Fwd_thread_id=0)
    made.launch(ENGINE, 224, 324, 5)
    made.add("user_annotation", "layer.0", ENGINE, 223, 3)  # known, but inside recompute
    imported = import_profile(made.write(tmp_path / "hand.json"), tokens=8)
    assert names(imported) == ["layer.0", "layer.1"]
    layer = imported.trace.layers[1]
    assert (layer.forward_ns, layer.recompute_ns, layer.backward_ns) == (7_000, 5_000, 13_000)


def test_on_the_cpu_an_op_s_time_is_its_own_and_a_range_has_none(tmp_path: Path) -> None:
    """aten::linear, 10 us, holds aten::addmm, 6 us; between ops of a range is Python's time."""
    made = Handmade()
    made.add("user_annotation", "layer.0", MAIN, 10, 40)
    made.add("cpu_op", "aten::addmm", MAIN, 11, 6)
    made.forward("aten::linear", 11, 10, 5)
    made.forward("aten::relu", 21, 3, 6)  # at once
    made.add("cpu_op", "aten::clamp_min", MAIN, 23, 4)  # as if it ended after the op that runs it
    made.backward("ReluBackward0", 100, 20, 6)
    made.add("user_annotation", "layer.0", ENGINE, 102, 10)  # a checkpoint's range, again
    made.add("cpu_op", "aten::linear", ENGINE, 104, 4)
    imported = import_profile(made.write(tmp_path / "hand.json"), tokens=8)
    (layer,) = imported.trace.layers
    assert (layer.forward_ns, layer.recompute_ns, layer.backward_ns) == (13_000, 4_000, 10_000)
    assert imported.total_ns == 27_000
    assert imported.trace.device == "cpu"


def test_a_range_as_long_as_its_op_is_around_it(tmp_path: Path) -> None:
    made = Handmade()
    made.forward("aten::linear", 11, 10, 5)
    made.add("user_annotation", "layer.0", MAIN, 11, 10)
    made.backward("AddmmBackward0", 100, 20, 5)
    imported = import_profile(made.write(tmp_path / "hand.json"), tokens=8)
    assert imported.trace.layers[0].forward_ns == 10_000


def test_an_op_around_a_layer_is_not_the_layer_s_unless_a_checkpoint(tmp_path: Path) -> None:
    made = one_step()
    made.forward("MyFunction", 9, 42, 4)
    made.backward("MyFunctionBackward", 290, 5, 4)
    made.launch(ENGINE, 291, 390, 41)
    imported = import_profile(made.write(tmp_path / "hand.json"), tokens=8)
    assert imported.trace.layers[0].backward_ns == 30_000
    assert imported.unassigned[0].name == "MyFunctionBackward"


def test_autograd_inside_a_layer_s_forward_is_forward(tmp_path: Path) -> None:
    made = one_step()
    made.backward("GradOfTheEnergy", 70, 10, 7)
    for row in made.rows[-2:]:
        row["tid"] = MAIN
    made.launch(MAIN, 71, 137, 43)
    layer = import_profile(made.write(tmp_path / "hand.json"), tokens=8).trace.layers[1]
    assert (layer.forward_ns, layer.backward_ns) == (50_000, 13_000)


def test_a_checkpoint_of_two_layers_is_neither_ones(tmp_path: Path) -> None:
    made = Handmade()
    made.forward("CheckpointFunction", 5, 90, 3)
    for number in (0, 1):
        made.add("user_annotation", f"layer.{number}", MAIN, 10 + 40 * number, 30)
        made.add("cpu_op", "aten::linear", MAIN, 11 + 40 * number, 10)
        made.launch(MAIN, 12 + 40 * number, 100 + 10 * number, 3 + number)
    made.backward("CheckpointFunctionBackward", 200, 190, 3)
    made.launch(ENGINE, 201, 300, 1, "stash")
    for number in (0, 1):
        start = 210 + 40 * number
        made.add("user_annotation", f"layer.{number}", ENGINE, start, 20)
        made.forward("aten::linear", start + 1, 10, 1 + number)
        made.rows[-1]["tid"] = ENGINE
        made.launch(ENGINE, start + 2, 310 + 10 * number, 5 + number)
        made.backward("AddmmBackward0", 350 - 40 * number, 10, 1 + number, thread=2)
        made.launch(ENGINE, 351 - 40 * number, 350 - 20 * number, 7 + number)
    made.arrow(1, MAIN, 5, ENGINE, 200)
    made.arrow(2, ENGINE, 211, ENGINE, 350)
    imported = import_profile(made.write(tmp_path / "hand.json"), tokens=8)
    costs = [(c.forward_ns, c.recompute_ns, c.backward_ns) for c in imported.trace.layers]
    assert costs == [(3_000, 5_000, 7_000), (4_000, 6_000, 8_000)]
    stash = [(each.name, each.total_ns) for each in imported.unassigned]
    assert stash == [("CheckpointFunctionBackward", 1_000)]


def test_times_too_long_for_a_float_are_exact(tmp_path: Path) -> None:
    made = one_step()
    path = made.write(tmp_path / "hand.json")
    shifted = json.loads(path.read_text())
    for row in shifted["traceEvents"]:
        row["ts"] = f"@{1_790_857_026_000_000 + int(row['ts'])}.{round(row['ts'] % 1 * 1000):03d}@"
    path.write_text(json.dumps(shifted).replace('"@', "").replace('@"', ""))
    # A float of this size has steps of a quarter of a microsecond.
    assert import_profile(path, tokens=8).trace.layers[0].forward_ns == 10_002


@pytest.mark.parametrize(
    ("name", "is_layer"),
    [
        *(("layer.0", True), ("layer.head", True), ("roundel.layer.embed", True)),
        *(("Block_11", True), ("LlamaDecoderLayer_3", True), ("model.layers.7", True)),
        *(("LayerNorm_2", False), ("Linear_0", False), ("ProfilerStep#3", False)),
    ],
)
def test_names_that_are_layers_where_nobody_says(name: str, is_layer: bool) -> None:
    assert bool(re.match(LAYERS, name)) is is_layer


# Wrong inputs.

WRONG = [
    ("", "no JSON at line 1"),
    ("[]", "no list traceEvents"),
    ('{"traceEvents": []}', "no cpu_op events"),
    ('{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "x"}]}', "traceEvents.0.ts: must be"),
    (
        '{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "x", "ts": 1, "dur": -1}]}',
        "traceEvents.0.dur: must not be negative",
    ),
    (
        '{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "x", "ts": NaN, "dur": 1}]}',
        "traceEvents.0.ts: must be",
    ),
    (
        '{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "x", "ts": 1, "dur": 1}]}',
        "no range matches",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"wrong\.json: ") as caught:
        import_profile(path, tokens=8)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.json: no such profiler export"):
        import_profile(tmp_path / "gone.json", tokens=8)
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(plain.read_bytes())[:-100])
    with pytest.raises(InputError, match="damaged gzip"):
        import_profile(cut, tokens=8)


def test_no_layer_says_which_ranges_there_are(plain: Path) -> None:
    with pytest.raises(InputError, match=r"no range matches 'block'.*'layer\.0', 'layer\.1'"):
        import_profile(plain, tokens=8, layers="block")
    with pytest.raises(InputError, match="is no regular expression"):
        import_profile(plain, tokens=8, layers="layer(")
    with pytest.raises(InputError, match="tokens: a microbatch has at least 1"):
        import_profile(plain, tokens=0)


def test_no_backward_says_what_to_profile(tmp_path: Path) -> None:
    path = profiles.export(tmp_path / "forward.json", device=DEVICE, backward=False)
    with pytest.raises(InputError, match=r"no backward in this export; profile whole steps"):
        import_profile(path, tokens=8)
    made = one_step()
    made.rows = [row for row in made.rows if "layer" not in row["name"]]
    made.add("user_annotation", "layer.0", MAIN, 600, 10)
    with pytest.raises(InputError, match="no backward could be assigned"):
        import_profile(made.write(tmp_path / "hand.json"), tokens=8)
