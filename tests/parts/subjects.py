"""What is put through the invariance contract: a sample of every part, and variants with declarations of their own.

A part is put through by being listed in `SAMPLES` (tests/spec/trees.py), as every part must be. What can't run by
itself (a kernel, a position scheme, a way of joining positions) is put into the smallest part that can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from polyformer import parts
from polyformer.parts import Attention, Causal, Everyone, FeedForward, Heads, LayerNorm, Linear, SameDocument, Window
from polyformer.parts.embeddings import Combine
from polyformer.parts.part import Part
from polyformer.spec import Spec
from tests.parts.models import SHAPES, decoder
from tests.spec.trees import SAMPLES, WIDTH, buildable, hashing

Feed = Literal["rows", "ids", "sound", "grid", "pixels"]

CAUSAL, BOTH_WAYS = Causal() & SameDocument(), SameDocument()
BIG_BIRD = parts.BlockWindow(2) | parts.Edges(2) | parts.InTraining(parts.RandomBlocks(2, 1, 4))
RULES = {"causal": CAUSAL, "both ways": BOTH_WAYS, "causal window": CAUSAL & Window(3)}


@dataclass(frozen=True)
class Subject:
    """A spec to be measured.

    Attributes:
        part: the type that it is an example of.
        variant: what tells it from other examples of that part.
        spec: what is built and run.
        feed: what it reads: rows [B, S, width]; token ids; a waveform; rows that are a grid; pixels.
    """

    part: type[Spec]
    variant: str
    spec: Spec
    feed: Feed = "rows"
    width: int = WIDTH

    def __str__(self) -> str:
        return self.part.__name__ + (f", {self.variant}" if self.variant else "")

    @property
    def whole(self) -> Spec:
        """What is built: rows come out of a stack, which names the slots of caches."""
        return parts.Stack((self.spec,)) if self.feed in ("rows", "grid") else self.spec

    def build(self) -> Part:
        """Build it in double precision, with weights that all matter and statistics that have moved."""
        torch.manual_seed(0)
        part = self.whole.build(dtype=torch.float64)
        with torch.no_grad():
            for weight in part.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
            for name, buffer in part.named_buffers():
                if "running" in name:
                    buffer.add_(torch.rand_like(buffer))
        return part.eval()


def attention(rule: parts.Rule = CAUSAL, heads: Heads | None = None, **fields: object) -> Attention:
    """Return attention for rows of `WIDTH`, by default with two heads to a key."""
    return Attention.of_heads(WIDTH, heads or Heads(4, 2, 4), rule).replace(**fields)


def subjects() -> list[Subject]:
    """Return all that is measured, by the names of the parts."""
    listed = [one for cls in buildable() for one in examples(cls)]
    return sorted([*listed, *variants()], key=lambda one: (one.part.__name__, str(one)))


def unable() -> Iterator[tuple[parts.Kernel, str]]:
    """Yield the kernels and the names of rules that they can't follow."""
    for sample in SAMPLES.values():
        if isinstance(sample, parts.Kernel):
            yield from ((sample, name) for name, rule in RULES.items() if sample.unable(rule))


def examples(cls: type[Spec]) -> Iterator[Subject]:
    """Put the sample of a type where it can run."""
    sample = SAMPLES[cls]
    tokens = parts.TokenEmbedding(11, WIDTH)
    if isinstance(sample, parts.Kernel):
        able = {name: rule for name, rule in RULES.items() if not sample.unable(rule)}
        yield from (Subject(cls, name, attention(rule, kernel=sample)) for name, rule in able.items())
    elif isinstance(sample, parts.RelativePosition):
        count = getattr(sample, "heads", 2)
        for name in ("causal", "both ways"):
            yield Subject(cls, name, attention(RULES[name], Heads(count, count, 4), position=sample))
    elif isinstance(sample, parts.Position):
        longer = sample if sample.length is None else sample.replace(length=40)
        yield Subject(cls, "", parts.Embed(parts.TokenEmbedding(11, sample.width), longer), "ids")
    elif isinstance(sample, Combine):
        yield Subject(cls, "", parts.Embed(tokens, parts.Sinusoidal(WIDTH), sample), "ids")
    elif isinstance(sample, parts.TokenEmbedding):
        yield Subject(cls, "", parts.Embed(sample), "ids")
    elif isinstance(sample, parts.Lookup):
        yield Subject(cls, "", parts.Embed(tokens, others=(sample,)), "ids")
    elif cls in (parts.Token, parts.GridPositions, parts.Patches):
        positions = parts.GridPositions(WIDTH, (3, 3), before=1)
        yield Subject(cls, "", SAMPLES[parts.Patches].replace(positions=positions), "pixels")
    elif cls in (parts.Windows, parts.PatchMerging, parts.Pyramid):
        yield Subject(cls, "", sample, "grid")
    elif cls in (parts.Embed, parts.Passages, parts.Transformer):
        longer = parts.Learned(WIDTH, 40)
        yield Subject(cls, "", sample.replace(positions=longer) if cls is parts.Embed else sample, "ids")
    elif isinstance(sample, parts.Prefix):
        for name in ("causal", "both ways"):
            yield Subject(cls, name, parts.Adapted(attention(RULES[name], Heads(4, 2, 4)), (sample,)))
    elif isinstance(sample, parts.AfterPrefix):
        yield Subject(cls, "", parts.Embed(tokens, sample), "ids")
    elif isinstance(sample, parts.Prompt):
        yield Subject(cls, "", parts.Embed(parts.Adapted(parts.TokenEmbedding(11, WIDTH), (sample,))), "ids")
    elif isinstance(sample, parts.Adapter):
        yield Subject(cls, "", parts.Adapted(Linear(WIDTH, 5), (sample,)))
    elif cls is parts.Frames:
        yield Subject(cls, "", sample, "sound")
    else:
        yield Subject(cls, "", sample, width=getattr(sample, "inputs", 1 if cls is parts.Squeeze else WIDTH))


