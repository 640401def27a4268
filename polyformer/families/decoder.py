"""What decoder-only families have in common: their heads, and where the base model's tensors stand on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyformer import parts
from polyformer.families.config import Family, Head
from polyformer.spec import Spec
from polyformer.weights.names import Names, Row

CAUSAL = parts.Causal() & parts.SameDocument()
"""What a decoder's rows see: the rows before them, of their own document."""


def heads_of(name: str, *without: Head, lm: str = "ForCausalLM") -> dict[str, Head]:
    """Return the reference's classes of a family of decoders, such as "LlamaForCausalLM"; `without` some heads."""
    classes: dict[str, Head] = {
        f"{name}{lm}": "lm",
        f"{name}Model": "none",
        f"{name}ForSequenceClassification": "sequence",
        f"{name}ForTokenClassification": "token",
        f"{name}ForQuestionAnswering": "span",
    }
    return {key: head for key, head in classes.items() if head not in without}


class Decoder(Family, abstract=True):
    """A family of decoders. A subclass gives `width`, `layers`, `embed`, `block`, `norm` and `rows`.

    Class variables beside those of every family:

    - `base`: what models with a head call the base model; `span_base` where question answering calls it otherwise.
    - `classifier`: what the matrix of token classification is called.
    - `implied`: what the reference takes for optional keys where a file is silent.
    """

    base: ClassVar[str] = "model"
    span_base: ClassVar[str] = ""
    classifier: ClassVar[str] = "score"
    implied: ClassVar[Mapping[str, Any]] = {}

    vocab_size: int = 32000
    tie_word_embeddings: bool = False
    classifier_dropout: float | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        return {**cls.implied, **data}

    def check(self) -> None:
        super().check()
        self.require(0 < self.layers <= 4096, f"{self.layers} layers are not between 1 and 4096")

    @property
    def width(self) -> int:
        """The width of the rows."""
        raise NotImplementedError

    @property
    def layers(self) -> int:
        """The number of blocks."""
        raise NotImplementedError

    def embed(self) -> parts.Embed:
        """Return what makes rows of tokens."""
        return parts.Embed(parts.TokenEmbedding(self.vocab_size, self.width))

    def block(self, layer: int) -> Spec:
        """Return the block at `layer`, counted from 0."""
        raise NotImplementedError

    def norm(self) -> parts.Norm:
        """Return the norm behind the last block."""
        raise NotImplementedError

    def rows(self, base: str) -> list[Row]:
        """Return the rows for the base model's tensors, whose names on disk begin with `base`."""
        raise NotImplementedError

    def computed(self, base: str) -> dict[str, Callable[[Tensor], bool]]:
        """Return what else older files may hold of the base model."""
        return {}

    def language_head(self) -> parts.LMHead:
        """Return the head that scores next tokens."""
        return parts.LMHead.of_width(self.width, self.vocab_size)

    def spec(self) -> parts.Transformer:
        tied = self.tie_word_embeddings and self.head == "lm"
        return parts.Transformer(
            target=self.embed(),
            decoder=parts.Stack(tuple(self.block(layer) for layer in range(self.layers)), self.norm()),
            head=self._head(),
            ties=(parts.Tie("head.projection.weight", "target.tokens.weight"),) * tied,
        )

    def names(self) -> Names:
        """Return the table; the base model of older folders may stand there without its prefix, head or no head."""
        own = {"none": "", "span": f"{self.span_base or self.base}."}.get(self.head, f"{self.base}.")
        bases = dict.fromkeys((own, f"{self.base}.", ""))
        rows = [row for base in bases for row in self.rows(base)]
        computed = {name: check for base in bases for name, check in self.computed(base).items()}
        return Names([*rows, *self.head_rows()], computed)

    def head_rows(self, base: str = "") -> list[Row]:
        """Return the rows for the head's tensors, below `base`."""
        names = {
            "lm": ("head.projection", "lm_head"),
            "sequence": ("head.steps.1", "score"),
            "token": ("head.steps.1", self.classifier),
            "span": ("head", "qa_outputs"),
        }
        if self.head not in names:
            return []
        ours, disk = names[self.head]
        return [Row(f"{ours}.{{w}}", f"{base}{disk}.{{w}}")]

    def _head(self) -> Spec | None:
        """Return the head. A sequence is judged by its last real token, which alone has seen all."""
        if self.head == "lm":
            return self.language_head()
        if self.head == "sequence":
            return parts.Chain((parts.Last(), parts.Linear(self.width, len(self.labels), bias=False)))
        if self.head == "token":
            rate = getattr(self, "hidden_dropout", 0.1) if self.classifier_dropout is None else self.classifier_dropout
            return parts.Chain((parts.Dropout(rate), parts.Linear(self.width, len(self.labels))))
        return parts.Linear(self.width, 2) if self.head == "span" else None


def is_triangle(table: Tensor) -> bool:
    """Tell whether a tensor is a causal mask, which older files hold: [1, 1, n, n], true where a row may look."""
    square = table.ndim == 4 and table.shape[:2] == (1, 1) and table.shape[2] == table.shape[3]
    return square and bool((table != 0).equal(torch.ones_like(table, dtype=torch.bool).tril()))


def is_number(table: Tensor) -> bool:
    """Tell whether a tensor is one number, such as what older files hold to be added for masked keys."""
    return table.numel() == 1
