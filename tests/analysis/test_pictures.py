from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from roundel.analysis import boxes as boxes_module
from roundel.analysis.boxes import Boxes, _widened, coverage, draw_boxes, is_crowded
from roundel.analysis.bubble_picture import draw_bubbles
from roundel.analysis.layout import lay_out
from roundel.analysis.memory_picture import draw_memory, thinned
from roundel.analysis.metrics import measure
from roundel.analysis.palette import COLOURS
from roundel.analysis.timeline_picture import draw_pair, draw_timeline
from roundel.traces.errors import InputError
from roundel.traces.timeline import Lane, MemoryCurve, Span, Timeline

from .build import ONE_F_ONE_B, build, curve, from_spans

SIGNATURES = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
ALL_LANES = """
    gpu0:           F0 R0 B0 I1 W1 update . F0'
    gpu0 h2d:       upload . fetch0 . . .
    gpu0 d2h:       . download offload0 . . .
    gpu0 peer:      . send0 . . . .
    gpu1:           . . . . . .
    host optimizer: . . norm update . .
"""
MEMORY = (curve("gpu0", {0: 5, 2: 9}, 8), curve("gpu1", {0: 1}, 8), curve("host", {0: 3}))


def dense(devices: int, each: int) -> Timeline:
    """Back-to-back forwards of 10 ns on every device."""
    spans = [
        Span("F", Lane(device, "compute"), 0, 1, i, 0, 0, 10 * i, 10 * i + 10, 0)
        for device in range(devices)
        for i in range(each)
    ]
    return from_spans(spans)


def drawn(timeline: Timeline, width_px: int = 1000) -> Axes:
    axes = Figure().add_axes((0, 0, 1, 1))
    layout = lay_out(timeline)
    draw_boxes(axes, timeline, layout, width_px / timeline.makespan_ns, width_px)
    return axes


def pixels_of(path: Path, colour: str) -> np.ndarray:
    """Which pixels of a PNG have exactly this colour."""
    image = np.round(imread(path)[:, :, :3] * 255).astype(int)
    return (image == list(bytes.fromhex(colour[1:]))).all(axis=2)


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_pictures_are_written_in_each_format(tmp_path: Path, suffix: str):
    timeline = build(ALL_LANES, unit_ns=1_000_000, memory=MEMORY)
    metrics = {"one": measure(timeline), "two": replace(measure(timeline), fits=False)}
    draw_timeline(timeline, tmp_path / f"timeline.{suffix}", title="all lanes")
    draw_pair(timeline, build(ONE_F_ONE_B), tmp_path / f"pair.{suffix}")
    draw_bubbles(metrics, tmp_path / f"bubbles.{suffix}")
    draw_memory(timeline, tmp_path / f"memory.{suffix}")
    for name in ("timeline", "pair", "bubbles", "memory"):
        data = (tmp_path / f"{name}.{suffix}").read_bytes()
        assert data.startswith(SIGNATURES[suffix])
        assert len(data) > 5_000, name


@pytest.mark.parametrize("draw", [draw_timeline, draw_memory])
def test_wrong_paths_get_one_line(tmp_path: Path, draw):
    timeline = build(ONE_F_ONE_B, memory=MEMORY)
    with pytest.raises(InputError, match=r"a\.gif: cannot write .* \.png or \.svg or \.pdf$"):
        draw(timeline, tmp_path / "a.gif")
    with pytest.raises(InputError, match=r"there is no folder .*nowhere$"):
        draw(timeline, tmp_path / "nowhere" / "a.png")


def test_wrong_paths_of_the_others(tmp_path: Path):
    timeline = build(ONE_F_ONE_B)
    with pytest.raises(InputError):
        draw_pair(timeline, timeline, tmp_path / "a.gif")
    with pytest.raises(InputError):
        draw_bubbles({"a": measure(timeline)}, tmp_path / "nowhere" / "a.png")


def test_a_box_a_task():
    timeline = build(ALL_LANES)
    _, tasks = drawn(timeline).collections
    assert len(tasks.get_paths()) == len(timeline) == 14


def test_boxes_lie_where_their_tasks_ran():
    timeline = build("gpu0: F0 . B0 B0\n gpu1: . F0 . .", unit_ns=10)
    layout = lay_out(timeline)
    _, tasks = drawn(timeline, width_px=400).collections
    corners = [path.get_extents() for path in tasks.get_paths()]
    assert [(box.x0, box.x1) for box in corners] == [(0, 100), (200, 400), (100, 200)]
    assert [box.y0 for box in corners] == [layout.top_px[0], layout.top_px[0], layout.top_px[1]]


def test_a_short_task_is_at_least_a_pixel_wide():
    timeline = build("gpu0: F0 . . . . . . . B0\n gpu0 peer: . send0", unit_ns=1)
    _, tasks = drawn(timeline, width_px=3).collections
    send = tasks.get_paths()[2].get_extents()
    assert send.x1 - send.x0 == pytest.approx(1)


def test_numbers_only_where_they_fit():
    timeline = build("gpu0: F12 F12 F12 F12 F12 F12 F12 F12 F12 B12")
    # 100 pixels: the forward has 90, the backward 10, too few for two digits.
    stamped = [(line.get_xdata().tolist(), line.get_color()) for line in drawn(timeline, 100).lines]
    assert stamped == [([45.0], "white")]
    assert [len(line.get_xdata()) for line in drawn(timeline, 1000).lines] == [1, 1]


