"""The command line: what it prints, and one line and exit code 2 for every wrong input."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import roundel
from roundel.api import compare_work
from roundel.cli import main
from roundel.report import verdict

from ..costs import make_work

KEYS = [
    *("policy", "devices", "microbatches", "steps", "makespan_s", "step_s", "bubble_ratio"),
    *("bubble_ratio_span", "bubble", "exposed_transfer_s", "peak_memory_bytes"),
    *("peak_host_memory_bytes", "fits", "microbatches_per_s", "tokens_per_s"),
]
TRACE = "qwen3-1.7b-rtx4090"
SIZE = "--devices 8 --microbatches 16"


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command line."""
    with pytest.raises(SystemExit) as stop:
        main(line.split(" ") if "'" not in line else _split(line))
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


def _split(line: str) -> list[str]:
    import shlex

    return shlex.split(line)


def test_json_is_one_object_with_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"simulate {TRACE} --policy gpipe {SIZE} --hop-ms 1.6 --recompute late "
        "--partition '3 3 4 4 4 4 4 3' --json"
    )
    code, out, err = run(capsys, line)
    data = json.loads(out)
    assert (code, err, list(data)) == (0, "", KEYS)
    assert data["makespan_s"] == pytest.approx(2.896917, rel=5e-4)
    assert list(data["bubble"]) == ["fill", "switch", "drain", "steady"]
    assert sum(data["bubble"].values()) == pytest.approx(data["bubble_ratio"])


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"roundel {metadata.version('roundel')}\n", "")


def test_round_robin_takes_two_cuts(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"simulate {TRACE} --policy round-robin {SIZE} --hop-ms 1.6 "
        "--partition '7 7 7 7 / 1 3 3 3 3 3 3 3 3 2 2' --json"
    )
    assert json.loads(run(capsys, line)[1])["makespan_s"] == pytest.approx(2.286017, rel=5e-4)


def test_simulate_prints_the_figures_and_what_does_not_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, f"simulate {TRACE} --policy gpipe {SIZE}")
    assert code == 0
    assert "8 devices of 8x-rtx4090" in out
    assert "gpipe does not fit: gpu" in out
    assert "saved activations" in out


def test_simulate_writes_the_files_that_are_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = ("--plot a.png", "--memory-plot b.png", "--perfetto c.json", "--csv d.csv")
    options = " ".join(name.replace(" ", f" {tmp_path}/") for name in names)
    assert run(capsys, f"simulate {TRACE} --policy 1f1b {SIZE} {options}")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png", "c.json", "d.csv"}
    assert json.loads((tmp_path / "c.json").read_text())["traceEvents"]


def test_a_picture_names_the_knobs_that_were_set(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = f"simulate {TRACE} --policy 1f1b --recompute early {SIZE} --plot {tmp_path}/a.svg"
    assert run(capsys, line)[0] == 0
    assert "1f1b (recompute=early)" in (tmp_path / "a.svg").read_text()


def test_of_two_pictures_each_has_the_name_that_the_table_has(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(
        "roundel.report.draw_timeline", lambda timeline, path, title: titles.append(title)
    )
    line = f"compare {TRACE} --policies 1f1b,1f1b {SIZE} --plot {tmp_path}"
    assert run(capsys, line)[0] == 0
    assert [each.partition(":")[0] for each in titles] == ["1f1b", "1f1b #2"]


def test_compare_ranks_draws_and_names_the_winner(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = f"compare {TRACE} --policies gpipe,zb-h1,round-robin {SIZE} --plot {tmp_path}/new/deep"
    code, out, _ = run(capsys, line)
    assert code == 0
    assert "winner: round-robin" in out
    assert "zb-h1 cannot run: layer block.0" in out
    assert {path.name for path in (tmp_path / "new/deep").iterdir()} == {
        *("gpipe.png", "gpipe-memory.png", "round-robin.png", "round-robin-memory.png"),
        "bubbles.png",
    }


def test_compare_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, f"compare {TRACE} {SIZE} --json")[1])
    assert data["winner"] == "layer-to-layer"
    assert [list(each) for each in data["policies"]] == [KEYS] * len(data["policies"])
    assert set(data["refused"]) == {"zb-h1", "zb-h2", "zb-v"}


def test_a_fair_comparison_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "compare llama-3.1-8b-rtx4090 --policies 1f1b,interleaved-1f1b,looped-bfs,round-robin "
        f"{SIZE} --chunks 4 --hop-ms 3.2 --fair"
    )
    out = run(capsys, line)[1]
    assert "for round-robin only" in out
    assert out.splitlines()[-1] == "of +20.7 %, +15.3 % is left"


