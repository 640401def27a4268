"""What T5 and its kin (mT5, umT5, Switch Transformers) share.

No biases, RMS norms in front, scores that are not scaled, and trained biases by distance, which all layers of a stack
share (umT5: each has its own). The first models scale the decoder's rows for a head tied to the embedding; later ones
have a head of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from polyformer import parts
from polyformer.families.blocks import block, drop, judge
from polyformer.families.config import Family
from polyformer.spec import Spec
from polyformer.weights.names import Check, Names, Row, rows_below

ATTENTIONS = {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}


def table(stack: str, layer: int) -> str:
    """Return the path of a layer's biases by distance."""
    return f"{stack}.blocks.{layer}.steps.0.op.position.weight"


class T5Like(Family, abstract=True):
    """The keys that T5's kin has in its `config.json`; `apart` says that each layer has biases of its own."""

    apart: ClassVar[bool] = False
    aliases: ClassVar[dict[str, str]] = {
        "head_dim": "d_kv",
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }
    unused: ClassVar[dict[str, Any]] = {"initializer_factor": 1.0, "n_positions": 512, "output_past": True}

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    classifier_dropout: float = 0.0
    layer_norm_epsilon: float = 1e-6
    scale_decoder_outputs: bool = True
    tie_word_embeddings: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Until version 5 of the reference library, a head that was not tied was one whose rows were not scaled."""
        scaled = cls.scale_decoder_outputs and data.get("tie_word_embeddings") is not False
        return {"scale_decoder_outputs": scaled, **data}

    def seeing(self, names: Mapping[str, Tensor]) -> Self:
        """The file tells whether the head is tied: `tie_word_embeddings` has been true and false for either kind."""
        head, embedding = names.get("lm_head.weight"), names.get("shared.weight")
        same = head is None or (embedding is not None and head.equal(embedding))
        return self.replace(tie_word_embeddings=same)

    @property
    def alone(self) -> bool:
        """Whether there is only an encoder."""
        return self.architecture.endswith(("EncoderModel", "ForTokenClassification"))

    @property
    def layers(self) -> dict[str, int]:
        """How many layers each stack has."""
        reading = {"encoder": self.num_layers}
        return reading if self.alone else reading | {"decoder": self.num_decoder_layers or self.num_layers}

    def spec(self) -> parts.Transformer:
        shared = {} if self.apart else self.layers
        tied = [parts.Tie(table(stack, i), table(stack, 0)) for stack in shared for i in range(1, shared[stack])]
        source = parts.Embed(parts.TokenEmbedding(self.vocab_size, self.d_model), dropout=drop(self.dropout_rate))
        if self.alone:
            return parts.Transformer(source, self._stack("encoder"), head=self._answers(), ties=tuple(tied))
        tied.append(parts.Tie("target.tokens.weight", "source.tokens.weight"))
        if self.head == "lm" and self.tie_word_embeddings:
            tied.append(parts.Tie("head.projection.weight", "source.tokens.weight"))
        return parts.Transformer(
            source,
            self._stack("encoder"),
            source,
            self._stack("decoder"),
            self._answers(),
            delay=parts.Delay(self.decoder_start_token_id) if self.head in ("sequence", "span") else None,
            ties=tuple(tied),
        )

    def feed_forward(self, stack: str, layer: int) -> Spec:
        """Return what stands behind the attentions of a layer."""
        raise NotImplementedError

    def names(self) -> Names:
        below = "transformer." if self.head in ("sequence", "token") else ""
        modules = {"q": "q", "k": "k", "v": "v", "o": "o"}
        rows = [
            Row("source.tokens.weight", f"{below}shared.weight"),
            Row("source.tokens.weight", f"{below}encoder.embed_tokens.weight"),
            Row("target.tokens.weight", f"{below}decoder.embed_tokens.weight"),
            Row("head.projection.weight", "lm_head.weight"),
            *rows_below("head.steps", "classification_head", {"2": "dense", "5": "out_proj"}),
            Row("head.steps.1.{w}", "classifier.{w}"),
            Row("head.{w}", "qa_outputs.{w}"),
        ]
        for stack, attentions in ATTENTIONS.items():
            ours, disk = f"{stack}.blocks.{{i}}.steps", f"{below}{stack}.block.{{i}}.layer"
            for step, name in enumerate(attentions):
                rows += rows_below(f"{ours}.{step}.op", f"{disk}.{step}.{name}", modules)
            last = len(attentions)
            rows += rows_below(ours, disk, {f"{step}.pre": f"{step}.layer_norm" for step in range(last + 1)})
            rows += self.feed_forward_rows(f"{ours}.{last}.op", f"{disk}.{last}")
            biases = f"{disk}.0.SelfAttention.relative_attention_bias.weight"
            rows.append(Row(f"{ours}.0.op.position.weight", biases))
            rows.append(Row(f"{stack}.norm.steps.0.weight", f"{below}{stack}.final_layer_norm.weight"))
        # the first models' files hold a bias for cross-attention that no version ever used
        useless = f"{below}decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        ignored: dict[str, Check] = {useless: lambda table: True}
        return Names(rows, ignored)

    def feed_forward_rows(self, ours: str, disk: str) -> list[Row]:
        """Return their rows, below these prefixes."""
        raise NotImplementedError

    def _stack(self, stack: str) -> parts.Stack:
        norm = parts.RMSNorm(self.d_model, self.layer_norm_epsilon)
        dropped = drop(self.dropout_rate)
        own = self._attention(stack)
        attentions: tuple[Spec, ...] = (own,)
        if stack == "decoder":
            attentions += (parts.CrossAttention(own.q, own.k, own.v, own.o, own.heads, own.kernel),)
        blocks = (
            block(*attentions, self.feed_forward(stack, i), norm=norm, placement="pre", dropout=self.dropout_rate)
            for i in range(self.layers[stack])
        )
        return parts.Stack(tuple(blocks), parts.Chain((norm,) if dropped is None else (norm, dropped)))

    def _attention(self, stack: str) -> parts.Attention:
        reading = stack == "encoder"
        count, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        see = parts.SameDocument() if reading else parts.Causal() & parts.SameDocument()
        made = parts.Attention.of_heads(self.d_model, parts.Heads(self.num_heads, self.num_heads, self.d_kv), see)
        return made.replace(
            kernel=parts.Softmax(scale=1.0, dropout=self.dropout_rate),
            position=parts.Buckets(self.num_heads, count, distance, two_sided=reading),
        )

    def _answers(self) -> Spec | None:
        if self.head == "lm":
            projection = parts.Linear(self.d_model, self.vocab_size, bias=False)
            return parts.LMHead(projection, scale=self.d_model**-0.5 if self.scale_decoder_outputs else 1.0)
        if self.head == "sequence":
            return judge(self.d_model, len(self.labels), self.eos_token_id, self.classifier_dropout)
        if self.head == "token":
            return parts.Chain((parts.Dropout(self.classifier_dropout), parts.Linear(self.d_model, len(self.labels))))
        return parts.Linear(self.d_model, 2) if self.head == "span" else None
