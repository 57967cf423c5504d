"""What fits a card: bytes by hand, and the document says what the script prints."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import roundel
from roundel.traces.model_config import read_config
from roundel.traces.shapes import block_saved_bytes

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "what_fits.py"
GIB, K = 2**30, 1024
LLAMA_PARAMS = 8_030_261_248


@pytest.fixture(scope="module")
def example() -> Iterator[dict[str, Any]]:
    """The script's names; it imports two files from beside it."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield runpy.run_path(str(SCRIPT))
    sys.path.remove(str(ROOT / "examples"))
    for name in ("what_fits_picture", "what_fits_traces"):
        sys.modules.pop(name)


def test_full_training_holds_sixteen_bytes_a_parameter_on_the_host(example: dict[str, Any]) -> None:
    """Weights, master, two moments, and at the end, before clipping, all gradients."""
    llama = example["Case"]("llama-3.1-8b")
    short = example["outcome"](llama, 1 * K)
    assert short.fits
    assert short.host_bytes == pytest.approx(16 * LLAMA_PARAMS, rel=1e-3)
    assert short.host_bytes >= 16 * LLAMA_PARAMS


def test_inputs_of_visits_wait_on_the_host(example: dict[str, Any]) -> None:
    """One block a visit: 31 inputs of 8 sequences."""
    lora = example["Case"]("llama-3.1-8b", 16)
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    inputs = 8 * 31 * 48 * K * 2 * 4096
    host = example["simulated"](lora, 48 * K, size=1).host_bytes
    state = 2 * LLAMA_PARAMS + 14 * adapters
    # No gradient has come down when the last input goes there.
    assert host == state + inputs


def test_longer_contexts_need_more_and_lora_much_less(example: dict[str, Any]) -> None:
    for model in ("qwen3-1.7b", "llama-3.1-8b"):
        full, lora = (
            [example["outcome"](example["Case"](model, rank), each * K) for each in (2, 8, 32)]
            for rank in (0, 16)
        )
        for outcomes in (full, lora):
            assert all(each.fits for each in outcomes)
            hosts = [each.host_bytes for each in outcomes]
            assert hosts == sorted(hosts)
            rates = [each.tokens_per_s for each in outcomes[1:]]
            assert rates == sorted(rates, reverse=True)
        least = example["leanest"](example["Case"](model, 16), 8 * K)
        assert least.host_bytes < full[1].host_bytes / 5
        # The quickest cut keeps more inputs on the host than the leanest.
        assert lora[1].host_bytes < full[1].host_bytes / 4


def test_the_longest_context_is_the_last_that_fits(example: dict[str, Any]) -> None:
    for how in ({}, {"head_in_loss": False}):
        case = example["Case"]("llama-3.1-8b", **how)
        most = example["longest"](case)
        assert example["outcome"](case, most).fits
        assert not example["outcome"](case, most + K).fits
    # All logits and their gradient alone, 4 bytes each of 128,256 a token, leave no room for more.
    assert 0.7 * 23 * GIB < most * 4 * 128256 < 23 * GIB


def test_one_block_a_visit_needs_the_least_of_the_gpu(example: dict[str, Any]) -> None:
    case = example["Case"]("llama-3.1-8b")
    needs = [example["simulated"](case, 16 * K, size).device_bytes for size in (1, 2, 4, 8)]
    assert needs == sorted(needs)
    leanest = example["leanest"](case, 16 * K)
    assert leanest.fits
    assert leanest.host_bytes <= example["outcome"](case, 16 * K).host_bytes


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_blocks_of_hugging_face_keep_that_much(example: dict[str, Any], family: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from roundel.executor.huggingface import split_causal_lm
    from roundel.executor.values import tensors_of

    config = transformers.AutoConfig.for_model(
        family,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
        head_dim=64,
        vocab_size=100,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    embedding, block, _ = split_causal_lm(model).modules
    tokens, saved = 64, {}
    value = embedding(torch.randint(0, 100, (1, tokens)))

    def note(tensor: Any) -> Any:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = block(value)
    for other in (*model.parameters(), *tensors_of(value), *tensors_of(output)):
        saved.pop(other.untyped_storage().data_ptr(), None)
    shape = read_config(config.to_dict()).shape
    more = sys.modules["what_fits_traces"].module_bytes(shape)
    assert sum(saved.values()) / tokens == pytest.approx(block_saved_bytes(shape) + more, rel=0.01)


def test_the_head_works_in_parts_as_large_as_the_executors(example: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from roundel.executor.head_loss import CHUNK

    assert sys.modules["what_fits_traces"].HEAD_PART == CHUNK


def printed(*words: str) -> str:
    """By the script as it is run, in a process a core."""
    call = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout


def test_the_document_has_what_the_script_prints() -> None:
    memory, contexts = printed("--markdown").strip().split("\n\n")
    document = (ROOT / "docs" / "what-fits.md").read_text()
    assert memory in document
    assert contexts in document


def test_tables_and_the_picture_of_one_model(tmp_path: Path) -> None:
    words = ["--models", "qwen3-1.7b", "--lora-rank", "8", "--microbatches", "4"]
    lines = printed(*words, "--plot", str(tmp_path / "fits.png")).splitlines()
    assert lines[1].startswith("qwen3-1.7b  fully ")
    assert lines[2].startswith("qwen3-1.7b  LoRA, rank 8 ")
    assert (tmp_path / "fits.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "gpt-5"], "no 'gpt-5'; there are qwen3-1.7b"),
        (["--reserve", "24"], "--reserve: from 0 to less than 24 GiB"),
        (["--devices", "9", "--processes", "1"], "devices"),
        (["--processes", "0"], "--processes: from 1"),
    ],
)
def test_mistakes_are_told(example: dict[str, Any], words: list[str], message: str) -> None:
    with pytest.raises(roundel.InputError, match=message):
        example["main"](words)
