"""The decoder against an attention written out by hand, and Hugging Face's Llama and Qwen3."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import roundel
from roundel.executor.decoder import Block, decoder_layers, rotary_angles, rotated
from roundel.executor.layers import Layers
from roundel.executor.measure import measure_layers
from roundel.executor.presets import PRESETS
from roundel.executor.token_loss import token_loss
from roundel.traces.shapes import DecoderShape, model_params

SHAPE = DecoderShape(hidden=12, layers=2, heads=6, kv_heads=2, head_size=4, ffn=20, vocabulary=11)
NORMED = DecoderShape(
    hidden=12, layers=2, heads=6, kv_heads=3, head_size=4, ffn=20, vocabulary=11, qk_norm=True
)
TOKENS = torch.tensor([[1, 5, 2, 9, 10, 3, 0], [4, 4, 8, 7, 6, 2, 1]])


def make(shape: DecoderShape, **options: object) -> nn.Sequential:
    torch.manual_seed(2)
    model = nn.Sequential(*decoder_layers(shape, **options))  # type: ignore[arg-type]
    with torch.no_grad():  # Larger than as drawn, so that attention is far from even.
        for each in model.parameters():
            each.add_(torch.randn_like(each), alpha=0.4)
    return model.double()


@pytest.mark.parametrize("shape", [SHAPE, NORMED], ids=["plain", "qk norm"])
def test_attention_is_that_written_out_by_hand(shape: DecoderShape) -> None:
    model = make(shape)
    block = model[1]
    assert isinstance(block, Block)
    value = model[0](TOKENS)
    normed = block.attention_norm(value)
    heads: dict[str, Tensor] = {
        name: getattr(block, name)(normed).unflatten(-1, (-1, shape.head_size))
        for name in ("query", "key", "value")
    }
    if shape.qk_norm:
        heads |= {name: getattr(block, f"{name}_norm")(heads[name]) for name in ("query", "key")}
    shared = shape.heads // shape.kv_heads
    mixed = torch.zeros_like(heads["query"])
    for sample, place, head in product(*map(range, mixed.shape[:3])):
        query = turned(heads["query"][sample, place, head], place)
        keys = [turned(heads["key"][sample, at, head // shared], at) for at in range(place + 1)]
        scores = torch.stack([query @ key / shape.head_size**0.5 for key in keys]).softmax(0)
        for at, score in enumerate(scores):
            mixed[sample, place, head] += score * heads["value"][sample, at, head // shared]
    value = value + block.output(mixed.flatten(2))
    normed = block.ffn_norm(value)
    gate = block.gate(normed)
    expected = value + block.down(gate * torch.sigmoid(gate) * block.up(normed))
    # cos and sin are float32.
    torch.testing.assert_close(block(model[0](TOKENS)), expected, rtol=1e-5, atol=1e-6)


def turned(vector: Tensor, place: int) -> Tensor:
    """A head's vector at a place, as complex numbers that turn."""
    half = len(vector) // 2
    angles = place * 10_000.0 ** (-torch.arange(half, dtype=torch.double) / half)
    numbers = torch.complex(vector[:half], vector[half:]) * torch.polar(angles**0, angles)
    return torch.cat((numbers.real, numbers.imag))


def test_a_token_sees_none_behind_it() -> None:
    model = make(SHAPE)
    changed = TOKENS.clone()
    changed[:, 4] = (changed[:, 4] + 1) % SHAPE.vocabulary
    before, after = model(TOKENS), model(changed)
    assert before.shape == (2, 7, SHAPE.vocabulary)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:, 4:], after[:, 4:]).all(-1).any()


def test_rotation_depends_on_the_distance_alone() -> None:
    vectors = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(1)).double()
    wide = [each.expand(1, 1, 9, 8) for each in vectors]
    query, key = (rotated(each, *rotary_angles(each))[0, 0] for each in wide)
    for distance in range(4):
        products = [query[at + distance] @ key[at] for at in range(9 - distance)]
        torch.testing.assert_close(torch.stack(products), products[0].expand(len(products)))


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_equal_to_hugging_face(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape = NORMED if kind == "Qwen3" else SHAPE
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=False,
    )
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).double()
    ours = make(shape, rotary_base=500.0)
    theirs.load_state_dict(dict(their_names(ours)), strict=True)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-6)


