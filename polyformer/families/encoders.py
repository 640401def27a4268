"""What BERT and its relatives share: how a model is put together, its heads, and the names of their tensors on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from polyformer import parts
from polyformer.families.config import Family, Head
from polyformer.parts.feedforward import Activation
from polyformer.spec import Spec
from polyformer.weights.names import Names, Row, below

WORDS: tuple[Head, ...] = ("lm", "mlm", "pretraining")
"""Heads that score every word of the vocabulary."""


@dataclass(frozen=True)
class Answer:
    """What stands on a stack of blocks, the rows of its tensors, and tensors on disk that do nothing."""

    head: Spec | None = None
    pooler: Spec | None = None
    rows: tuple[Row, ...] = ()
    idle: tuple[str, ...] = ()

    def beside(self, other: Answer) -> Answer:
        """Return this with the other's pooler."""
        return replace(self, pooler=other.pooler, rows=(*self.rows, *other.rows))


class Encoder(Family, abstract=True):
    """An encoder whose base model stands under the prefix `base` in files of models with a head, alone under none.

    `idle` names modules that published files hold although the head has no use for them: the reference library drops
    them too.
    """

    base: ClassVar[str]
    idle: ClassVar[tuple[str, ...]] = ()

    tie_word_embeddings: bool = True

    def check(self) -> None:
        super().check()
        two = self.head != "span" or len(self.labels) == 2
        self.require(two, f"an answer has two ends, so its head can't have {len(self.labels)} labels")

    def embed(self) -> Spec:
        """Return the first part."""
        raise NotImplementedError

    def blocks(self) -> parts.Stack:
        """Return the blocks."""
        raise NotImplementedError

    def answer(self) -> Answer:
        """Return what stands on the blocks."""
        raise NotImplementedError

    def rows(self) -> list[Row]:
        """Return the rows of the base model's tensors, under their names there."""
        raise NotImplementedError

    def spec(self) -> parts.Transformer:
        answer = self.answer()
        tied = self.tie_word_embeddings and self.head in WORDS
        return parts.Transformer(
            source=self.embed(),
            encoder=self.blocks(),
            head=answer.head,
            pooler=answer.pooler,
            ties=(parts.Tie("head.projection.weight", "source.tokens.weight"),) * tied,
        )

    def names(self) -> Names:
        prefix, answer = self.prefix, self.answer()
        rows = [*below(prefix, self.rows()), *answer.rows]
        used = {name for row in rows for name in row.disk}
        idle = {*answer.idle, *(f"{name}.{{w}}" for name in self.idle)} - used
        computed = {f"{prefix}{part}position_ids": _counts for part in ("", "embeddings.")}
        zeros = {f"{prefix}embeddings.token_type_ids": _is_zero}
        return Names(rows, computed={**dict.fromkeys(idle, _anything), **computed, **zeros})

    @property
    def prefix(self) -> str:
        """What stands before the names of the base model's tensors."""
        return "" if self.head == "none" else f"{self.base}."


class WordNames(NamedTuple):
    """The names on disk of a head over the vocabulary: its dense step, norm, projection, and the projection's bias.

    Several families have the bias twice, once beside the projection and once in it. The two are one parameter where
    embeddings are tied; otherwise the one beside it does nothing.
    """

    dense: str
    norm: str
    projection: str
    bias: str


def word_scores(
    widths: tuple[int, int, int], activation: Activation, eps: float, names: WordNames, tied: bool
) -> Answer:
    """Return a head over the vocabulary: a dense step with activation and norm, and a projection.

    Args:
        widths: of the rows, of the norm, and of the vocabulary.
        activation, eps: of the dense step, and its norm's.
        names: on disk.
        tied: whether the projection is the table of the tokens.
    """
    width, inner, vocabulary = widths
    before = (parts.Linear(width, inner), parts.Activate(activation), parts.LayerNorm(inner, eps))
    own = f"{names.projection}.bias"
    biases = dict.fromkeys((names.bias, own) if tied else (own,))
    rows = (
        *module_rows({"head.before.steps.0": names.dense}),
        *norm_rows({"head.before.steps.2": names.norm}),
        Row("head.projection.weight", f"{names.projection}.weight"),
        *(Row("head.projection.bias", name) for name in biases),
    )
    head = parts.LMHead(parts.Linear(inner, vocabulary), parts.Chain(before))
    return Answer(head, rows=rows, idle=() if names.bias in biases else (names.bias,))


def sequence_scores(
    widths: tuple[int, int], activation: Activation, dropouts: tuple[float, float], names: tuple[str, str]
) -> Answer:
    """Return a head for whole sequences: the first row through a dense step and a projection to labels.

    Args:
        widths: of the rows, and the number of labels.
        activation: of the dense step.
        dropouts: before the dense step, and before the projection.
        names: of the two on disk.
    """
    (width, labels), (first, last) = widths, dropouts
    dense = (parts.Dropout(first), parts.Linear(width, width), parts.Activate(activation))
    head = parts.Chain((parts.Nth(0), *dense, parts.Dropout(last), parts.Linear(width, labels)))
    return Answer(head, rows=tuple(module_rows({"head.steps.2": names[0], "head.steps.5": names[1]})))


def row_scores(width: int, labels: int, dropout: float, name: str) -> Answer:
    """Return a head for each row: labels of tokens, or the two ends of an answer; `name` is its own on disk."""
    head = parts.Chain((parts.Dropout(dropout), parts.Linear(width, labels)))
    return Answer(head, rows=tuple(module_rows({"head.steps.1": name})))


def first_row(width: int, name: str) -> Answer:
    """Return BERT's pooler: the first row through a dense step and tanh."""
    pooler = parts.Chain((parts.Nth(0), parts.Linear(width, width), parts.Activate("tanh")))
    return Answer(pooler=pooler, rows=tuple(module_rows({"pooler.steps.1": name})))


def order_scores(width: int, labels: int, dropout: float, names: tuple[str, str]) -> Answer:
    """Return what pretraining says of two sentences' order, from the first row."""
    first = (parts.Nth(0), parts.Linear(width, width), parts.Activate("tanh"))
    pooler = parts.Chain((*first, parts.Dropout(dropout), parts.Linear(width, labels)))
    return Answer(pooler=pooler, rows=tuple(module_rows({"pooler.steps.1": names[0], "pooler.steps.4": names[1]})))


def module_rows(names: Mapping[str, str], ours: str = "", disk: str = "") -> list[Row]:
    """Return rows for all tensors of modules: `names` pairs ours with the disk's, behind two prefixes."""
    return [Row(f"{ours}{mine}.{{w}}", f"{disk}{theirs}.{{w}}") for mine, theirs in names.items()]


def norm_rows(names: Mapping[str, str], ours: str = "", disk: str = "") -> list[Row]:
    """Return rows for norms, in the same way; BERT's first files call gain and bias gamma and beta."""
    words = (("weight", "weight"), ("bias", "bias"), ("weight", "gamma"), ("bias", "beta"))
    pairs = [(f"{ours}{mine}", f"{disk}{theirs}") for mine, theirs in names.items()]
    return [Row(f"{mine}.{word}", f"{theirs}.{named}") for mine, theirs in pairs for word, named in words]


def _counts(tensor: Tensor) -> bool:
    return tensor.flatten().tolist() == list(range(tensor.numel()))


def _is_zero(tensor: Tensor) -> bool:
    return not bool(tensor.any())


def _anything(_: Tensor) -> bool:
    return True
