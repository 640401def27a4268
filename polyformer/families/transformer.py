"""The Transformer of "Attention Is All You Need" (Vaswani et al. 2017), and the choices made in its place since."""

from __future__ import annotations

import math
from typing import Literal

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.families.blocks import block, drop
from polyformer.parts.embeddings import Combine
from polyformer.spec import Record, Spec
from polyformer.weights.names import Row, Split, rows_below


class Depth(Record):
    """Numbers of encoder and decoder blocks."""

    encoder: int = 6
    decoder: int = 6

    def check(self) -> None:
        self.require(self.encoder > 0 and self.decoder > 0, "encoder and decoder need at least one block each")


class AttentionChoice(Record):
    """Query heads; `groups` key/value heads shared by them (None: as many); dropout of the attention weights."""

    heads: int = 8
    groups: int | None = None
    dropout: float = 0.0


class FeedForwardChoice(Record):
    """The inner width, its activation (the last three are gated: Shazeer 2020), and the dropout behind it."""

    hidden: int = 2048
    activation: Literal["relu", "gelu", "silu", "reglu", "geglu", "swiglu"] = "relu"
    dropout: float = 0.0

    def spec(self, width: int) -> parts.FeedForward:
        """Return the network of a model of this width."""
        made = {
            "relu": parts.FeedForward.of_widths(width, self.hidden, "relu"),
            "gelu": parts.FeedForward.of_widths(width, self.hidden, "gelu"),
            "silu": parts.FeedForward.of_widths(width, self.hidden, "silu"),
            "reglu": parts.FeedForward.gated(width, self.hidden, "relu"),
            "geglu": parts.FeedForward.gated(width, self.hidden, "gelu"),
            "swiglu": parts.FeedForward.gated(width, self.hidden, "silu"),
        }
        return made[self.activation].replace(dropout=drop(self.dropout))


class NormChoice(Record):
    """Which norm stands where: after each sum as in the paper, before each sublayer, or on both sides of it.

    `final` says whether a norm ends each stack; None means where it is needed: unless the placement is "post".
    """

    kind: Literal["layer", "rms", "batch"] = "layer"
    placement: Literal["post", "pre", "sandwich"] = "post"
    final: bool | None = None

    def spec(self, width: int) -> parts.Norm:
        """Return one norm of a model of this width."""
        kinds: dict[str, type[parts.Norm]] = {"layer": parts.LayerNorm, "rms": parts.RMSNorm, "batch": parts.BatchNorm}
        return kinds[self.kind](width)

    def last(self, width: int) -> parts.Norm | None:
        """Return the norm that ends a stack, if one does."""
        final = self.placement != "post" if self.final is None else self.final
        return self.spec(width) if final else None


class PositionChoice(Record):
    """Which positions join the tokens, and how.

    `length` is the longest sequence (None: any; learned positions need one). `width` is that of concatenated
    positions, which leave the tokens the rest of the model's width; None means a quarter of it.
    """

    kind: Literal["sinusoidal", "learned", "none"] = "sinusoidal"
    combine: Literal["add", "concatenate", "gate"] = "add"
    length: int | None = None
    width: int | None = None

    def beside(self, width: int) -> int:
        """Return how much of a model's width concatenated positions take from the tokens; 0 for the other kinds."""
        if self.kind == "none" or self.combine != "concatenate":
            return 0
        return width // 4 if self.width is None else self.width

    def spec(self, width: int) -> parts.Position | None:
        """Return the positions of a model of this width."""
        own = self.beside(width) or width
        kinds = {"sinusoidal": parts.Sinusoidal, "learned": parts.Learned}
        return None if self.kind == "none" else kinds[self.kind](own, self.length)