def test_plan_prints_the_grid_or_csv(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"plan {TRACE} --policy 1f1b --devices 2 --microbatches 2"
    assert run(capsys, line)[1].splitlines()[:2] == ["gpu0    gpu1", "0:15F0  15:29F0"]
    assert run(capsys, f"{line} --csv")[1].splitlines()[1] == "15:29F0,15:29B0,15:29F1,15:29B1"


def test_traces_lists_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "traces")[1]
    assert "qwen3-235b-lora-rtx4090" in out
    assert "2x-h200-nvlink" in out


def test_policies_are_listed_with_their_knobs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "policies")
    assert code == 0
    for name in roundel.POLICIES:
        assert f"  {name} " in out
    assert "round_size=None" in " ".join(out.split())


def test_the_rotation_goes_on_over_steps(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"plan {TRACE} --policy round-robin -d 4 -m 4 --partition '14 14 / 1 14 14'"
    first = run(capsys, line)[1].splitlines()[1].split()
    second = run(capsys, f"{line} --step 1")[1].splitlines()[1].split()
    assert first[0] == "0:14F0"
    assert second[1] == "0:14F0"


WRONG = [
    ("simulate nothing.json --policy gpipe -d 2 -m 2", "nothing.json: no such file"),
    (f"simulate {TRACE} --policy nope -d 2 -m 2", "no policy 'nope'; the policies are gpipe"),
    (f"simulate {TRACE} --policy gpipe -m 2 --hop-ms 1", "devices: give their number"),
    (f"simulate {TRACE} --policy gpipe -d 2", "Missing option '--microbatches'"),
    (f"simulate {TRACE} --policy gpipe -d two -m 2", "Invalid value for '--devices'"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 0", "microbatches: must be at least 1"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --steps 0", "steps: must be at least 1"),
    (f"simulate {TRACE} --policy gpipe -d 40 -m 2", "gpipe: 40 stages"),
    (
        f"simulate {TRACE} --policy gpipe -d 2 -m 2 --recompute no",
        "Invalid value for '--recompute'",
    ),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --partition x", "--partition: not a partition"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --partition 3", "has 1 stages"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --chunks 2", "chunks: no policy among gpipe"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --hop-ms -1", "--hop-ms: must be a time"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --hop-ms nan", "--hop-ms: must be a time"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --plot /no/where.png", "there is no folder /no"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --machine nope", "nope: no such file"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --set x", "--set: write NAME=VALUE"),
    (f"simulate {TRACE} --policy zb-v -d 2 -m 4", "does not split its backward"),
    (f"simulate {TRACE} --policy round-robin -d 2 -m 4 --recompute none", "must recompute"),
    (f"simulate {TRACE} --policy round-robin -d 2 -m 4 --partition 29", "give both cuts"),
    (f"compare {TRACE} --policies gpipe,nope -d 2 -m 4", "no policy 'nope'"),
    (f"plan {TRACE} --policy gpipe -d 2 -m 4 --step -1", "Invalid value for '--step'"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --chunks 3", "their knobs are partition, rec"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --set most=3", "--set most: no policy among"),
    (f"simulate {TRACE} -p round-robin -m 2 --optimizer sync --set optimizer=stale", "one of them"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --memory much", "--memory: write bytes, or a"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --host-memory -1", "--host-memory: write bytes"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --perfetto it.txt", "name it .json or .gz"),
    (f"compare {TRACE} --policies ,, -d 2 -m 4", "policies: name at least one"),
    (f"compare {TRACE} -d 2 -m 4 --plot it.png", "it.png: is to be a folder"),
    (f"compare {TRACE} -d 2 -m 4 --plot=", "--plot: must not be empty"),
    (f"compare {TRACE} -d 2 -m 4 --plot ''", "an empty argument behind --plot: fill it"),
    (f"simulate {TRACE} --policy gpipe -d 2 -m 2 --memory 0", "--memory: must be a byte at least"),
    ("profile decoder-tiny -o x.json --machine-output ./x.json", "where the trace goes"),
    ("frobnicate", "No such command 'frobnicate'"),
    (f"simulate {TRACE} --polcy gpipe", "No such option"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    code, out, err = run(capsys, line)
    assert (code, out) == (2, "")
    assert err.startswith("roundel: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_wrong_trace_file_names_the_field(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"format": "roundel.trace/1", "name": "x", "layers": []}')
    code, _, err = run(capsys, f"simulate {path} --policy gpipe -d 1 -m 1")
    assert code == 2
    assert err.startswith(f"roundel: {path}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["simulate", "compare", "plan", "traces"])
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, f"{command} --help")
    assert code == 0
    assert f"Example: roundel {command}" in " ".join(out.split())


def test_options_are_frozen() -> None:
    """Scripts lean on these; a change here is a change for every user."""
    out = subprocess.run(
        [sys.executable, "-m", "roundel", "simulate", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": ""},
    ).stdout
    options = {word for word in out.replace("│", " ").split() if word.startswith("--")}
    assert options >= {
        *("--policy", "--devices", "--microbatches", "--machine", "--steps", "--partition"),
        *("--recompute", "--hop-ms", "--plot", "--perfetto", "--csv", "--json", "--chunks"),
        *("--round-size", "--optimizer", "--optimizer-on", "--activations", "--clip"),
        *("--weight-share", "--set", "--memory-plot"),
    }


def test_a_fair_comparison_takes_policies_without_recompute_and_goes_into_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = Path(__file__).parents[2] / "examples" / "my_policy.py"
    line = f"compare {TRACE} --policies {own}:Waves,round-robin {SIZE} --fair"
    assert run(capsys, line)[0] == 0
    data = json.loads(run(capsys, f"{line} --json")[1])
    assert [row["fastest_other"] for row in data["fair"]] == ["Waves", "Waves"]
    code, _, err = run(capsys, f"compare {TRACE} --policies zb-h1,round-robin {SIZE} --fair")
    assert (code, err.count("\n")) == (2, 1)
    assert "--fair: needs round-robin and another policy that can run. zb-h1: layer" in err


@pytest.mark.parametrize("width", ["40", "60", "80", "140"])
def test_the_table_keeps_its_names_at_any_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    out = run(capsys, f"compare {TRACE} --policies gpipe,round-robin {SIZE}")[1]
    table = out.split("winner")[0]
    assert "round-robin" in table
    assert "…" not in table


def test_markup_in_names_is_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = roundel.load_trace(TRACE).model_copy(update={"name": "x[/red]", "device": "[/] 4090"})
    trace.save(tmp_path / "odd.json")
    for command in ("simulate {} --policy gpipe", "compare {} --policies gpipe,1f1b"):
        code, out, _ = run(capsys, f"{command.format(tmp_path / 'odd.json')} -d 2 -m 2")
        assert code == 0
        assert "x[/red]" in out


def test_a_trace_without_costs_is_compared_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    layer = roundel.LayerCost(name="free", forward_ns=0, backward_ns=0)
    trace = roundel.Trace(
        name="free", device="d", provenance="p", microbatch_tokens=1, layers=(layer,) * 4
    )
    trace.save(tmp_path / "free.json")
    code, out, _ = run(capsys, f"compare {tmp_path / 'free.json'} --weight-share 0.5 -d 2 -m 2")
    assert code == 0
    assert "as fast as" in out


def test_output_that_cannot_be_written_is_no_traceback() -> None:
    for line in ("traces", f"plan {TRACE} --policy gpipe -d 2 -m 99"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "roundel", *line.split()],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 1
        assert done.stderr == "roundel: cannot write the output: No space left on device\n"


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (roundel.ZBH1((1, 1)), "whose GPUs stand idle 4.0 % of the time (gpipe's 11.1 %); 8.0 %"),
        (roundel.OneFOneB((1, 1)), " a step; as fast as gpipe, the fastest of the others that fit"),
    ],
)
def test_why_the_winner_wins_or_that_it_is_as_fast(first: roundel.Policy, said: str) -> None:
    """Eight microbatches on two stages that take 1, 1 and 1: 25 with ZB-H1, else 27."""
    work = make_work([(1000, 1000, 1000)] * 2, 2, 8)
    assert said in verdict(compare_work(work, [first, roundel.GPipe((1, 1))]))


def test_what_a_policy_file_prints_is_not_in_the_output(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "loud.py"
    own.write_text("import roundel\nprint('hello')\n\nclass Loud(roundel.GPipe):\n    pass\n")
    line = f"simulate {TRACE} --policy {own}:Loud {SIZE} --recompute late --json"
    code, out, err = run(capsys, line)
    assert (code, json.loads(out)["policy"]) == (0, "gpipe")
    assert "hello" in err


def test_pictures_of_long_names_have_short_ones_of_their_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ones = " ".join(["1"] * 28)
    one = f"round-robin[partition={ones} / {ones} 1]"
    names = f"{one},{one[:-1]},round_size=16]"
    assert run(capsys, f"compare {TRACE} --policies '{names}' {SIZE} --plot {tmp_path}")[0] == 0
    files = [each.name for each in tmp_path.iterdir()]
    assert len(files) == 2 * 2 + 1
    assert max(map(len, files)) < 100


def test_a_fair_comparison_takes_the_fastest_round_robin(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = "gpipe,round-robin,round-robin[round_size=16]"
    data = json.loads(run(capsys, f"compare {TRACE} --policies {names} {SIZE} --fair --json")[1])
    assert [row["fastest_other"] for row in data["fair"]] == ["gpipe", "gpipe"]
    steps = [each["step_s"] for each in data["policies"] if each["policy"] != "gpipe"]
    assert data["fair"][1]["round_robin_step_s"] == pytest.approx(min(steps))


def test_policies_none_of_which_can_run_are_a_wrong_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(capsys, f"compare {TRACE} --policies zb-v,zb-h1 {SIZE}")
    assert (code, out.count(" cannot run: ")) == (2, 2)
    assert "none of these policies can run" in out
    assert err == "roundel: policies: none of them could run; each says why\n"


def test_a_stale_policy_is_compared_in_steps_that_show_its_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a single step nothing hides its updates, and it is the slower one."""
    names = "round-robin,round-robin[optimizer=stale]"
    data = json.loads(run(capsys, f"compare {TRACE} --policies {names} {SIZE} --json")[1])
    assert [each["steps"] for each in data["policies"]] == [4, 4]
    assert data["winner"] == "round-robin (optimizer=stale)"
    line = f"compare {TRACE} --policies {names} {SIZE} --json --steps 1"
    assert json.loads(run(capsys, line)[1])["winner"] == "round-robin"
    data = json.loads(run(capsys, f"simulate {TRACE} -p round-robin {SIZE} --json")[1])
    assert data["steps"] == 1


def test_memory_and_devices_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"simulate {TRACE} -p round-robin -m 16 --json"
    data = json.loads(run(capsys, line)[1])
    assert (data["devices"], data["fits"]) == (8, True)
    assert not json.loads(run(capsys, f"{line} --host-memory 16GiB")[1])["fits"]
    assert max(data["peak_memory_bytes"]) > 4 * 2**30
    assert not json.loads(run(capsys, f"{line} --memory 4GiB")[1])["fits"]


def test_what_a_trace_without_bytes_needs_is_not_known(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = roundel.load_trace(TRACE)
    bare = [each.model_copy(update={"param_bytes": 0, "saved_bytes": 0}) for each in trace.layers]
    trace.model_copy(update={"layers": tuple(bare)}).save(tmp_path / "bare.json")
    for command in ("simulate -p gpipe", "compare --policies gpipe"):
        name, *options = command.split()
        for path, said in ((TRACE, False), (tmp_path / "bare.json", True)):
            out = run(capsys, f"{name} {path} {' '.join(options)} {SIZE}")[1]
            assert ("what they need of memory is not known" in out) is said


def test_a_policy_of_ones_own_is_stale_by_its_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import roundel\n\nclass Own:\n    def plan(self, work, step):\n"
        "        return roundel.RoundRobin(optimizer='stale').plan(work, step)\n"
    )
    data = json.loads(run(capsys, f"simulate {TRACE} -p {own}:Own {SIZE} --json")[1])
    assert data["steps"] == 4
    line = f"simulate {TRACE} -p round-robin[optimizer=stale] {SIZE} --json"
    assert data["step_s"] == json.loads(run(capsys, line)[1])["step_s"]


def test_the_machine_is_told_with_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"simulate {TRACE} -p round-robin {SIZE}"
    for more, said in (
        ("", "8 devices of 8x-rtx4090 (24.0 GiB each)"),
        (" --memory 16GiB", "8 devices of 8x-rtx4090 (16.0 GiB each)"),
        (" --hop-ms 1", "8 devices of ideal (no memory limits, updates and transfers to the host"),
        (" --hop-ms 1 --memory 16GiB", "8 devices of ideal (16.0 GiB each, updates and"),
    ):
        assert said in run(capsys, line + more)[1]