def their_names(model: nn.Sequential) -> list[tuple[str, Tensor]]:
    inner = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "query_norm": "self_attn.q_norm",
        "key_norm": "self_attn.k_norm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    outer = {"table": "model.embed_tokens", "norm": "model.norm", "project": "lm_head"}
    pairs = []
    for name, each in model.named_parameters():
        layer, part, leaf = name.split(".")
        path = outer.get(part) or f"model.layers.{int(layer) - 1}.{inner[part]}"
        pairs.append((f"{path}.{leaf}", each))
    return pairs


def test_tied_layers_share_one_parameter_that_collects_both_gradients() -> None:
    tied, apart = make(SHAPE, tied=True), make(SHAPE)
    assert tied[-1].project.weight is tied[0].table.weight
    with torch.no_grad():
        for mine, other in zip(tied, apart, strict=True):
            other.load_state_dict(mine.state_dict())
    for model in (tied, apart):
        token_loss(model(TOKENS), TOKENS.roll(1)).backward()
    both = apart[0].table.weight.grad + apart[-1].project.weight.grad
    torch.testing.assert_close(tied[0].table.weight.grad, both)


def test_without_memory_without_weights_and_in_another_dtype() -> None:
    large = decoder_layers(PRESETS["qwen3-32b"].shape, device="meta", dtype=torch.bfloat16)
    assert sum(each.numel() for layer in large for each in layer.parameters()) == 32_762_123_264
    assert {each.dtype for layer in large for each in layer.parameters()} == {torch.bfloat16}
    empty = nn.Sequential(*decoder_layers(SHAPE, init=False))
    full = nn.Sequential(*decoder_layers(SHAPE))
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty(TOKENS), full(TOKENS))


def test_weights_are_drawn_as_gpt2_draws_them() -> None:
    torch.manual_seed(0)
    shape = PRESETS["decoder-10m"].shape
    block = decoder_layers(shape)[1]
    assert block.query.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert (block.ffn_norm.weight == 1).all()


def test_dropout_only_while_training() -> None:
    model = make(SHAPE, dropout=0.5)
    assert not torch.equal(model(TOKENS), model(TOKENS))
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", ["decoder-tiny", "decoder-10m"])
def test_presets_have_the_parameters_that_their_shape_says(name: str) -> None:
    shape = PRESETS[name].shape
    layers = decoder_layers(shape, device="meta")
    count = sum(each.numel() for layer in layers for each in layer.parameters())
    assert count == model_params(shape)
    assert len(layers) == shape.layers + 2


def test_the_loss_is_a_mean_in_float32_at_least() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.double)
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    by_hand = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(token_loss(logits, targets), by_hand)
    assert token_loss(logits.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 4}, "mixtures of experts are not supported"),
        ({"kv_heads": 4}, "6 heads cannot share 4 key heads evenly"),
        ({"head_size": 5}, "head_size must be even, got 5"),
    ],
)
def test_a_shape_of_another_kind_is_refused(change: dict[str, int], message: str) -> None:
    from dataclasses import replace

    with pytest.raises(roundel.InputError, match=message):
        decoder_layers(replace(SHAPE, **change))


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_a_feed_forward_part_in_chunks_is_the_whole_one(chunk: int) -> None:
    shape = PRESETS["decoder-tiny"].shape

    def run(ffn_chunk: int | None) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        block = Block(shape, ffn_chunk=ffn_chunk).double()
        value = torch.randn(2, 8, shape.hidden, dtype=torch.double, requires_grad=True)
        output = block(value)
        (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
        return output, [each.grad for each in (value, *block.parameters())]  # type: ignore[misc]

    expected, got = run(None), run(chunk)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-13)
    for mine, theirs in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_feed_forward_part_in_chunks_saves_less() -> None:
    shape = PRESETS["decoder-tiny"].shape

    def saved(ffn_chunk: int | None) -> int:
        layers = decoder_layers(shape, ffn_chunk=ffn_chunk)
        tokens = torch.zeros(1, 64, dtype=torch.long)
        trace, *_ = measure_layers(Layers(layers), token_loss, tokens, tokens, torch.device("cpu"))
        return trace.layers[1].saved_bytes

    whole = saved(None)
    # Four tensors of the inner width are not kept.
    assert saved(16) < whole - 3 * 64 * shape.ffn * 4
