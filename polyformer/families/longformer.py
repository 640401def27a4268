"""Longformer (Beltagy et al. 2020): RoBERTa, in which a token looks at its neighbours, and at a few global tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.config import Head
from polyformer.families.roberta import Roberta
from polyformer.parts.globals import Globals
from polyformer.spec import Spec


class Longformer(Roberta):
    """The keys of a Longformer `config.json`.

    `attention_window` is, for each layer, how many tokens one looks at beside itself, half of them to either side.
    Which tokens are global, a batch says by `global_attention_mask`. Where it doesn't, the first one is where a whole
    sequence is judged, and a question is where an answer is looked for: all before the first `sep_token_id`.
    """

    model_type: ClassVar[str] = "longformer"
    architectures: ClassVar[Mapping[str, Head]] = {
        "LongformerModel": "none",
        "LongformerForMaskedLM": "mlm",
        "LongformerForSequenceClassification": "sequence",
        "LongformerForTokenClassification": "token",
        "LongformerForQuestionAnswering": "span",
    }
    paper: ClassVar[str] = "Beltagy et al. 2020"
    base: ClassVar[str] = "longformer"
    idle: ClassVar[tuple[str, ...]] = ("longformer.pooler.dense",)
    unused: ClassVar[Mapping[str, Any]] = {
        **Roberta.unused,
        "attention_mode": "longformer",
        "ignore_attention_mask": False,
        "onnx_export": False,
    }
    projections: ClassVar[Mapping[str, str]] = {
        "local.q": "self.query",
        "local.k": "self.key",
        "local.v": "self.value",
        "local.o": "output.dense",
        "q": "self.query_global",
        "k": "self.key_global",
        "v": "self.value_global",
    }

    vocab_size: int = 30522
    attention_window: tuple[int, ...] = (512,) * 12
    sep_token_id: int = 2

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """One window stands for those of all layers."""
        window, layers = data.get("attention_window", 512), data.get("num_hidden_layers", cls.num_hidden_layers)
        if type(window) is int and type(layers) is int and 0 <= layers <= 4096:
            return {**data, "attention_window": [window] * layers}
        return data

    def check(self) -> None:
        super().check()
        count, layers = len(self.attention_window), self.num_hidden_layers
        self.require(count == layers, f"attention_window names {count} windows for {layers} layers")
        even = all(window > 0 and window % 2 == 0 for window in self.attention_window)
        self.require(even, f"attention_window must be even and at least 2, not {list(self.attention_window)}")
        self.require(not self.is_decoder, "Longformer's attention looks both ways, so is_decoder can't be true")

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob

    def attention(self, layer: int) -> Spec:
        width, window, dropout = self.hidden_size, self.attention_window[layer], self.attention_probs_dropout_prob
        see = (parts.Window(window // 2 + 1) | parts.Marked()) & parts.SameDocument()
        block = min(max(window // 4, 1), 64)
        kernel = parts.BlockSparse(block, parts.Softmax(dropout=dropout), dropout)
        local = parts.Attention.of_width(width, self.num_attention_heads, see).replace(kernel=kernel)
        return parts.GlobalAttention(local, local.q, local.k, local.v, self.absent(), dropout)

    def absent(self) -> Globals:
        """Return which tokens are global where the batch doesn't say."""
        if self.head == "sequence":
            return parts.FirstToken()
        return parts.Before(self.sep_token_id) if self.head == "span" else parts.NoToken()
