"""Traces from a config: FLOPs by hand, parameters of known models, published layer times."""

import json
from dataclasses import replace
from typing import Any

import pytest

from roundel.traces.analytic import Efficiency, analytic_trace, model_layers
from roundel.traces.costs import Part, block_work, head_work, keys_seen
from roundel.traces.errors import InputError
from roundel.traces.gpus import GPUS, Gpu, find_gpu
from roundel.traces.library import load_trace, preset_for
from roundel.traces.model_config import ModelConfig, read_config
from roundel.traces.published import LORA_RANKS, SHAPES
from roundel.traces.shapes import DecoderShape

RTX4090 = GPUS["rtx-4090"]


def dense(family: str, *sizes: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "vocab_size")
    return {"model_type": family, **dict(zip(names, sizes, strict=True)), **more}


LLAMA_8B = dense("llama", 4096, 32, 32, 8, 14336, 128256, tie_word_embeddings=False)
QWEN3_2B = dense("qwen3", 2048, 28, 16, 8, 6144, 151936, head_dim=128, tie_word_embeddings=True)
GPT_OSS = dense(
    "gpt_oss",
    *(2880, 24, 64, 8, 2880, 201088),
    head_dim=64,
    num_local_experts=32,
    num_experts_per_tok=4,
    sliding_window=128,
)
MOE = {"num_experts": 128, "num_experts_per_tok": 8}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
# Parameters of the published checkpoints.
PARAMS = [
    (LLAMA_8B, 8_030_261_248),
    (dense("llama", 2048, 16, 32, 8, 8192, 128256, tie_word_embeddings=True), 1_235_814_400),
    (dense("mistral", 4096, 32, 32, 8, 14336, 32000, sliding_window=4096), 7_241_732_096),
    (dense("qwen2", 3584, 28, 28, 4, 18944, 152064), 7_615_616_512),
    (dense("qwen2", 896, 24, 14, 2, 4864, 151936, tie_word_embeddings=True), 494_032_768),
    (QWEN3_2B, 1_720_574_976),
    (dense("qwen3", 5120, 64, 64, 8, 25600, 151936, head_dim=128), 32_762_123_264),
    (
        dense(
            *("qwen3_moe", 4096, 94, 64, 4, 12288, 151936),
            head_dim=128,
            moe_intermediate_size=1536,
            **MOE,
        ),
        235_093_634_560,
    ),
    (
        dense(
            *("qwen3_moe", 2048, 48, 32, 4, 6144, 151936),
            head_dim=128,
            moe_intermediate_size=768,
            **MOE,
        ),
        30_532_122_624,
    ),
    (GPT_OSS, 20_914_757_184),
    (GPT2, 124_439_808),
]


@pytest.mark.parametrize(("config", "params"), PARAMS)
def test_parameters_of_known_models(config: dict[str, Any], params: int) -> None:
    assert read_config(config).params == params
    trace = analytic_trace(config, RTX4090, sequence=512, batch=1)
    assert sum(layer.params_to_update for layer in trace.layers) == params
    assert sum(layer.optimizer_bytes for layer in trace.layers) == 12 * params


def test_llama_flops_by_hand() -> None:
    """218.1 M weights in products, 2 FLOPs each; two products of 4096 for each key seen."""
    work = block_work(read_config(LLAMA_8B).shape, 2048, 4)
    products = 2 * 8192 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    scores = 4 * 8192 * 4096 * 1024.5
    assert work.forward_flops == products + scores == pytest.approx(3.711e12, rel=1e-3)
    assert work.backward_flops == 2 * products + 2.5 * scores
    assert sum(part.flops for part in work.backward_weight) == products


def test_a_mixture_computes_its_active_experts_only() -> None:
    shape = DecoderShape(64, 1, 4, 2, 16, 32, 100, experts=8, active_experts=2)
    per_token = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 3 * 64 * 32 + 64 * 8
    attention = 4 * 64 * keys_seen(10)
    assert block_work(shape, 10, 3).forward_flops == pytest.approx(30 * (2 * per_token + attention))


def test_head_flops_by_hand() -> None:
    work = head_work(read_config(LLAMA_8B).shape, 8192)
    assert work.forward_flops == 2 * 8192 * 4096 * 128256
    assert work.backward_flops == 2 * work.forward_flops


def test_lora_has_no_weight_parts_but_its_own() -> None:
    shape = read_config(LLAMA_8B).shape
    full, lora = block_work(shape, 128, 2), block_work(shape, 128, 2, rank=8)
    adapters = 2 * 256 * 8 * (4 * 4096 + 2 * (4096 + 1024) + 4096 - 4096)
    assert sum(part.flops for part in lora.backward_weight) == adapters
    assert lora.forward_flops == full.forward_flops + adapters
    trace = analytic_trace(LLAMA_8B, RTX4090, sequence=128, batch=2, lora_rank=8)
    assert trace.layers[-1].grad_bytes == 0
    assert trace.layers[0].params_to_update == adapters // (2 * 256)


@pytest.mark.parametrize(
    ("sequence", "window", "keys"), [(1, None, 1), (4, None, 2.5), (4, 2, 1.75), (4, 9, 2.5)]
)
def test_keys_seen(sequence: int, window: int | None, keys: float) -> None:
    assert keys_seen(sequence, window) == keys
    mean = sum(min(number + 1, window or sequence) for number in range(sequence)) / sequence
    assert keys_seen(sequence, window) == mean


def test_every_other_block_of_gpt_oss_has_a_window() -> None:
    assert read_config(GPT_OSS).windows == (128, None) * 12
    layers = analytic_trace(GPT_OSS, RTX4090, sequence=4096, batch=1).layers
    assert layers[2].forward_ns < layers[1].forward_ns


