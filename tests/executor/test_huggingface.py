"""Hugging Face models split into layers train as the unsplit model does."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import roundel
from roundel.executor.compute import layer_seed
from roundel.executor.huggingface import causal_lm_loss, split_causal_lm
from roundel.executor.measure import measure_layers
from roundel.executor.token_loss import token_loss

from . import toy

VOCABULARY, BATCH, LENGTH = 40, 6, 9
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
SGD = partial(torch.optim.SGD, lr=0.5)
WITHOUT_HEAD = {
    "qwen3_moe": "Qwen3Moe",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}

Data = list[tuple[dict[str, Tensor], Tensor]]


@pytest.fixture(autouse=True)
def _one_thread_an_operation() -> Iterator[None]:
    """More would only wait for each other over models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(family: str, **options: Any) -> Any:
    """A model of eight layers in float64, always with the same weights."""
    torch.manual_seed(0)
    if family == "gpt2":
        options = {"n_embd": 16, "n_head": 4, "n_positions": 32, **NO_DROPOUT, **options}
        config = transformers.GPT2Config(n_layer=6, vocab_size=VOCABULARY, **options)
        return transformers.GPT2LMHeadModel(config).double().train()
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 6,
        "vocab_size": VOCABULARY,
    }
    if family == "qwen3_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    kind = WITHOUT_HEAD[family]
    config = getattr(transformers, f"{kind}Config")(**sizes | options)
    # What multiplies for all experts at once knows no float64.
    config._experts_implementation = "eager"
    return getattr(transformers, f"{kind}ForCausalLM")(config).double().train()


def batches(padding: str = "none", steps: int = 2) -> Data:
    numbers = torch.Generator().manual_seed(3)
    result = []
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=numbers)
        inputs = {"input_ids": tokens}
        if padding != "none":
            mask = torch.ones_like(tokens)
            mask[::2, 7:] = 0
            inputs["attention_mask"] = mask if padding == "right" else mask.flip(1)
        result.append((inputs, tokens))
    return result


