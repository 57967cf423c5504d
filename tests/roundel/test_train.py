"""`roundel train`, end to end on models of a few thousand parameters."""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roundel import auto
from roundel.train_progress import Stopper, stopping

from .training import EXAMPLES, SMALL, rows_of, run, words

pytest.importorskip("torch")


def test_it_trains_and_writes_all_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    names = "--log {0}/new/log.jsonl --timeline {0}/step.png --perfetto {0}/step.json"
    code, out, err = run(
        capsys,
        f"{SMALL.format(text=text)} --policy 1f1b --steps 20 --lr 1e-2 --evaluate-every 10 "
        f"--warmup 4 --schedule cosine --clip-norm 1 {names.format(tmp_path)}",
    )
    assert (code, err) == (0, "")
    rows = rows_of(tmp_path / "new/log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert list(rows[0]) == ["step", "loss", "tokens_per_s", "lr", "time"]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [10, 20]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert rows[-1]["held_out_loss"] < rows[9]["held_out_loss"] < rows[0]["loss"]
    rates = [row["lr"] for row in rows]
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert "with 1f1b on cpu, cpu" in out
    assert "step 20 of 20: loss" in out
    assert "left" in out
    assert "held-out loss 5.5" in out.splitlines()[-1]
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "step.json").read_text())["otherData"]["source"] == "measured"


@pytest.mark.parametrize(
    "name", ["zb-h1 --recompute early --recompute-layers 1", "zb-v[recompute=late]"]
)
def test_zero_bubble_policies_train_by_their_names(
    name: str, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    """Layers are measured here without a split of their backward."""
    code, out, err = run(capsys, f"{SMALL.format(text=text)} --policy {name} --steps 1")
    assert (code, err) == (0, "")
    assert "1 of 1 steps done" in out


def test_a_file_says_it_all_and_flags_override_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    settings = tmp_path / "train.toml"
    settings.write_text(
        f"""
        [model]
        name = "decoder-tiny"
        tied = true
        [data]
        source = ["{text}"]
        sequence = 16
        [policy]
        name = "interleaved-1f1b"
        partition = "1 2 2 1"
        recompute = "late"
        [train]
        devices = 2
        microbatches = 2
        batch = 4
        steps = 50
        optimizer = "SGD"
        options = {{momentum = 0.9}}
        weight_decay = 0.1
        lr = 1
        memory = "1GiB"
        [log]
        file = "{tmp_path}/log.jsonl"
        """
    )
    code, out, _ = run(capsys, f"{settings} --steps 3 --lr 0.5")
    assert code == 0
    assert "111,024 parameters in 6 layers, with interleaved-1f1b on cpu, cpu: 3 steps of 4" in out
    assert [row["lr"] for row in rows_of(tmp_path / "log.jsonl")] == [0.5] * 3


def test_going_on_from_a_checkpoint_gives_the_same_losses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    line = (
        f"{SMALL.format(text=text)} --policy round-robin --partition '2 2 / 2 1 1 2' --dropout 0.1 "
        "--schedule linear --warmup 2 --weight-decay 0.1 --clip-norm 1 --steps {steps}"
    )
    assert run(capsys, line.format(steps=8) + f" --log {tmp_path}/whole.jsonl")[0] == 0
    parts = f" --log {tmp_path}/parts.jsonl --checkpoints {tmp_path}/kept --save-every 3"
    # The file is what a run leaves that ended in the middle: steps behind the last checkpoint.
    assert run(capsys, line.format(steps=8) + parts)[0] == 0
    (kept,) = [each for each in (tmp_path / "kept").iterdir() if each.name.endswith("6")]
    newest = tmp_path / "kept" / "step-00000008"
    newest.rename(tmp_path / "gone")
    code, out, _ = run(capsys, line.format(steps=8) + parts + " --resume")
    assert code == 0
    assert "going on after step 6" in out
    assert newest.exists()
    assert kept.exists()
    whole, resumed = rows_of(tmp_path / "whole.jsonl"), rows_of(tmp_path / "parts.jsonl")
    for field in ("step", "loss", "lr"):
        assert [row[field] for row in resumed] == [row[field] for row in whole]
    assert (
        "all 8 steps are done already" in run(capsys, line.format(steps=8) + parts + " --resume")[1]
    )


def test_auto_compares_all_policies_and_trains_with_the_winner(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auto, "MOST_ROWS", None)
    line = f"{SMALL.format(text=text)} --steps 2 --checkpoints {tmp_path}/kept"
    code, out, _ = run(capsys, line)
    assert code == 0
    for name in ("gpipe", "1f1b, recompute", "looped-bfs", "zb-h1", "round-robin"):
        assert f"\n{name}" in out
    assert "decoder-tiny on 2 devices of this machine" in out
    chosen = json.loads((tmp_path / "kept/policy.json").read_text())["policy"]
    winner = out.partition("winner: ")[2].partition(",")[0]
    assert winner == chosen
    assert f"with {chosen} on cpu, cpu" in out
    # A run that goes on takes the same policy, whatever is measured now.
    data = json.loads((tmp_path / "kept/policy.json").read_text())
    data |= {"policy": "zb-h2", "knobs": {"weight_share": 0.25}}
    (tmp_path / "kept/policy.json").write_text(json.dumps(data))
    out = run(capsys, line.replace("--steps 2", "--steps 3") + " --resume")[1]
    assert "with zb-h2 on cpu, cpu" in out
    assert f"zb-h2, as {tmp_path}/kept/policy.json has it" in out
    assert "winner" not in out
    # With other memory, shorter sequences or clipping it is chosen anew.
    for steps, more in ((4, "--memory 500MiB"), (5, "--sequence 16"), (6, "--clip-norm 1")):
        out = run(capsys, line.replace("--steps 2", f"--steps {steps} --resume {more}"))[1]
        assert "winner: " in out


def test_auto_takes_more_microbatches_where_nothing_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    line = f"{SMALL.format(text=text)} --memory 520KiB --checkpoints {tmp_path}/kept"
    code, out, _ = run(capsys, f"{line} --steps 2")
    assert code == 0
    assert "with 4 microbatches nothing fits; trying more" in out
    assert "8 samples in 8 microbatches" in out
    out = run(capsys, f"{line} --steps 3 --resume")[1]
    assert "8 samples in 8 microbatches" in out
    assert "nothing fits" not in out
    # So many as are asked for, and no more.
    code, _, err = run(capsys, f"{line}2 --steps 2 --microbatches 4")
    assert code == 2
    assert "none fits the memory" in err


def test_a_users_own_model_loss_data_and_policy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: Path
) -> None:
    own = f"--data {models}:Numbers --policy {EXAMPLES}/my_policy.py:Waves --set most=2"
    log = f"--steps 2 --log {tmp_path}/log.jsonl --evaluate-every 1 --devices 2"
    code, out, _ = run(capsys, f"{models}:with_loss {own} {log}")
    assert code == 0
    assert "in 3 layers, with Waves on cpu, cpu" in out
    rows = rows_of(tmp_path / "log.jsonl")
    assert all(105 < row["loss"] < 107 and 105 < row["held_out_loss"] < 107 for row in rows)


