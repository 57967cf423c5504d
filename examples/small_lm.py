"""A small language model that learns the sources of Python's standard library.

    python examples/small_lm.py
    python examples/small_lm.py --model decoder-10m --batch 64 --sequence 256 --steps 2000 --lr 1e-3
    python examples/small_lm.py --devices cuda:0,cuda:1 --model decoder-100m --memory 4GiB

Without a GPU, two virtual devices on the CPU. `roundel train examples/train.toml` does the same
with progress, checkpoints and a log.
"""

import argparse
from functools import partial

import torch

import roundel
from roundel.executor.decoder import decoder_layers
from roundel.executor.places import find_devices, sharing_cores
from roundel.executor.presets import PRESETS
from roundel.executor.text import TextBatches, load_tokens
from roundel.executor.token_loss import token_loss


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="decoder-tiny", choices=PRESETS)
    parser.add_argument("--devices", default="cpu,cpu")
    parser.add_argument("--policy", default="round-robin")
    parser.add_argument("--memory", help="of each device, as in 4GiB")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-2)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> list[float]:
    """Train; prints and returns the held-out losses, before, on the way and after."""
    chosen = arguments(words)
    torch.manual_seed(0)
    layers = decoder_layers(PRESETS[chosen.model].shape)
    batches = TextBatches(load_tokens("python-stdlib"), chosen.batch, chosen.sequence)
    losses = []
    devices = find_devices(chosen.devices.split(","))
    with (
        sharing_cores(devices),
        roundel.Trainer(
            layers,
            token_loss,
            policy=roundel.make_policy(chosen.policy),
            optimizer=partial(torch.optim.AdamW, lr=chosen.lr),
            devices=devices,
            microbatches=chosen.microbatches,
            memory_limit=chosen.memory,
        ) as trainer,
    ):
        for step in range(chosen.steps + 1):
            if step % max(1, chosen.steps // 6) == 0 or step == chosen.steps:
                held_out = [trainer.evaluate(*pair) for pair in batches.held_out(4)]
                losses.append(sum(held_out) / len(held_out))
                print(f"after {step} steps: held-out loss {losses[-1]:.3f}")
            if step < chosen.steps:
                trainer.step(*batches.batch(step))
    return losses


if __name__ == "__main__":
    main()