def plain(model: Any, data: Data) -> list[float]:
    """Train the unsplit model; its losses."""
    optimizer, losses = SGD([p for p in model.parameters() if p.requires_grad]), []
    for inputs, labels in data:
        optimizer.zero_grad()
        loss = causal_lm_loss(model(**inputs, use_cache=False).logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(
    model: nn.Module,
    data: Data,
    policy: roundel.Policy,
    *,
    head_in_loss: bool = False,
    **options: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Train the split model; its losses and weights."""
    with roundel.Trainer(
        split_causal_lm(model, head_in_loss),
        causal_lm_loss,
        policy=policy,
        optimizer=SGD,
        devices=toy.devices(2),
        microbatches=3,
        **options,
    ) as trainer:
        toy.make_races_likely(trainer, seed=1, most_s=0.0005)
        # Blocks pass cos and sin on as they are: what is let go of may live on in an output.
        trainer._poison = False
        return [trainer.step(*batch).loss for batch in data], trainer.state_dict()


def same_training(
    build: Callable[[], nn.Module], data: Data, policy: roundel.Policy
) -> dict[str, Tensor]:
    """Losses and weights are the unsplit model's; the weights."""
    # Both on one kind of device: some sums inside are in float32 there, whatever the weights are.
    reference = build().to(toy.DEVICE)
    expected = plain(reference, [_there(pair) for pair in data])
    losses, state = train(build(), data, policy)
    assert losses == pytest.approx(expected, abs=1e-11)
    assert state.keys() == reference.state_dict().keys()
    for name, each in reference.named_parameters():
        torch.testing.assert_close(state[name], each.detach().cpu(), rtol=0, atol=1e-11)
    return state


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe"])
def test_the_head_in_the_loss_trains_the_same(family: str) -> None:
    data = batches("right")
    reference = make(family).to(toy.DEVICE)
    expected = plain(reference, [_there(pair) for pair in data])
    policy = roundel.RoundRobin(**toy.CUTS)
    losses, state = train(make(family), data, policy, head_in_loss=True)
    assert losses == pytest.approx(expected, abs=1e-11)
    for name, each in reference.named_parameters():
        torch.testing.assert_close(state[name], each.detach().cpu(), rtol=0, atol=1e-11)


def _there(pair: tuple[dict[str, Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    inputs, labels = pair
    return {name: each.to(toy.DEVICE) for name, each in inputs.items()}, labels.to(toy.DEVICE)


POLICIES = [
    roundel.GPipe(recompute="late"),
    roundel.OneFOneB(),
    roundel.ZBH1(weight_share=0.5),
    roundel.RoundRobin(**toy.CUTS),
]


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_losses_and_weights_are_the_unsplit_models(
    policy: roundel.Policy, family: str, tied: bool, padding: str
) -> None:
    build = partial(make, family, tie_word_embeddings=tied)
    same_training(build, batches(padding), policy)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_parameters_stay(policy: roundel.Policy, family: str) -> None:
    def build() -> nn.Module:
        model = make(family, tie_word_embeddings=True)
        model.get_input_embeddings().weight.requires_grad_(False)
        list(model.base_model.children())[1 if family == "llama" else 3][2].requires_grad_(False)
        return model

    state = same_training(build, batches(), policy)
    frozen = {n: p for n, p in build().named_parameters() if not p.requires_grad}
    assert len(frozen) > 5
    for name, each in frozen.items():
        assert torch.equal(state[name], each)


def with_adapters(family: str, **options: Any) -> nn.Module:
    model = make(family, tie_word_embeddings=True)
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    torch.manual_seed(1)
    options |= {"r": 2, "init_lora_weights": False, "fan_in_fan_out": family == "gpt2"}
    config = peft.LoraConfig(target_modules=targets, **options)
    return peft.get_peft_model(model, config).double()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_of_a_peft_model_only_the_adapters_train(policy: roundel.Policy, family: str) -> None:
    build = partial(with_adapters, family)
    state = same_training(build, batches("right"), policy)
    before = build().state_dict()
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    assert changed == {name for name in state if "lora_" in name}


def test_peft_can_also_train_whole_modules() -> None:
    build = partial(with_adapters, "llama", modules_to_save=["norm"])
    state = same_training(build, batches(), roundel.OneFOneB())
    assert "base_model.model.model.norm.modules_to_save.default.weight" in state


def test_names_are_the_models_own_and_tied_weights_are_one() -> None:
    model = make("llama", tie_word_embeddings=True)
    layers = split_causal_lm(model)
    assert len(layers) == 8
    assert dict(layers.named_parameters()) == dict(model.named_parameters())
    assert layers.tied_to(7) == {0}
    assert layers.names[0]["embed_tokens.weight"] == "model.embed_tokens.weight"
    assert layers.names[7]["lm_head.weight"] == "lm_head.weight"


def test_names_in_a_peft_model_are_its_own_and_buffers_have_them_too() -> None:
    for config in (
        peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        peft.VeraConfig(r=2, target_modules=["q_proj"]),
    ):
        model = peft.get_peft_model(make("llama"), config)
        layers = split_causal_lm(model)
        there = dict(layers.named_parameters()) | dict(layers.named_buffers())
        assert there.keys() <= model.state_dict().keys()  # a shared buffer has several names there


# ---- the layers alone, one behind the other


def chained(layers: roundel.Layers, inputs: Any) -> Any:
    for module in layers.modules:
        inputs = module(inputs)
    return inputs


SLIDING = {
    "sliding_window": 4,
    "use_sliding_window": True,
    "max_window_layers": 2,
}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", SLIDING),
        ("qwen3", {}),
        ("qwen3", SLIDING),
        ("gpt2", {}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_logits_and_gradients_are_the_unsplit_models(
    family: str, options: dict[str, Any], attention: str, padding: str
) -> None:
    model, most = make(family, attn_implementation=attention, **options), 1e-12
    if attention == "eager":
        # In float64, transformers makes NaN of the rows of padding at the left.
        model, most = model.float(), 1e-6
    ((inputs, labels),) = batches(padding, steps=1)
    expected = model(**inputs, use_cache=False).logits
    causal_lm_loss(expected, labels).backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    model.zero_grad()
    logits = chained(split_causal_lm(model), inputs)
    causal_lm_loss(logits, labels).backward()
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, expected, rtol=0, atol=most)
    for name, each in model.named_parameters():
        torch.testing.assert_close(each.grad, gradients[name], rtol=0, atol=most)


def test_dropout_is_the_unsplit_models_and_off_in_evaluation_mode() -> None:
    model = make("gpt2", **DROPOUT)
    layers = split_causal_lm(model)
    inputs = batches("right", steps=1)[0][0]

    def both() -> Iterator[Tensor]:
        for run in (lambda: model(**inputs).logits, lambda: chained(layers, inputs)):
            torch.manual_seed(5)
            yield run().detach()

    drawn, drawn_split = both()
    model.eval()
    sure, sure_split = both()
    torch.testing.assert_close(drawn_split, drawn, rtol=0, atol=1e-12)
    torch.testing.assert_close(sure_split, sure, rtol=0, atol=1e-12)
    assert (drawn - sure).abs().max() > 1e-3


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_dropout_draws_by_layer_step_and_microbatch(policy: roundel.Policy) -> None:
    ((inputs, labels),) = batches(steps=1)
    inputs, labels = {"input_ids": inputs["input_ids"].to(toy.DEVICE)}, labels.to(toy.DEVICE)
    model = make("gpt2", **DROPOUT).to(toy.DEVICE)
    layers, losses = split_causal_lm(model), []
    for number, rows in enumerate(torch.arange(BATCH).chunk(3)):
        value: Any = {name: each[rows] for name, each in inputs.items()}
        for layer, module in enumerate(layers.modules):
            torch.manual_seed(layer_seed(9, layer, 0, number))
            value = module(value)
        losses.append(causal_lm_loss(value, labels[rows]))
    loss = sum(losses) / 3
    loss.backward()
    reference = {name: (p.detach() - 0.5 * p.grad).cpu() for name, p in model.named_parameters()}
    got, state = train(make("gpt2", **DROPOUT), [(inputs, labels)], policy, seed=9)
    assert got == pytest.approx([loss.item()], abs=1e-11)
    for name, each in reference.items():
        torch.testing.assert_close(state[name], each, rtol=0, atol=1e-11)


def test_a_model_in_evaluation_mode_trains_without_dropout() -> None:
    def build() -> Any:
        return make("gpt2", **DROPOUT).eval()

    same_training(build, batches(), roundel.OneFOneB(recompute="late"))


def test_what_passes_between_blocks_is_small_and_only_hidden_states_have_gradients() -> None:
    layers = split_causal_lm(make("llama"))
    value = layers.modules[0](batches("right")[0][0])
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in value.items()}
    output = layers.modules[1](leaves)
    assert {name: tuple(each.shape) for name, each in output.items()} == {
        "hidden": (BATCH, LENGTH, 16),
        "padding": (BATCH, LENGTH),
    }
    output["hidden"].sum().backward()
    assert [name for name, each in leaves.items() if each.grad is not None] == ["hidden"]


# ---- the loss


def test_the_loss_is_that_of_transformers() -> None:
    model = make("llama")
    ((inputs, labels),) = batches(steps=1)
    labels = labels.clone()
    labels[:, 5:7] = -100
    output = model(**inputs, labels=labels)
    mine = causal_lm_loss(output.logits.float(), labels)
    torch.testing.assert_close(mine, output.loss, rtol=0, atol=1e-6)


def test_what_a_block_and_its_adapters_leave_out_of_a_recompute() -> None:
    tokens = torch.randint(VOCABULARY, (2, 8))

    def found(model: nn.Module) -> dict[int, tuple[str, ...]]:
        device = torch.device("cpu")
        measured = measure_layers(split_causal_lm(model), token_loss, tokens, tokens, device)
        return {layer: each.names for layer, each in measured.left_out.items()}

    down = "block.mlp.down_proj"
    both = (f"{down}.lora_B.default", f"{down}.base_layer")
    adapted = with_adapters("qwen3", lora_dropout=0.1)
    for model, names in ((make("qwen3"), (down,)), (adapted, both)):
        assert found(model) == {0: (), **dict.fromkeys(range(1, 7), names), 7: ()}
