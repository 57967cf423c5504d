"""Hugging Face models split into layers train as the unsplit model does."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import roundel
from roundel.executor.huggingface import causal_lm_loss, split_causal_lm

from . import toy

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "vocab_size": 40}
SGD = partial(torch.optim.SGD, lr=0.1)


def make(family: str, tied: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=16, n_layer=6, n_head=4, vocab_size=40, n_positions=32, **options
        )
        return transformers.GPT2LMHeadModel(config).double()
    kind = {"llama": "Llama", "qwen3": "Qwen3", "mistral": "Mistral"}[family]
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, num_key_value_heads=2, num_hidden_layers=6, tie_word_embeddings=tied, **options
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).double()


def batches(padded: bool) -> list[tuple[Any, torch.Tensor]]:
    numbers = torch.Generator().manual_seed(3)
    result = []
    for _ in range(2):
        tokens = torch.randint(40, (6, 9), generator=numbers)
        inputs: Any = {"input_ids": tokens}
        if padded:
            mask = torch.ones_like(tokens)
            mask[::2, 7:] = 0
            inputs["attention_mask"] = mask
        result.append((inputs, tokens))
    return result


def plain(model: nn.Module, data: list[tuple[Any, torch.Tensor]]) -> list[float]:
    optimizer, losses = SGD([p for p in model.parameters() if p.requires_grad]), []
    model.train()
    for inputs, labels in data:
        optimizer.zero_grad()
        loss = causal_lm_loss(model(**inputs, use_cache=False).logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CASES = [
    ("llama", False, False),
    ("llama", True, True),
    ("qwen3", True, False),
    ("mistral", False, False),
    ("gpt2", True, False),
    ("gpt2", True, True),
]
POLICIES = [
    roundel.GPipe(recompute="late"),
    roundel.OneFOneB(),
    roundel.ZBH1(weight_share=0.5),
    roundel.RoundRobin(**toy.CUTS),
]


@pytest.mark.parametrize(("family", "tied", "padded"), CASES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_losses_and_weights_are_the_unsplit_models(
    family: str, tied: bool, padded: bool, policy: roundel.Policy
) -> None:
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    data = batches(padded)
    reference = make(family, tied, **options)
    expected = plain(reference, data)
    model = make(family, tied, **options)
    layers = split_causal_lm(model)
    with roundel.Trainer(
        layers, causal_lm_loss, policy=policy, optimizer=SGD, devices=["cpu"] * 2, microbatches=3
    ) as trainer:
        losses = [trainer.step(*batch).loss for batch in data]
        state = trainer.state_dict()
    assert losses == pytest.approx(expected, abs=1e-12)
    for name, each in reference.named_parameters():
        torch.testing.assert_close(state[name], each.detach(), rtol=0, atol=1e-11)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(roundel.InputError, match="Linear cannot be split; supported are Llama"):
        split_causal_lm(nn.Linear(2, 2))
