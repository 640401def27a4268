"""XLM (Lample and Conneau 2019): a BERT-like encoder of many languages, which may be told each token's language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.families.blocks import block, drop
from polyformer.families.config import Head, activation
from polyformer.families.encoders import Answer, Encoder, module_rows, row_scores
from polyformer.weights.names import Row


class Xlm(Encoder):
    """The keys of an XLM `config.json`; the causal models of the paper are not among what is read.

    `sinusoidal_embeddings` says how the table of places began; it is in the file, and trained, either way. The
    input `langs` gives each token's language; without it no language is added.
    """

    model_type: ClassVar[str] = "xlm"
    architectures: ClassVar[Mapping[str, Head]] = {
        "XLMModel": "none",
        "XLMWithLMHeadModel": "mlm",
        "XLMForSequenceClassification": "sequence",
        "XLMForTokenClassification": "token",
        "XLMForQuestionAnsweringSimple": "span",
    }
    paper: ClassVar[str] = "Lample and Conneau 2019"
    tokenizer: ClassVar[str] = "BPE"
    aliases: ClassVar[Mapping[str, str]] = {
        "bos_index": "bos_token_id",
        "eos_index": "eos_token_id",
        "hidden_size": "emb_dim",
        "n_words": "vocab_size",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "pad_index": "pad_token_id",
    }
    unused: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("asm", "causal", "is_encoder_decoder"), False),
        **dict.fromkeys(("is_encoder", "output_past", "same_enc_dec", "share_inout_emb"), True),
        **dict.fromkeys(("summary_proj_to_labels", "summary_use_proj"), True),
        **dict.fromkeys(("start_n_top", "end_n_top"), 5),
        "max_vocab": -1,
        "min_count": 0,
        "summary_type": "first",
    }
    base: ClassVar[str] = "transformer"

    vocab_size: int = 30145
    emb_dim: int = 2048
    n_layers: int = 12
    n_heads: int = 16
    dropout: float = 0.1
    attention_dropout: float = 0.1
    gelu_activation: bool = True
    sinusoidal_embeddings: bool = False
    n_langs: int = 1
    use_lang_emb: bool = True
    languages: tuple[str, ...] = ()
    max_position_embeddings: int = 512
    embed_init_std: float = 2048**-0.5
    layer_norm_eps: float = 1e-12
    summary_activation: str | None = None
    summary_first_dropout: float = 0.1
    unk_index: int = 3
    mask_index: int = 5
    mask_token_id: int = 0
    lang_id: int = 0
    pad_token_id: int = 2
    bos_token_id: int = 0
    eos_token_id: int = 1

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Files pair languages with numbers from 0 on, both ways round; one list says as much."""
        numbers = data.get("lang2id")
        if not isinstance(numbers, Mapping):
            return data
        languages = sorted(numbers, key=lambda name: str(numbers[name]).zfill(9))
        if [numbers[name] for name in languages] != list(range(len(languages))):
            raise SpecError(f"{where} should have a lang2id from names to 0, 1, 2, …")
        rest = {key: value for key, value in data.items() if key not in ("id2lang", "lang2id")}
        return {**rest, "languages": languages}

    def embed(self) -> parts.Embed:
        width = self.emb_dim
        languages = parts.Lookup("langs", self.n_langs, width, absent="nothing")
        return parts.Embed(
            parts.TokenEmbedding(self.vocab_size, width, self.pad_token_id),
            parts.Learned(width, self.max_position_embeddings),
            others=(languages,) if self.use_lang_emb and self.n_langs > 1 else (),
            norm=parts.LayerNorm(width, self.layer_norm_eps),
            dropout=drop(self.dropout),
        )

    def blocks(self) -> parts.Stack:
        width, kernel = self.emb_dim, parts.Softmax(dropout=self.attention_dropout)
        attention = parts.Attention.of_width(width, self.n_heads, parts.SameDocument()).replace(kernel=kernel)
        feed_forward = parts.FeedForward.of_widths(width, 4 * width, "gelu" if self.gelu_activation else "relu")
        norm = parts.LayerNorm(width, self.layer_norm_eps)
        return parts.Stack((block(attention, feed_forward, norm=norm, dropout=self.dropout),) * self.n_layers)

    def answer(self) -> Answer:
        width, labels = self.emb_dim, len(self.labels)
        if self.head == "mlm":
            rows = module_rows({"head.projection": "pred_layer.proj"})
            return Answer(parts.LMHead.of_width(width, self.vocab_size, bias=True), rows=tuple(rows))
        if self.head == "sequence":
            steps = (parts.Nth(0), parts.Dropout(self.summary_first_dropout), parts.Linear(width, labels))
            act = parts.Activate(activation(self.summary_activation or "linear"))
            rows = module_rows({"head.steps.2": "sequence_summary.summary"})
            return Answer(parts.Chain((*steps, act)), rows=tuple(rows))
        if self.head == "token":
            return row_scores(width, labels, self.dropout, "classifier")
        return row_scores(width, 2, 0.0, "qa_outputs") if self.head == "span" else Answer()

    def rows(self) -> list[Row]:
        embed = {"tokens": "embeddings", "positions": "position_embeddings", "others.0": "lang_embeddings"}
        steps = {"0.after": "layer_norm1.{i}", "1.after": "layer_norm2.{i}"}
        attention = {f"0.op.{mine}": f"attentions.{{i}}.{name}_lin" for mine, name in LINEAR.items()}
        feed_forward = {"1.op.up": "ffns.{i}.lin1", "1.op.down": "ffns.{i}.lin2"}
        return [
            *module_rows({**embed, "norm": "layer_norm_emb"}, "source."),
            *module_rows({**attention, **feed_forward, **steps}, "encoder.blocks.{i}.steps."),
        ]


LINEAR = {"q": "q", "k": "k", "v": "v", "o": "out"}
