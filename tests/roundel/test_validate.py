"""`roundel profile` and `roundel validate`: the whole loop, on virtual devices."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

import roundel
from roundel.cli import main
from roundel.executor import places, training_setup
from roundel.executor.trainer import Trainer
from roundel.traces.machine import Host
from roundel.validate import _Same, differences

SMALL = "decoder-tiny --devices cpu,cpu --batch 8 -m 4 --sequence 32"


def run(line: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    return int(ended.value.code or 0)


def test_a_profile_is_a_trace_and_a_machine_that_simulate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, machine = tmp_path / "trace.json", tmp_path / "machine.json"
    assert run(f"profile {SMALL} -o {trace} --machine-output {machine}") == 0
    output = capsys.readouterr().out
    assert "4 x Block" in output
    loaded = roundel.load_trace(trace)
    assert loaded.microbatch_tokens == 64
    assert all(layer.backward_weight_ns is not None for layer in loaded.layers)
    assert output.splitlines()[-1].endswith(
        f"next: roundel compare {trace} -d 2 -m 4 --machine {machine}"
    )
    assert run(f"compare {trace} -d 2 -m 4 --machine {machine} --policies gpipe,zb-h1") == 0


def test_a_config_of_a_model_too_large_for_memory_is_profiled(tmp_path: Path) -> None:
    """Qwen3-235B's shape but for thinner layers: 94 blocks of 128 experts, 4 GB of weights."""
    pytest.importorskip("transformers")
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 94,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "moe_intermediate_size": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 1000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    trace = tmp_path / "trace.json"
    model = tmp_path / "config.json"
    assert run(f"profile {model} --batch 2 -m 2 --sequence 16 -d cpu -o {trace}") == 0
    loaded = roundel.load_trace(trace)
    assert len(loaded.layers) == 96
    assert loaded.name == tmp_path.name
    experts = 128 * 3 * 128 * 128 * 4
    assert experts < loaded.layers[50].param_bytes < 1.1 * experts


def test_policies_are_predicted_run_and_laid_over_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(f"validate {SMALL} --policies 1f1b,round-robin --measure 2 -o {out}") == 0
    output = capsys.readouterr().out
    assert "order of the policies:" in output
    made = [".png", ".predicted.json.gz", ".measured.json.gz"]
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("trace.json", "machine.json", "validate.json"),
        *(f"{policy}{ending}" for policy in ("1f1b", "round-robin") for ending in made),
    }
    drawn = json.loads(gzip.decompress((out / "1f1b.measured.json.gz").read_bytes()))
    assert drawn["otherData"]["source"] == "measured"
    figures = json.loads((out / "validate.json").read_text())["policies"]
    assert [each["policy"] for each in figures] == ["1f1b", "round-robin"]
    for each in figures:
        step = each["step_s"]
        assert len(step["steps"]) == 2
        assert step["error"] == pytest.approx(step["predicted"] / step["measured"] - 1)
        assert each["measured"]["makespan_s"] > 0
        # On the CPU nothing is launched ahead.
        assert all(late == ops > 0 for late, ops in each["ops_late"].values())
        assert list(each["ops_late"]) == ["gpu0 compute", "gpu1 compute"]
    # The same prediction comes from the files.
    simulation = roundel.simulate(
        out / "trace.json", "1f1b", microbatches=4, machine=out / "machine.json"
    )
    assert simulation.metrics.step_s == figures[0]["step_s"]["predicted"]


def test_knobs_of_one_policy_stand_behind_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stale step is predicted, and simulated again, among others, for it goes on beside them."""
    out = tmp_path / "out"
    names = ["round-robin", "round-robin[optimizer=stale,recompute=late]"]
    assert run(f"validate {SMALL} --policies {','.join(names)} --measure 1 -o {out}") == 0
    lines = capsys.readouterr().out.splitlines()
    # However long a name is, the figures are there.
    rows = [line for line in lines if re.search(r" predicted +[\d.]+ \S+ +[\d.]+ % .*B *$", line)]
    assert len(rows) == 2
    assert max(map(len, rows)) <= 80
    # The rest of a name stands in the lines below its beginning.
    width = rows[0].index("predicted")
    first = lines.index(rows[0])
    stop = next(number for number, line in enumerate(lines) if line.startswith("round"))
    assert "".join(line[:width].strip() for line in lines[first:stop]) == "".join(names)
    sync, stale = json.loads((out / "validate.json").read_text())["policies"]
    assert [sync["policy"], stale["policy"]] == names
    assert (out / "round-robin-optimizer-stale-recompute-late.png").is_file()
    # What is predicted of it alone lasts until its last update; among others it is shorter.
    assert stale["step_s"]["predicted"] < stale["predicted_alone"]["step_s"]
    assert stale["resimulated"]["steps"] > sync["resimulated"]["steps"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"validate {SMALL} --policies nonsense", "nonsense"),
        (f"validate {SMALL} --policies gpipe,gpipe", "gpipe is named twice"),
        (f"validate {SMALL} --policies ,", "name at least one"),
        (f"validate {SMALL} --policies gpipe[chunks=2]", "gpipe: no knob 'chunks'"),
        (f"validate {SMALL} --policies gpipe[chunks]", "write NAME=VALUE, got 'chunks'"),
        (f"validate {SMALL} --policies gpipe --chunks 2", "chunks: no policy among gpipe"),
        (f"validate {SMALL} --policies gpipe -o /dev/null/x", "cannot make this folder"),
        (f"validate {SMALL} --policies gpipe -o /proc", "/proc: cannot write to this folder"),
        (f"validate {SMALL} --policies round-robin --memory 10KB", "none of them could run"),
        ("profile no-such-model -o t.json", "no model 'no-such-model'"),
        (f"profile {SMALL} -o /nowhere/t.json", "/nowhere/t.json"),
    ],
)
def test_mistakes_are_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_largest_difference_is_named() -> None:
    before = roundel.simulate("qwen3-1.7b-rtx4090", "gpipe", devices=2, microbatches=4).timeline
    after = roundel.simulate("qwen3-1.7b-rtx4090", "gpipe", devices=2, microbatches=4).timeline
    assert differences(before, after)[0].measured_s == differences(before, after)[0].predicted_s
    (rows,) = ((after.kind == 0) & (after.lane == after.lane[after.kind == 0].max())).nonzero()
    after.end_ns[rows] += 10**9
    (found, *_) = differences(before, after)
    assert found.measured_s - found.predicted_s == pytest.approx(len(rows))
    assert found.lane.startswith("gpu1")


def test_the_run_is_simulated_again_by_the_plan_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that would make another cut do not."""
    trace = roundel.load_trace("qwen3-1.7b-rtx4090")
    work = roundel.make_work(trace, microbatches=4, devices=2)
    policy = roundel.OneFOneB()
    slow = trace.layers[0].model_copy(update={"forward_ns": 10**10, "backward_ns": 10**10})
    other = roundel.make_work(
        trace.model_copy(update={"layers": (slow, *trace.layers[1:])}), microbatches=4, devices=2
    )
    assert policy.plan(other, 0) != policy.plan(work, 0)
    assert _Same(policy, work).plan(other, 0) == policy.plan(work, 0)