def variants() -> Iterator[Subject]:
    """Return further examples: other rules, sizes and placements, of which some are declared otherwise."""
    feeding = FeedForward.of_widths(WIDTH, 12)
    experts = parts.Experts.of(feeding, WIDTH, 3, 2)
    joined = parts.Chunks(2, ends="joined")
    rows: dict[str, Spec] = {
        "in three rounds": hashing(hashes=parts.Hashes(3, (2, 2), seed=1)),
        "as published": hashing(chunks=joined),
        "buckets by length": hashing(hashes=parts.Hashes(seed=1)),
        "hashing both ways": hashing(see=BOTH_WAYS, chunks=parts.Chunks(2, 1, 1)),
        "plain causal": attention(Causal()),
        "seeing everyone": attention(Everyone()),
        "both ways": attention(BOTH_WAYS),
        "in a window of both sides": attention(BOTH_WAYS & Window(2)),
        "BigBird's": attention(BIG_BIRD, kernel=parts.BlockSparse(2)),
        "causal, in blocks": attention(CAUSAL & (parts.BlockWindow(2) | parts.Edges(2, last=0))),
        "QK-norm": attention(q=parts.Chain((Linear(WIDTH, 16), parts.PerHead(parts.RMSNorm(4))))),
        "fused": attention(qkv=Linear(WIDTH, 32), **dict.fromkeys("qkv", parts.Identity())),
        "gate and up fused": FeedForward.gated(WIDTH, 12).replace(
            gate_up=Linear(WIDTH, 24), gate=parts.Identity(), up=parts.Identity()
        ),
        "of capacity 2": experts.replace(capacity=2),
        "weighed among all": experts.replace(weights="all"),
        "unmasked": parts.BatchNorm(WIDTH, masked=False),
        "gain from 1": parts.RMSNorm(WIDTH, offset=1.0),
        "stride 2": parts.Convolution(WIDTH, WIDTH, 3, stride=2, padding=1),
        "of single rows": parts.Convolution(WIDTH, WIDTH, 1),
        "without the first row": parts.Mean(1),
        "post-norm": parts.Residual(attention(), after=LayerNorm(WIDTH)),
        "sandwich": parts.Residual(attention(), LayerNorm(WIDTH), LayerNorm(WIDTH)),
        "attention beside feed-forward": parts.Branches((attention(), feeding)),
        "gated": FeedForward.gated(WIDTH, 12),
        "of two attentions": parts.Stack((parts.Chain((attention(), attention())),) * 2),
    }
    for name, spec in rows.items():
        yield Subject(type(spec), name, spec)
    for label, position in {
        "dynamic": parts.Rotary(4, scaling=parts.Dynamic(2.0, 3)),
        "interleaved": parts.Rotary(4, layout="interleaved"),
        "Llama 3.1": parts.Rotary(4, scaling=parts.Llama3(trained=4)),
        "in bfloat16": parts.Alibi(2, precision="bfloat16"),
        "one-sided": parts.Buckets(2, 8, 16, two_sided=False),
    }.items():
        yield Subject(type(position), label, attention(CAUSAL, Heads(2, 2, 4), position=position))
    for label, rule, around in (("behind", CAUSAL, (2, 0)), ("on both sides", BOTH_WAYS, (1, 1))):
        yield Subject(parts.Local, label, attention(rule, kernel=parts.Local(parts.Chunks(2, *around))))
    circle = parts.Local(parts.Chunks(2, 1, 1, "joined"))
    yield Subject(parts.Local, "as published", attention(BOTH_WAYS, kernel=circle))
    biased = {"kernel": parts.Local(parts.Chunks(2)), "position": parts.Alibi(4)}
    yield Subject(parts.Local, "with a bias", attention(CAUSAL, **biased))
    yield Subject(parts.Windows, "unshifted", parts.Windows(attention(BOTH_WAYS), 2), "grid")
    stem = parts.Chain((parts.Convolution(1, WIDTH, 3, 2), parts.ChannelNorm(WIDTH)))
    yield Subject(parts.Frames, "two layers, group norm", parts.Frames(stem), "sound")
    for name, shape in SHAPES.items():
        yield Subject(parts.Transformer, f"decoder {name}", decoder(shape), "ids")


EVERY = subjects()
"""All subjects."""