def test_the_picture_has_the_kinds_colours_and_white_idle(tmp_path: Path):
    draw_timeline(build("gpu0: F F . B"), tmp_path / "a.png")
    forward = pixels_of(tmp_path / "a.png", COLOURS["F"]).sum(axis=1)
    row = int(forward.argmax())
    backward = pixels_of(tmp_path / "a.png", COLOURS["B"])[row]
    assert forward[row] == pytest.approx(612, abs=4)
    assert backward.sum() == pytest.approx(306, abs=4)
    idle = pixels_of(tmp_path / "a.png", "#FFFFFF")[row, 152:1376]
    assert idle.sum() == pytest.approx(306, abs=4)


def test_crowded_means_many_tasks_or_more_than_pixels(monkeypatch: pytest.MonkeyPatch):
    assert not is_crowded(dense(2, 100), 100)
    assert is_crowded(dense(2, 101), 100)
    monkeypatch.setattr(boxes_module, "MOST_BOXES", 199)
    assert is_crowded(dense(2, 100), 100)


def test_pixels_hold_shares_of_colour():
    timeline = build("gpu0: . F F .\n gpu1: F B . .")
    layout = lay_out(timeline)
    # Two pixels for four units of time.
    image = coverage(Boxes.of(timeline, layout, 0.5), layout, 2)
    colours = {kind: np.array(list(bytes.fromhex(COLOURS[kind][1:]))) for kind in "FB"}
    half, mixed = (colours["F"] + 255) / 2, (colours["F"] + colours["B"]) / 2
    above, below = (image[layout.top_px[lane]].astype(int) for lane in (0, 1))
    np.testing.assert_allclose(above, [half, half], atol=1)
    np.testing.assert_allclose(below, [mixed, [255, 255, 255]], atol=1)


def test_a_short_transfer_can_be_seen_among_pixels_but_compute_keeps_its_share():
    timeline = build("gpu0: F . . . F . . .\n gpu0 peer: send . . . . . send send")
    layout = lay_out(timeline)
    boxes = _widened(Boxes.of(timeline, layout, 0.05), layout)
    assert boxes.right.tolist() == pytest.approx([0.05, 0.25, 0.15, 0.45])


def test_a_crowded_picture_is_drawn_as_pixels(tmp_path: Path):
    timeline = dense(4, 6_000)
    axes = drawn(timeline)
    assert len(axes.images) == 1
    assert sum(len(found.get_paths()) for found in axes.collections) == 0
    draw_timeline(timeline, tmp_path / "a.png")
    assert pixels_of(tmp_path / "a.png", COLOURS["F"]).sum(axis=1).max() == 1224


def test_empty_lanes_are_left_out_but_not_compute():
    layout = lay_out(build("gpu0: F0\n gpu0 h2d: .\n gpu1: .\n host optimizer: ."))
    assert (layout.row_px > 0).tolist() == [True, False, True, False]
    assert [group.title for group in layout.groups] == ["GPU 0", "GPU 1"]


def test_rows_do_not_overlap_and_lie_inside():
    for devices in (1, 8, 64, 700):
        layout = lay_out(dense(devices, 1))
        ends = layout.top_px + layout.row_px
        assert (layout.top_px[1:] >= ends[:-1]).all()
        assert ends[-1] <= layout.height_px
        assert layout.row_px.min() >= 3


def test_very_many_devices_lose_their_transfer_lanes_and_not_one_box_lies_outside():
    spans = []
    for device in range(300):
        for kind, name in (
            ("compute", "F"),
            ("h2d", "upload"),
            ("d2h", "download"),
            ("peer", "send"),
        ):
            spans.append(Span(name, Lane(device, kind), 0, 1, -1, 0, 0, 0, 10, 0))
    timeline = from_spans(spans)
    layout = lay_out(timeline)
    assert layout.kinds == ("compute",)
    assert len(Boxes.of(timeline, layout, 1.0)) == 300


def test_an_empty_timeline_can_be_drawn(tmp_path: Path):
    timeline = from_spans([], lanes=(Lane(0, "compute"),))
    draw_timeline(timeline, tmp_path / "a.png")
    draw_memory(timeline, tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 1_000
    assert (tmp_path / "b.png").stat().st_size > 1_000


def test_svg_says_what_it_shows(tmp_path: Path):
    draw_timeline(build(ALL_LANES, unit_ns=1_000_000), tmp_path / "a.svg", title="a name")
    # matplotlib writes text as outlines and leaves it beside them as a comment.
    text = (tmp_path / "a.svg").read_text()
    for words in ("a name", "host to GPU", "recompute", "time (ms)", "end of step 0", "bubble"):
        assert f"<!-- {words}" in text or words in text, words
    assert "numbered in boxes that have room" in text


def test_numbers_are_only_spoken_of_where_there_is_room_for_one(tmp_path: Path):
    timeline = build("gpu0: " + " ".join("F" * 9_000))
    draw_timeline(timeline, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "microbatches a step" in text
    assert "numbered" not in text


def test_thinning_keeps_the_extremes():
    used = np.arange(100_000) % 97
    used[31_415], used[27_182] = 5_000, -7
    whole = MemoryCurve("gpu0", 0, np.arange(100_000), used, 5_000, 31_415)
    time, thin = thinned(whole, 100, 100_000)
    assert len(time) <= 400
    assert (thin.max(), thin.min()) == (5_000, -7)
    assert time[thin.argmax()] == 31_415
    assert (time[0], time[-1]) == (0, 99_999)
    assert (np.diff(time) > 0).all()
    assert (used[time] == thin).all()


def test_a_short_memory_curve_stays_whole():
    time, used = thinned(curve("gpu0", {0: 1, 5: 2}), 100, 10)
    assert (time.tolist(), used.tolist()) == ([0, 5], [1, 2])