def test_ctrl_c_ends_after_the_step_with_a_whole_checkpoint(tmp_path: Path, text: Path) -> None:
    line = f"{SMALL.format(text=text)} --policy gpipe --steps 100000 --log {tmp_path}/log.jsonl"
    line += f" --checkpoints {tmp_path}/kept"
    process = subprocess.Popen(
        [sys.executable, "-m", "roundel", "train", *shlex.split(line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "log.jsonl"
    until = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    done = rows_of(log)[-1]["step"]
    assert f"{done} of 100000 steps done" in out
    assert out.splitlines()[-1].endswith("go on with --resume")
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name == f"step-{done:08d}"


def test_ctrl_c_twice_interrupts_at_once() -> None:
    from rich.console import Console

    with open(os.devnull, "w") as nowhere, stopping(Console(file=nowhere)) as stopper:
        os.kill(os.getpid(), signal.SIGINT)
        assert isinstance(stopper, Stopper)
        assert stopper.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_hugging_face_config_is_trained_and_a_folder_gone_on_with(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    options = f"--data {text} --devices 2 --policy 1f1b --steps 12 --lr 1e-2 --sequence 32"
    for model in ("saved/config.json", "saved"):
        log = tmp_path / "log.jsonl"
        code, _, err = run(capsys, f"{tmp_path}/{model} {options} --log {log}")
        assert (code, err) == (0, "")
        rows = rows_of(log)
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    # The tokenizer in its folder is its own, unless bytes are asked for.
    words(tmp_path / "saved")
    assert "has the token 300" in run(capsys, f"{tmp_path}/saved {options}")[2]
    assert run(capsys, f"{tmp_path}/saved {options} --tokenizer bytes")[0] == 0


def test_the_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "small_lm.py"))
    losses = example["main"](["--steps", "18"])
    assert losses[0] > 5.4
    assert losses[-1] < 3.5
    assert capsys.readouterr().out.startswith("after 0 steps: held-out loss 5.5")


def test_the_examples_file_trains(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = "--steps 4 --warmup 1 --sequence 32 --devices 2 --policy round-robin"
    code, out, err = run(capsys, f"{EXAMPLES}/train.toml {short}")
    assert (code, err) == (0, "")
    assert "4 of 4 steps done, held-out loss 5.5" in out
    assert {path.name for path in Path("runs").iterdir()} == {"small", "small.png"}
    assert {path.name for path in Path("runs/small").iterdir()} == {"log.jsonl", "step-00000004"}


def test_help_has_an_example_and_the_options_are_frozen() -> None:
    """Scripts lean on these; a change here is a change for every user."""
    out = subprocess.run(
        [sys.executable, "-m", "roundel", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": ""},
    ).stdout
    assert "Example: roundel train" in out
    options = {word for word in out.replace("│", " ").split() if word.startswith("--")}
    assert options >= {
        *("--model", "--tied", "--dropout", "--dtype", "--compute-dtype", "--autocast"),
        *("--data", "--tokenizer", "--sequence", "--held-out", "--policy", "--partition"),
        *("--recompute", "--chunks", "--round-size", "--optimizer", "--optimizer-on"),
        *("--activations", "--clip", "--weight-share", "--set", "--devices", "--microbatches"),
        *("--batch", "--steps", "--optim", "--lr", "--weight-decay", "--schedule", "--warmup"),
        *("--clip-norm", "--memory", "--seed", "--on-nan", "--checkpoints", "--save-every"),
        *("--keep", "--resume", "--log", "--evaluate-every", "--timeline", "--timeline-step"),
        *("--perfetto", "--debug"),
    }