def test_a_part_is_as_slow_as_its_worst_limit() -> None:
    gpu = Gpu("g", flops_per_s=100.0, bytes_per_s=10.0, memory_bytes=0, matmul=0.5)
    share = Efficiency(attention=0.25, memory=0.5)
    assert share.seconds(Part("matmul", 100, 5), gpu) == 2
    assert share.seconds(Part("matmul", 100, 20), gpu) == 4
    assert share.seconds(Part("attention", 100, 0), gpu) == 4
    assert replace(share, matmul=1.0).seconds(Part("matmul", 100, 0), gpu) == 1


def test_a_trace_says_that_it_is_computed() -> None:
    trace = analytic_trace(LLAMA_8B, RTX4090, sequence=2048, batch=4, name="llama")
    assert trace.provenance.startswith("analytic: computed from the model's config, not measured")
    assert "efficiencies assumed: matrix products 0.95" in trace.provenance
    assert (trace.name, trace.microbatch_tokens, len(trace.layers)) == ("llama", 8192, 33)
    assert preset_for(trace.device, 8) is not None
    for layer in trace.layers:
        parts = (layer.backward_input_ns or 0) + (layer.backward_weight_ns or 0)
        assert parts == layer.backward_ns


def test_a_tied_head_owns_its_norm_only() -> None:
    head = analytic_trace(QWEN3_2B, RTX4090, sequence=128, batch=1).layers[-1]
    assert (head.tied_to, head.trainable_params) == (0, 2048)
    assert head.param_bytes == 2 * (151936 + 1) * 2048


# Published over computed, least and most over forward and backward: the part of a layer's time
# that the formulas leave out. Published times are of products added up in 16 bits.
BOUNDS = {
    "qwen3-1.7b-rtx4090": ((1.8, 2.0), (1.1, 1.2)),
    "llama-3.1-8b-rtx4090": ((1.3, 1.5), (1.2, 1.3)),
    "qwen3-32b-rtx4090": ((1.3, 1.5), (1.2, 1.3)),
    "gpt-oss-20b-rtx4090": ((2.2, 4.4), (1.2, 1.35)),
    "qwen3-235b-lora-rtx4090": ((2.3, 2.4), (1.1, 1.25)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_published_layer_times(name: str) -> None:
    assert RTX4090.flops_per_s_16 is not None
    gpu = replace(RTX4090, flops_per_s=RTX4090.flops_per_s_16)
    model = ModelConfig("published", SHAPES[name], (None,) * SHAPES[name].layers, tied=False)
    computed = model_layers(model, gpu, 2048, 4, LORA_RANKS[name])
    published = load_trace(name).layers
    for layer, (least, most) in zip((1, -1), BOUNDS[name], strict=True):
        for field in ("forward_ns", "backward_ns"):
            ratio = getattr(published[layer], field) / getattr(computed[layer], field)
            assert least < ratio < most
    assert computed[1].param_bytes == published[1].param_bytes


def test_float32_accumulation_explains_why_published_times_need_the_full_rate() -> None:
    """At the default rate a layer of Llama would take longer than the published one did."""
    layer = analytic_trace(LLAMA_8B, RTX4090, sequence=2048, batch=4).layers[1]
    assert layer.forward_ns > load_trace("llama-3.1-8b-rtx4090").layers[1].forward_ns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "config: model_type: must be one of llama, mistral"),
        ({"model_type": None}, "config: model_type: must be one of"),
        ({"hidden_size": None}, "config: hidden_size: missing; add it"),
        ({"hidden_size": 0}, "config: hidden_size: must be a whole number from 1, got 0"),
        ({"hidden_size": True}, "config: hidden_size: must be a whole number"),
        ({"hidden_size": 4097}, "config: hidden size 4097 is no multiple of its 32 heads"),
        ({"model_type": "qwen3_moe"}, "config: num_experts: missing"),
        ({"sliding_window": 8, "layer_types": ["x"]}, "config: layer_types: must be a list of 32"),
    ],
)
def test_wrong_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_config({**LLAMA_8B, **change})
    assert str(caught.value).startswith(message)


def test_dense_blocks_in_a_mixture_are_refused() -> None:
    config = dense("qwen3_moe", 64, 2, 4, 2, 32, 100, mlp_only_layers=[0], **MOE)
    with pytest.raises(InputError, match="all blocks must have experts"):
        read_config(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence": 0}, "sequence: must be a whole number from 1"),
        ({"batch": 2**26}, "sequence x batch"),
        ({"lora_rank": -1}, "lora_rank: must be from 0"),
    ],
)
def test_wrong_sizes(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        analytic_trace(LLAMA_8B, RTX4090, **{"sequence": 128, "batch": 1, **arguments})


def test_sizes_beyond_what_a_file_can_hold() -> None:
    with pytest.raises(InputError, match="too large for a trace"):
        analytic_trace({**LLAMA_8B, "vocab_size": 2**31 - 1}, RTX4090, sequence=2**13, batch=2**13)


def test_learned_positions_limit_the_sequence() -> None:
    with pytest.raises(InputError, match="this model has 1024 positions"):
        analytic_trace(GPT2, RTX4090, sequence=2048, batch=1)


def test_unknown_gpu_and_efficiency() -> None:
    with pytest.raises(InputError, match="no GPU 'rtx-5090'; there are rtx-4090"):
        find_gpu("rtx-5090")
    with pytest.raises(InputError, match="efficiency: matmul: must be above 0"):
        Efficiency(matmul=1.5)


def test_configs_are_plain_json() -> None:
    assert read_config(json.loads(json.dumps(GPT_OSS))) == read_config(GPT_OSS)
