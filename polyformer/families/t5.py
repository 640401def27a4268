"""T5 (Raffel et al. 2020), with T5 v1.1, FLAN and UL2 (Tay et al. 2023) in its layout; mT5 (Xue et al. 2021) and umT5
(Chung et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.families.blocks import drop
from polyformer.families.config import Head, activation
from polyformer.families.fusion_in_decoder import ARCHITECTURE, reading_passages, wrapped
from polyformer.families.t5_kin import T5Like
from polyformer.spec import Spec
from polyformer.weights.names import Names, Row, rows_below

HEADS: dict[str, Head] = {
    "ForConditionalGeneration": "lm",
    "Model": "none",
    "EncoderModel": "none",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "span",
}


class T5(T5Like):
    """The keys of a T5 `config.json`; `feed_forward_proj` is an activation, with "gated-" before it where there is a
    gate."""

    model_type: ClassVar[str] = "t5"
    architectures: ClassVar[dict[str, Head]] = {
        **{f"T5{name}": head for name, head in HEADS.items()},
        ARCHITECTURE: "lm",
    }
    paper: ClassVar[str] = "Raffel et al. 2020"
    tokenizer: ClassVar[str] = "SentencePiece Unigram"

    feed_forward_proj: str = "relu"

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Drop the keys that the reference library derives from `feed_forward_proj`, if they are what it derives."""
        named = str(data.get("feed_forward_proj", cls.feed_forward_proj))
        gated, name = named.startswith("gated-"), named.removeprefix("gated-")
        follow = {"dense_act_fn": "gelu_new" if named == "gated-gelu" else name, "is_gated_act": gated}
        for key, value in follow.items():
            if data.get(key, value) != value:
                raise SpecError(f"{where} has {key} = {data[key]!r}, but feed_forward_proj = {named!r}")
        return super().modern({key: value for key, value in data.items() if key not in follow}, where)

    def spec(self) -> parts.Transformer:
        made = super().spec()
        return reading_passages(made) if self.architecture == ARCHITECTURE else made

    def names(self) -> Names:
        table = super().names()
        return wrapped(table) if self.architecture == ARCHITECTURE else table

    def feed_forward(self, stack: str, layer: int) -> Spec:
        name = self.feed_forward_proj
        if name.startswith("gated-"):
            # the authors' gated GELU is the approximation by tanh, whatever the name says
            inner = "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")
            made = parts.FeedForward.gated(self.d_model, self.d_ff, activation(inner))
        else:
            made = parts.FeedForward.of_widths(self.d_model, self.d_ff, activation(name), bias=False)
        return made.replace(dropout=drop(self.dropout_rate))

    def feed_forward_rows(self, ours: str, disk: str) -> list[Row]:
        gated = self.feed_forward_proj.startswith("gated-")
        names = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
        return rows_below(ours, f"{disk}.DenseReluDense", names | {"down": "wo"})


class MT5(T5):
    """mT5: the layout of T5 v1.1, with a vocabulary of 101 languages."""

    model_type: ClassVar[str] = "mt5"
    architectures: ClassVar[dict[str, Head]] = {f"MT5{name}": head for name, head in HEADS.items()}
    paper: ClassVar[str] = "Xue et al. 2021"
    tokenizer: ClassVar[str] = "SentencePiece Unigram"

    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"
    scale_decoder_outputs: bool = False


class UMT5(MT5):
    """umT5: mT5 with biases by distance in each layer.

    Where a file says that embeddings are tied, rows are scaled, as by the reference library. Since its version 5, that
    scales always, though the models were trained without.
    """

    model_type: ClassVar[str] = "umt5"
    architectures: ClassVar[dict[str, Head]] = {f"UMT5{name}": head for name, head in HEADS.items()}
    paper: ClassVar[str] = "Chung et al. 2023"
    tokenizer: ClassVar[str] = "SentencePiece Unigram"
    apart: ClassVar[bool] = True

    scale_decoder_outputs: bool = True