def test_it_is_simulated_again_with_the_updates_that_it_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever rate was measured before; here one of a parameter a second is made of it."""
    slow = Host(optimizer_params_per_s=1)
    monkeypatch.setattr(
        "roundel.validate.machine_of_timeline",
        lambda timeline, predicted, machine: machine.model_copy(update={"host": slow}),
    )
    line = f"validate {SMALL} --policies round-robin --measure 1 -o {tmp_path}"
    assert run(line) == 0
    (figures,) = json.loads((tmp_path / "validate.json").read_text())["policies"]
    assert figures["step_s"]["resimulated"] > 1000 > figures["step_s"]["predicted"]


def test_a_policy_that_fails_does_not_lose_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policies.py").write_text(
        "class Broken:\n    def plan(self, work, step):\n        raise KeyError('no luck')\n"
    )
    out = tmp_path / "out"
    names = f"{tmp_path}/policies.py:Broken,gpipe"
    assert run(f"validate {SMALL} --policies {names} --measure 1 -o {out}") == 0
    assert "no luck" in capsys.readouterr().out
    assert (out / "gpipe.png").is_file()


def test_figures_are_there_as_soon_as_they_are_found(tmp_path: Path) -> None:
    """A run that is interrupted, or killed, in its second policy leaves what the first gave."""
    (tmp_path / "policies.py").write_text(
        "class Stopped:\n    def plan(self, work, step):\n        raise KeyboardInterrupt\n"
    )
    out = tmp_path / "out"
    names = f"gpipe,{tmp_path}/policies.py:Stopped"
    assert run(f"validate {SMALL} --policies {names} --measure 1 -o {out}") != 0
    figures = json.loads((out / "validate.json").read_text())["policies"]
    assert [each["policy"] for each in figures] == ["gpipe"]
    assert not list(out.glob("*.tmp"))
    # A second run that is stopped before it has found anything leaves what is there.
    names = f"{tmp_path}/policies.py:Stopped"
    assert run(f"validate {SMALL} --policies {names} --measure 1 -o {out}") != 0
    assert json.loads((out / "validate.json").read_text())["policies"] == figures
    assert len(roundel.load_trace(out / "trace.json").layers) > 1


def test_a_file_that_clips_and_a_policy_from_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.toml").write_text("[train]\nclip_norm = 1.0\nbatch = 8\nmicrobatches = 4\n")
    out = tmp_path / "out"
    waves = Path(__file__).parents[2] / "examples" / "my_policy.py"
    line = f"validate {tmp_path}/train.toml -d cpu,cpu --sequence 32 --measure 1 -o {out}"
    assert run(f"{line} --policies 1f1b") == 0
    assert run(f"validate {SMALL} --measure 1 -o {out} --policies {waves}:Waves") == 0
    assert any(path.name.endswith("my_policy.py-Waves.png") for path in out.iterdir())


def test_peaks_of_memory_are_counted_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    step = Trainer.step

    def noted(trainer: Trainer, *batch: Any) -> Any:
        events.append("step")
        return step(trainer, *batch)

    monkeypatch.setattr(Trainer, "step", noted)
    monkeypatch.setattr(places, "count_peaks_anew", lambda devices: events.append("anew"))
    assert run(f"validate {SMALL} --policies gpipe --measure 2") == 0
    assert events == ["step", "step", "anew", "step", "step"]


@pytest.mark.parametrize(
    ("policies", "flags", "expected"),
    [
        ("gpipe,round-robin", "", {"host", "device"}),
        ("gpipe,round-robin", "--optimizer-on host", {"host"}),
        ("gpipe,round-robin[optimizer_on=device]", "--optimizer-on host", {"host", "device"}),
        ("round-robin[optimizer_on=device]", "", {"device"}),
    ],
)
def test_updates_are_measured_where_the_policies_run_them(
    policies: str, flags: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measured(*given: Any, updates_on: Any, **options: Any) -> None:
        asked.append(set(updates_on))
        raise roundel.InputError("that is enough")

    monkeypatch.setattr(training_setup, "measured_work", measured)
    assert run(f"validate {SMALL} --policies {policies} {flags}") == 2
    assert asked == [expected]
