"""BigBird (Zaheer et al. 2020): BERT, in which a block of tokens looks at its neighbours, at the ends of the row, and
at a few blocks drawn at random."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import ClassVar, Self

from polyformer import parts
from polyformer.families import encoders
from polyformer.families.bert import Bert
from polyformer.families.config import Head, activation
from polyformer.families.encoders import WORDS, Answer
from polyformer.spec import Spec


class BigBird(Bert):
    """The keys of a BigBird `config.json`.

    Rows of at most (5 + 2 · `num_random_blocks`) · `block_size` tokens are looked at in full, as all are where the
    `attention_type` is "original_full". For longer ones, blocks are drawn as in the reference library: by the number
    of the layer, for each head, and in training only; otherwise the first block takes their place (see
    `RandomBlocks` and `Repeats`). An answer is never looked for in the question, which ends with `sep_token_id`.
    """

    model_type: ClassVar[str] = "big_bird"
    architectures: ClassVar[Mapping[str, Head]] = {
        "BigBirdModel": "none",
        "BigBirdForMaskedLM": "mlm",
        "BigBirdForPreTraining": "pretraining",
        "BigBirdForSequenceClassification": "sequence",
        "BigBirdForTokenClassification": "token",
        "BigBirdForQuestionAnswering": "span",
        "BigBirdForCausalLM": "lm",
    }
    paper: ClassVar[str] = "Zaheer et al. 2020"
    tokenizer: ClassVar[str] = "SentencePiece"
    idle: ClassVar[tuple[str, ...]] = ("bert.pooler", "cls.seq_relationship")
    embedding_norm: ClassVar[str] = "norm.steps.1"

    vocab_size: int = 50358
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 4096
    attention_type: str = "block_sparse"
    block_size: int = 64
    num_random_blocks: int = 3
    use_bias: bool = True
    rescale_embeddings: bool = False
    sep_token_id: int = 66

    def check(self) -> None:
        super().check()
        known = ("original_full", "block_sparse")
        self.require(self.attention_type in known, f"attention_type must be one of {', '.join(known)}")
        self.require(self.block_size > 0, "block_size must be at least 1")
        self.require(self.num_random_blocks >= 0, "num_random_blocks must be at least 0")
        full = not self.is_decoder or self.attention_type == "original_full"
        self.require(full, "block_sparse attention looks both ways; is_decoder needs attention_type = original_full")

    def seeing(self, names: Container[str]) -> Self:
        return self.replace(pooled=f"{self.prefix}pooler.weight" in names)

    def embed(self) -> parts.Embed:
        made, width = super().embed(), self.hidden_size
        steps = (parts.Dropout(self.hidden_dropout_prob), parts.LayerNorm(width, self.layer_norm_eps))
        made = made.replace(norm=parts.Chain(steps), dropout=None, scale=width**0.5 if self.rescale_embeddings else 1.0)
        if self.head != "span":
            return made
        return made.replace(
            others=(parts.Halves("token_type_ids", self.type_vocab_size, width, token=self.sep_token_id),)
        )

    def attention(self, layer: int) -> Spec:
        width, count = self.hidden_size, self.num_attention_heads
        heads = parts.Heads.of_width(width, count)
        full = super().attention(layer)
        assert isinstance(full, parts.Attention)
        full = parts.Attention.of_heads(width, heads, full.see, self.use_bias, True).replace(kernel=full.kernel)
        if self.attention_type == "original_full":
            return full
        size, drawing = self.block_size, self.num_random_blocks
        short = (5 + 2 * drawing) * size
        listed = parts.BlockWindow(size) | parts.Edges(size)
        kernel = parts.BlockSparse(size, parts.Softmax(dropout=self.attention_probs_dropout_prob))
        if not drawing:
            return full.replace(see=parts.Beyond(short, listed) & full.see, kernel=kernel)
        drawn = parts.RandomBlocks(size, drawing, count, layer, self.max_position_embeddings)
        see = parts.Beyond(short, listed | parts.InTraining(drawn)) & full.see
        repeats = parts.Repeats(parts.Beyond(short, listed), drawn)
        return full.replace(see=see, kernel=kernel, position=repeats)

    def answer(self) -> Answer:
        width, dropout, pooler = self.hidden_size, self.head_dropout, f"{self.prefix}pooler"
        pooled = encoders.first_row(width, pooler) if self.pooled else Answer()
        if self.head == "none":
            return pooled
        if self.head == "span":
            return self.span()
        if self.head in WORDS:
            widths, act = (width, width, self.vocab_size), activation(self.hidden_act)
            words = encoders.word_scores(widths, act, self.layer_norm_eps, self.words, self.tie_word_embeddings)
            order = encoders.order_scores(width, 2, 0.0, (pooler, "cls.seq_relationship"))
            return words.beside(order if self.head == "pretraining" else pooled)
        if self.head == "sequence":
            names = ("classifier.dense", "classifier.out_proj")
            act = activation(self.hidden_act)
            return encoders.sequence_scores((width, len(self.labels)), act, (dropout,) * 2, names).beside(pooled)
        return self.answer_by_row().beside(pooled)

    def span(self) -> Answer:
        """Return the head for the ends of an answer."""
        width, dropped = self.hidden_size, parts.Dropout(self.hidden_dropout_prob)
        feed_forward = parts.FeedForward.of_widths(width, self.intermediate_size, activation(self.hidden_act))
        norm = parts.LayerNorm(width, self.layer_norm_eps)
        steps = (parts.Residual(feed_forward, dropped, dropped, norm), parts.Linear(width, 2))
        names = {"0.op.up": "intermediate.dense", "0.op.down": "output.dense", "1": "qa_outputs"}
        rows = [
            *encoders.module_rows(names, "head.steps.", "qa_classifier."),
            *encoders.norm_rows({"0.after": "output.LayerNorm"}, "head.steps.", "qa_classifier."),
        ]
        return Answer(parts.Chain((*steps, parts.BehindFirst(self.sep_token_id))), rows=tuple(rows))