class Transformer2017(Record):
    """The sizes and choices of an encoder–decoder Transformer; the defaults are the paper's base model.

    Dropout stands where the paper has it (section 5.4): on each sublayer's output before it is added, and on the
    sums of embeddings and positions. `ties` shares one matrix between "output": the target embedding and the head;
    "all": the source embedding too, as in the paper, which needs one joint vocabulary.

    The vocabularies may be left out where a tokenizer will tell them; `spec` needs them.
    """

    source_vocabulary: int | None = None
    target_vocabulary: int | None = None
    width: int = 512
    depth: Depth = Depth()
    attention: AttentionChoice = AttentionChoice()
    feedforward: FeedForwardChoice = FeedForwardChoice()
    norm: NormChoice = NormChoice()
    positions: PositionChoice = PositionChoice()
    dropout: float = 0.1
    ties: Literal["none", "output", "all"] = "output"

    def check(self) -> None:
        self._heads()
        joint = self.source_vocabulary == self.target_vocabulary
        self.require(self.ties != "all" or joint, "embeddings can all be tied only in a joint vocabulary")
        beside = self.positions.beside(self.width)
        narrow = "concatenated positions make token vectors narrower than the head's; choose ties = 'none'"
        self.require(self.ties == "none" or not beside, narrow)
        self.require(0 <= beside < self.width, "the positions leave no width to the tokens")

    def spec(self) -> parts.Transformer:
        """Return the model; raises `SpecError` for sizes that don't fit, or while the vocabularies are unknown."""
        if self.source_vocabulary is None or self.target_vocabulary is None:
            raise SpecError("Transformer2017: source_vocabulary and target_vocabulary must be known to make a model")
        norm, feeding = self.norm.last(self.width), self.feedforward.spec(self.width)
        crossing = parts.CrossAttention(*self._projections(), self._heads(), self._kernel())
        encoder = self._block(self._attention(parts.Everyone()), feeding)
        decoder = self._block(self._attention(parts.Causal()), crossing, feeding)
        return parts.Transformer(
            source=self._embed(self.source_vocabulary),
            encoder=parts.Stack((encoder,) * self.depth.encoder, norm),
            target=self._embed(self.target_vocabulary),
            decoder=parts.Stack((decoder,) * self.depth.decoder, norm),
            head=parts.LMHead.of_width(self.width, self.target_vocabulary),
            ties=self._ties(),
        )

    def _embed(self, vocabulary: int) -> parts.Embed:
        combine: dict[str, Combine] = {
            "add": parts.Add(),
            "concatenate": parts.Concatenate(),
            "gate": parts.Gate.of_width(self.width),
        }
        width = self.width - self.positions.beside(self.width)
        return parts.Embed(
            tokens=parts.TokenEmbedding(vocabulary, width),
            positions=self.positions.spec(self.width),
            combine=parts.Add() if self.positions.kind == "none" else combine[self.positions.combine],
            scale=math.sqrt(width),
            dropout=drop(self.dropout),
        )

    def _ties(self) -> tuple[parts.Tie, ...]:
        head, target, source = "head.projection.weight", "target.tokens.weight", "source.tokens.weight"
        if self.ties == "all":
            return parts.Tie(target, source), parts.Tie(head, source)
        return (parts.Tie(head, target),) if self.ties == "output" else ()

    def _block(self, *sublayers: Spec) -> parts.Chain:
        return block(*sublayers, norm=self.norm.spec(self.width), placement=self.norm.placement, dropout=self.dropout)

    def _heads(self) -> parts.Heads:
        return parts.Heads.of_width(self.width, self.attention.heads, self.attention.groups)

    def _projections(self) -> tuple[parts.Linear, parts.Linear, parts.Linear, parts.Linear]:
        heads = self._heads()
        whole, shared = parts.Linear(self.width, self.width), parts.Linear(self.width, heads.groups * heads.width)
        return whole, shared, shared, whole

    def _kernel(self) -> parts.Softmax:
        return parts.Softmax(dropout=self.attention.dropout)

    def _attention(self, see: parts.Rule) -> parts.Attention:
        return parts.Attention(*self._projections(), self._heads(), see, self._kernel())


def torch_rows(config: Transformer2017, prefix: str = "") -> list[Row]:
    """Return the rows for `torch.nn.Transformer`'s tensors, under a prefix such as `"transformer."`.

    It has a norm behind each stack whatever the placement: `NormChoice(final=True)`. It has neither embeddings nor
    a head; add rows for those of the module around it. Choices that it does not know give tensors that don't fit.
    """
    slot = "after" if config.norm.placement == "post" else "pre"
    rows = []
    for stack, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "multihead_attn"])):
        ours, theirs = f"{stack}.blocks.{{i}}.steps", f"{prefix}{stack}.layers.{{i}}"
        last = len(attentions)
        for step, name in enumerate(attentions):
            qkv = [f"{ours}.{step}.op.{letter}.{{w}}" for letter in "qkv"]
            rows.append(Row(qkv, f"{theirs}.{name}.in_proj_{{w}}", Split(3)))
            rows += rows_below(ours, theirs, {f"{step}.op.o": f"{name}.out_proj"})
        rows += rows_below(ours, theirs, {f"{last}.op.up": "linear1", f"{last}.op.down": "linear2"})
        rows += rows_below(ours, theirs, {f"{step}.{slot}": f"norm{step + 1}" for step in range(last + 1)})
        rows += rows_below(stack, f"{prefix}{stack}", {"norm": "norm"})
    return rows
