"""What goes wrong in `roundel train`: one line each, exit code 2 before the first step, else 1."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from roundel.executor import trainer
from roundel.traces.errors import CannotFit

from .training import SMALL, rows_of, run, words

OR_AUTO = "; or let --policy auto simulate what fits"


def test_checkpoints_of_another_training_are_not_overwritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    line = f"{SMALL.format(text=text)} --policy gpipe --steps 2 --checkpoints {tmp_path}/kept"
    assert "starting at step 0" in run(capsys, f"{line} --resume")[1]
    before = sorted((tmp_path / "kept").iterdir())
    code, _, err = run(capsys, line)
    assert code == 2
    assert "there are checkpoints here already; go on from them with --resume" in err
    assert sorted((tmp_path / "kept").iterdir()) == before


@pytest.mark.parametrize("inside", ["", "/deeper/still"])
def test_checkpoints_that_cannot_be_written_are_known_before_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, inside: str
) -> None:
    taken = tmp_path / "a-file"
    taken.write_text("mine")
    line = f"{SMALL.format(text=text)} --policy gpipe --steps 2 --log {tmp_path}/log.jsonl"
    code, _, err = run(capsys, f"{line} --checkpoints {taken}{inside}")
    assert code == 2
    assert err.startswith(f"roundel: {taken}{inside}: cannot write this folder of checkpoints: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "log.jsonl").exists()
    assert taken.read_text() == "mine"


def test_a_step_to_draw_that_never_comes_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    line = f"{SMALL.format(text=text)} --policy gpipe --steps 2 --timeline {tmp_path}/it.png"
    code, _, err = run(capsys, f"{line} --timeline-step 3")
    assert (code, err.count("\n")) == (2, 1)
    assert "timeline-step" in err or "timeline_step" in err
    assert "there are 2 steps, got 3" in err


def test_auto_says_that_nothing_fits(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    code, out, err = run(capsys, f"{SMALL.format(text=text)} --memory 100KB")
    assert code == 2
    assert "no winner: none of these policies fits the memory" in out
    start = "roundel: policy auto: none fits the memory; the nearest, with weights on the devices, "
    assert err.startswith(start)
    assert "; or with weights on the host, " in err
    assert "would need" in err
    assert "of 97.7 KiB (" in err
    assert "smaller microbatches (more of them, fewer samples or shorter sequences)" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("memory", "made"), [("1MiB", [True]), ("64MiB", [True, False])])
def test_auto_makes_weights_only_when_a_plan_fits(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: Path,
    memory: str,
    made: list[bool],
) -> None:
    from roundel.executor import model_source

    empty, load = [], model_source.load_model

    def noted(*given: Any, **options: Any) -> Any:
        empty.append(options["empty"])
        return load(*given, **options)

    monkeypatch.setattr(model_source, "load_model", noted)
    line = f"{SMALL.format(text=text)} --steps 1 --optimizer-on host --host-memory {memory}"
    code, _, err = run(capsys, f"{line} --memory 1MB")
    assert empty == made, err
    assert code == (0 if len(made) == 2 else 2)


def test_weights_that_the_host_cannot_hold_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    from roundel.executor import model_source

    def full(*given: Any, **options: Any) -> Any:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr(model_source, "load_model", full)
    code, _, err = run(capsys, f"{SMALL.format(text=text)} --policy gpipe --steps 1")
    assert code == 2
    assert err.startswith("roundel: model: decoder-tiny: no room for its weights: ")
    assert err.count("\n") == 1


def test_auto_says_that_nothing_can_run(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    """A cut that is wrong does not fit better with more microbatches."""
    code, out, err = run(capsys, f"{SMALL.format(text=text)} --partition 1,2,3")
    assert code == 2
    assert "trying more" not in out
    assert err.startswith("roundel: policy auto: none can run: ")
    assert err.count("\n") == 1


def test_without_torch_it_says_what_to_install(text: Path) -> None:
    line = ["train", *SMALL.format(text=text).split()]
    script = f"import sys; sys.modules['torch'] = None; import roundel.cli as c; c.main({line!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    said = (
        "roundel: this needs torch, which is not installed: run `make setup` where Roundel's "
        "Makefile is, or pip install '.[torch]' there\n"
    )
    assert done.stderr == said


def test_what_the_host_lacks_is_said_before_the_first_step(
    capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    line = f"{SMALL.format(text=text)} --policy round-robin --devices 1 --host-memory"
    code, _, err = run(capsys, f"{line} 100KB")
    assert code == 2
    assert err.startswith("roundel: this plan cannot fit: host would need ")
    assert "; use states of fewer bits" in err
    assert err.count("\n") == 1
    code, _, err = run(capsys, f"{line} much")
    assert (code, err.count("\n")) == (2, 1)
    assert 'host memory: write bytes, or a size such as "24GiB"' in err


def test_a_layer_that_fails_is_one_line_with_its_name_and_microbatch(
    capsys: pytest.CaptureFixture[str], models: Path, text: Path
) -> None:
    line = f"{models}:failing --data {text} --policy 1f1b --devices 2 --microbatches 2"
    code, _, err = run(capsys, line)
    assert code == 1
    assert err.startswith("roundel: step 1: layer 2 (Fails), microbatch 1, op ")
    assert err.endswith(": KeyError: 'no luck'\n")
    assert err.count("\n") == 1
    assert "Traceback" in run(capsys, f"{line} --debug")[2]


def test_memory_that_runs_out_says_what_was_expected_and_what_to_do(
    capsys: pytest.CaptureFixture[str], models: Path, text: Path
) -> None:
    code, _, err = run(capsys, f"{models}:full --data {text} --policy gpipe --devices 2")
    assert code == 1
    assert "step 1: out of memory: CUDA out of memory. Tried 2 GiB; in layer 2 (Fails)" in err
    assert "expected at most" in err
    assert "use more microbatches" in err
    assert err.count("\n") == 1
    code, _, err = run(capsys, f"{SMALL.format(text=text)} --policy gpipe --memory 100KB")
    assert code == 2
    assert "this plan cannot fit: gpu" in err
    assert err.endswith(f"{OR_AUTO}\n")


def test_a_loss_that_is_not_a_number_stops_with_its_step(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: Path, text: Path
) -> None:
    line = f"{models}:not_a_number --data {text} --policy gpipe --devices 1 --steps 3"
    code, _, err = run(capsys, f"{line} --checkpoints {tmp_path}/kept")
    assert (code, err) == (1, "roundel: step 1: the loss is nan\n")
    assert not (tmp_path / "kept").exists()
    code, _, err = run(capsys, f"{line} --on-nan 'go on' --log {tmp_path}/log.jsonl")
    assert (code, err) == (0, "")
    assert [row["loss"] for row in rows_of(tmp_path / "log.jsonl")] == [None] * 3


WRONG = [
    ("nothing.toml", "nothing.toml: no such file"),
    ("decoder-huge", "model: no model 'decoder-huge'; use a preset (decoder-tiny, "),
    ("decoder-tiny --model decoder-10m", "--model: decoder-10m or decoder-tiny? name one model"),
    ("decoder-tiny --policy nope", "policy.name: no policy 'nope'; use auto, gpipe"),
    ("decoder-tiny --policy no.py:Class", "no.py: no such policy file"),
    ("decoder-tiny --policy gpipe --chunks 3", "chunks: no policy among gpipe has this"),
    ("decoder-tiny --set most=3", "most: no policy of the library has this"),
    (
        "decoder-tiny --policy gpipe --partition '1 1' --devices 2",
        "partition 1 1: has 2 layers",
    ),
    ("decoder-tiny --policy gpipe --clip", "policy.clip: give the norm too, train.clip_norm"),
    ("decoder-tiny --devices gpu7", "devices: no device 'gpu7'; write names as torch has them"),
    ("decoder-tiny --devices cuda:99", "devices: cuda:99: not on this machine"),
    ("decoder-tiny --devices meta", "devices: meta: use cpu or cuda devices"),
    ("decoder-tiny --devices 0", "devices: there must be at least one"),
    ("decoder-tiny --batch 2 --microbatches 4", "a batch of 2 cannot be cut into 4"),
    ("decoder-tiny --batch 0", "--batch: must be more than 0, got 0"),
    ("decoder-tiny --lr 0", "--lr: must be more than 0"),
    ("decoder-tiny --lr fast", "Invalid value for '--lr'"),
    ("decoder-tiny --schedule up", "--schedule: Input should be 'constant', 'linear' or 'cosine'"),
    ("decoder-tiny --warmup 100", "train.warmup: must be fewer than the 100 steps"),
    ("decoder-tiny --optim Adamant", "optimizer: torch.optim has no 'Adamant'; it has ASGD"),
    ("decoder-tiny --optim LBFGS", "optimizer: LBFGS needs all parameters at once"),
    ("decoder-tiny --optim Rprop --weight-decay 1", "Rprop has no option 'weight_decay'"),
    ("decoder-tiny --memory lots", "train.memory: write bytes, or a size such as"),
    ("decoder-tiny --dtype int8", "--dtype: Input should be 'float32'"),
    ("decoder-tiny --compute-dtype bfloat16 --autocast bfloat16", "not both"),
    ("decoder-tiny --data nowhere.txt", "data: nowhere.txt: no such file or folder"),
    ("decoder-tiny --data {text} --sequence 100000", "tokens are too few for sequences of 100000"),
    ("decoder-tiny --tokenizer {words} --data {text}", "has the token 300, the model only knows"),
    ("decoder-tiny --data {models}:nope", "models.py: no function 'nope' in it"),
    ("decoder-tiny --data {models}:good", "good: TypeError: good() got an unexpected keyword"),
    ("{models}:nope", "models.py: no function 'nope' in it"),
    ("{models}:nothing", "must return layers (modules), or (layers, loss_fn)"),
    ("{models}:broken", "RuntimeError: cannot"),
    ("no.py:layers", "model: no.py: no such file"),
    ("{models}:good --dropout 0.5", "tied, dropout and ffn_chunk are for presets"),
    ("decoder-tiny --resume", "checkpoint.folder: missing; say where checkpoints are"),
    ("decoder-tiny --timeline {text}/step.png", "cannot write this picture: "),
    ("decoder-tiny --perfetto /proc/step.json", "/proc/step.json: cannot write this Chrome trace"),
    ("decoder-tiny --timeline step.gif", "name it .png or .svg or .pdf"),
    ("decoder-tiny --timeline-step 3", "log.timeline_step: say where the picture goes"),
    ("decoder-tiny --log {folder}", "cannot write this log: it is a folder"),
    ("decoder-tiny --frobnicate", "No such option"),
    ("decoder-tiny --evaluate-every 1 --held-out 0", "nothing is held out; give a --held-out"),
    ("decoder-tiny --steps 5 --warmup 5", "must be fewer than the 5 steps, got 5; give another"),
    ("decoder-tiny --perfetto step.txt", "name it .json or .gz"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    line: str,
    message: str,
    text: Path,
    models: Path,
    tmp_path: Path,
) -> None:
    if "--data" not in line:
        line += " --data {text}"
    names = {"text": text, "models": models, "folder": tmp_path, "words": words(tmp_path)}
    code, _, err = run(capsys, line.format(**names))
    assert code == 2
    assert err.startswith("roundel: ")
    assert message in err
    assert err.count("\n") == 1


WRONG_FILES = [
    ("[train]\nlr = -1", "train.lr: must be more than 0"),
    ("[train]\nsteps = true", "train.steps: must be a whole number, got true"),
    ("[train]\nsteps = 1.5", "train.steps: must be a whole number, got 1.5"),
    ("[train]\nspeed = 1", "train.speed: no such field; check the spelling"),
    ("[training]\nlr = 1", "training: no such field; check the spelling"),
    ("train = 3", "train: must be a table, [train]"),
    ("[train", "not a TOML file: "),
    ("[data]\nheld_out = 1.0", "data.held_out: Input should be less than 1, got 1.0"),
    ("[data]\nsource = []", "data.source: must not be empty"),
    (
        "[policy]\noptimizer = 'sync'\n[policy.set]\noptimizer = 'stale'",
        "policy.set.optimizer: policy.optimizer is given, too; give one of them",
    ),
    ("[policy]\nrecompute = 'often'", "policy.recompute: Input should be 'none', 'early'"),
    ("[checkpoint]\nevery = 3", "checkpoint.folder: missing"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_FILES)
def test_a_wrong_file_names_itself_and_the_field(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    code, _, err = run(capsys, str(path))
    assert code == 2
    assert err.startswith(f"roundel: {path}: {message}")
    assert err.count("\n") == 1


def test_a_function_that_fails_says_in_which_line_of_its_file_however_that_is_named(
    capsys: pytest.CaptureFixture[str],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own.py").write_text("def layers():\n    raise ValueError('not today')\n")
    monkeypatch.chdir(tmp_path)
    for name in ("own.py", str(tmp_path / "own.py")):
        code, _, err = run(capsys, f"{name}:layers --data {text}")
        assert (code, err.count("\n")) == (2, 1)
        assert "own.py:layers: line 2: ValueError: not today" in err


@pytest.mark.parametrize(("policy", "ends"), [("gpipe", True), ("auto", False)])
def test_who_has_auto_already_is_not_sent_there(
    capsys: pytest.CaptureFixture[str],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    ends: bool,
) -> None:
    def refused(*_: object) -> None:
        raise CannotFit("this plan cannot fit: said so")

    monkeypatch.setattr(trainer, "refuse_what_cannot_fit", refused)
    code, _, err = run(capsys, f"{SMALL.format(text=text)} --policy {policy} --steps 1")
    assert code == 2
    assert err == f"roundel: this plan cannot fit: said so{OR_AUTO if ends else ''}\n"


def test_outputs_of_a_file_are_turned_off_by_none(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    kept, log, picture = (tmp_path / name for name in ("kept", "log.jsonl", "step.png"))
    (tmp_path / "it.toml").write_text(
        f"[model]\nname = 'decoder-tiny'\n[data]\nsource = ['{text}']\nsequence = 16\n"
        "[policy]\nname = 'gpipe'\n[train]\ndevices = ['cpu']\nsteps = 1\nbatch = 2\n"
        f"[checkpoint]\nfolder = '{kept}'\n[log]\nfile = '{log}'\ntimeline = '{picture}'\n"
    )
    off = "--log none --timeline none --checkpoints none"
    assert run(capsys, f"{tmp_path}/it.toml {off}")[0] == 0
    assert not any(each.exists() for each in (kept, log, picture))
    assert run(capsys, f"{tmp_path}/it.toml")[0] == 0
    assert all(each.exists() for each in (kept, log, picture))


def test_data_of_ones_own_bring_what_is_held_out(
    capsys: pytest.CaptureFixture[str], models: Path
) -> None:
    line = f"decoder-tiny --data {models}:Numbers --policy gpipe --devices 1 --steps 1 --batch 2"
    out = run(capsys, f"{line} --sequence 8 --evaluate-every 1 --held-out 0")
    assert "nothing is held out" not in out[2]
