"""Training speed of a small causal language model, in tokens per second, beside the reference library's GPT-2.

    python benchmarks/language_model.py [--json FILE] [--rounds 7] [--width 384] [--layers 6] [--vocabulary 50257]

Loops on the same random rows, run in turn, some steps each, so that the machine's moods reach all of them alike:

- ours: `LanguageModel` with GPT-2's parts (learned positions, pre-norm, GELU, tied head), the loss in chunks;
- the reference's `GPT2LMHeadModel` with its own loss, in a plain loop with fused AdamW and clipping;
- the same body with PyTorch's cross-entropy over all logits at once, as one writes it by hand.

All have as many parameters and no dropout.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import Contender

from polyformer.data.rows import TextBatch
from polyformer.families.language_model import LanguageModel
from polyformer.families.transformer import FeedForwardChoice
from polyformer.parts.model import TransformerPart, parameters_of
from polyformer.train.loop import accumulate
from polyformer.train.optimisers import AdamW, clip_gradients
from polyformer.train.recipe import TrainRecipe

STEP = Callable[[], int]


def rows(sizes: argparse.Namespace) -> Tensor:
    """Return random tokens [B, S + 1]."""
    return torch.randint(sizes.vocabulary, (sizes.tokens // sizes.length, sizes.length + 1))


def ours(sizes: argparse.Namespace) -> tuple[STEP, int]:
    """Return the step of our loop, and how many parameters it trains."""
    model = config(sizes).spec().build().train()
    assert isinstance(model, TransformerPart)
    optimiser, recipe = AdamW().build(model), TrainRecipe(precision="fp32", smoothing=0.0)

    def step() -> int:
        ids = rows(sizes)
        labels = ids[:, 1:].contiguous()
        batch = TextBatch(ids[:, :-1], labels, None, None, labels.numel(), ids[:, 0].numpy())
        accumulate(model, [batch], recipe)
        clip_gradients(model, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return labels.numel()

    return step, parameters_of(model)


def config(sizes: argparse.Namespace) -> LanguageModel:
    """Return our model in GPT-2's form."""
    return LanguageModel(
        vocabulary=sizes.vocabulary,
        length=sizes.length,
        width=sizes.width,
        depth=sizes.layers,
        heads=sizes.heads,
        feedforward=FeedForwardChoice(4 * sizes.width, "gelu"),
        positions="learned",
    )


def plain(sizes: argparse.Namespace, loss_of: Callable[[Tensor], Tensor], model: nn.Module) -> STEP:
    """Return the step of a loop as one writes it."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> int:
        ids = rows(sizes)
        loss_of(ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return ids.shape[0] * (ids.shape[1] - 1)

    return step


def reference(sizes: argparse.Namespace) -> tuple[STEP, int]:
    """Return the step of the reference library's model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "use_cache": False}
    form = {"n_embd": sizes.width, "n_layer": sizes.layers, "n_head": sizes.heads, "n_positions": sizes.length}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=sizes.vocabulary, activation_function="gelu", **form, **none)).train()
    model.set_attn_implementation("sdpa")

    def loss_of(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return plain(sizes, loss_of, model), parameters_of(model)


def by_hand(sizes: argparse.Namespace) -> tuple[STEP, int]:
    """Return the step of our body with all logits at once."""
    model = config(sizes).spec().build().train()
    assert isinstance(model, TransformerPart)

    def loss_of(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids[:, :-1]).logits
        assert logits is not None
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return plain(sizes, loss_of, model), parameters_of(model)


def main() -> None:
    """Run the loops in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps a round")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    sizes = parser.parse_args()
    torch.manual_seed(0)
    made = {
        "ours": ours(sizes),
        "GPT2LMHeadModel, plain loop": reference(sizes),
        "our body, all logits": by_hand(sizes),
    }
    counts = {count for _, count in made.values()}
    assert len(counts) == 1, f"the models differ in size: {sorted(counts)}"
    contenders = [Contender(name, step) for name, (step, _) in made.items()]
    for contender in contenders:
        contender.run(1)
        contender.rates.clear()
    for _ in range(sizes.rounds):
        for contender in contenders:
            contender.run(sizes.steps)
    told: dict[str, float] = {"parameters": counts.pop()}
    for contender in contenders:
        ratio = statistics.median(a / b for a, b in zip(contenders[0].rates, contender.rates, strict=True))
        rate = statistics.median(contender.rates)
        told |= {contender.name: rate, f"ours / {contender.name}": ratio}
        print(f"{contender.name:30} {rate:8.0f} tokens/s   ours is {ratio:.2f} x")
    print(f"{told['parameters']:,.0f} parameters each")
    if sizes.json:
        sizes.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
