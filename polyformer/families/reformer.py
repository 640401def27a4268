"""Reformer (Kitaev et al. 2020): layers of local attention and of hashing, which the backward pass works out again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.families.config import Family, Head, activation
from polyformer.families.decoder import CAUSAL, is_number
from polyformer.families.encoders import module_rows
from polyformer.spec import Spec
from polyformer.weights.names import Names, Reshape, Row, below


class Reformer(Family):
    """The keys of a Reformer `config.json`.

    `num_buckets` None is a number for the length of each pass; the reference settles on that of the first one.
    `chunk_size_lm_head` is of memory only: our heads don't hold the scores of a batch in training anyway.
    """

    model_type: ClassVar[str] = "reformer"
    architectures: ClassVar[Mapping[str, Head]] = {
        "ReformerModel": "none",
        "ReformerModelWithLMHead": "lm",
        "ReformerForMaskedLM": "mlm",
        "ReformerForSequenceClassification": "sequence",
        "ReformerForQuestionAnswering": "span",
    }
    paper: ClassVar[str] = "Kitaev et al. 2020"
    tokenizer: ClassVar[str] = "SentencePiece BPE"
    unused: ClassVar[Mapping[str, Any]] = {
        "attention_probs_dropout_prob": 0.1,
        "intermediate_size": 3072,
        "num_chunks_after": 0,
        "num_chunks_before": 1,
        "output_past": True,
        "sinusoidal_pos_embds": False,
        "tie_word_embeddings": False,
    }

    vocab_size: int = 320
    hidden_size: int = 256
    attention_head_size: int = 64
    num_attention_heads: int = 12
    feed_forward_size: int = 512
    hidden_act: str = "relu"
    attn_layers: tuple[Literal["local", "lsh"], ...] = ("local", "lsh", "local", "lsh", "local", "lsh")
    num_hashes: int = 1
    num_buckets: int | tuple[int, ...] | None = None
    hash_seed: int | None = None
    lsh_attn_chunk_length: int = 64
    lsh_num_chunks_before: int = 1
    lsh_num_chunks_after: int = 0
    local_attn_chunk_length: int = 64
    local_num_chunks_before: int = 1
    local_num_chunks_after: int = 0
    axial_pos_embds: bool = True
    axial_pos_shape: tuple[int, ...] = (64, 64)
    axial_pos_embds_dim: tuple[int, ...] = (64, 192)
    axial_norm_std: float = 1.0
    max_position_embeddings: int = 4096
    is_decoder: bool = False
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.05
    lsh_attention_probs_dropout_prob: float = 0.0
    local_attention_probs_dropout_prob: float = 0.05
    classifier_dropout: float | None = None
    chunk_size_feed_forward: int = 0
    chunk_size_lm_head: int = 0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        layers = data.get("attn_layers", cls.attn_layers)
        if data.get("num_hidden_layers", len(layers)) != len(layers):
            raise SpecError(
                f"{where} has num_hidden_layers = {data['num_hidden_layers']}, but {len(layers)} attn_layers"
            )
        implied = {"pad_token_id": 0, "eos_token_id": 2}
        return implied | {key: value for key, value in data.items() if key != "num_hidden_layers"}

    def check(self) -> None:
        super().check()
        self.require(0 < len(self.attn_layers) <= 4096, f"{len(self.attn_layers)} layers are not between 1 and 4096")
        known = {"lm": True, "mlm": False}.get(self.head, self.is_decoder) == self.is_decoder
        self.require(known, f"{self.architecture} can't have is_decoder = {self.is_decoder}")
        sizes = (self.lsh_attn_chunk_length, self.local_attn_chunk_length)
        self.require(min(sizes) > 0, f"chunks must have at least 1 row, not {min(sizes)}")

    def spec(self) -> parts.Transformer:
        embed, stack, head = self.embed(), self.stack(), self._head()
        if self.is_decoder:
            return parts.Transformer(target=embed, decoder=stack, head=head)
        return parts.Transformer(source=embed, encoder=stack, head=head)

    def embed(self) -> parts.Embed:
        """Return tokens and positions, each dropped out by itself."""
        rate, width = self.hidden_dropout_prob, self.hidden_size
        dropped = parts.Dropout(rate) if rate else None
        positions: parts.Position = parts.Learned(width, self.max_position_embeddings)
        if self.axial_pos_embds:
            axes = parts.Axial.of_axes(self.axial_pos_shape, self.axial_pos_embds_dim)
            self.require(axes.width == width, f"axial_pos_embds_dim make {axes.width} values, not {width}")
            positions = axes.replace(start=self.axial_norm_std, dropout=rate)
        joined = parts.Add(dropped, None if self.axial_pos_embds else dropped)
        return parts.Embed(parts.TokenEmbedding(self.vocab_size, width), positions, joined)

    def stack(self) -> parts.Reversible:
        """Return the layers, whose rows come out twice as wide."""
        norm = parts.LayerNorm(2 * self.hidden_size, self.layer_norm_eps)
        blocks = {kind: self._block(kind) for kind in dict.fromkeys(self.attn_layers)}
        dropped = parts.Chain((norm, parts.Dropout(self.hidden_dropout_prob)))
        return parts.Reversible(tuple(blocks[kind] for kind in self.attn_layers), dropped)

    def _block(self, kind: str) -> parts.Coupling:
        norm = parts.LayerNorm(self.hidden_size, self.layer_norm_eps)
        dropped = parts.Dropout(self.hidden_dropout_prob)
        attention = self._hashing() if kind == "lsh" else self._local()
        thinking: Spec = parts.Chain((norm, self._feed_forward(), dropped))
        if self.chunk_size_feed_forward:
            thinking = parts.Chunked(thinking, self.chunk_size_feed_forward)
        return parts.Coupling(parts.Chain((norm, attention, dropped)), thinking)

    def _feed_forward(self) -> parts.FeedForward:
        """Return the network, in which dropout stands before the activation: with ReLU that is the same behind it."""
        made = parts.FeedForward.of_widths(self.hidden_size, self.feed_forward_size, activation(self.hidden_act))
        dropped = parts.Dropout(self.hidden_dropout_prob)
        if self._drops_first:
            return made.replace(up=parts.Chain((made.up, dropped)))
        return made.replace(dropout=dropped)

    @property
    def _drops_first(self) -> bool:
        return self.hidden_act != "relu" and self.hidden_dropout_prob > 0

    def _hashing(self) -> parts.Hashing:
        size, buckets = self.lsh_attn_chunk_length, self.num_buckets
        around = (self.lsh_num_chunks_before, self.lsh_num_chunks_after)
        hashes = parts.Hashes(
            rounds=self.num_hashes,
            buckets=(buckets,) if isinstance(buckets, int) else buckets,
            limit=2 * max(math.isqrt(self.max_position_embeddings // size), size),
            seed=self.hash_seed,
        )
        chunks = parts.Chunks(size, *around, "joined", *self._filling(size))
        made = parts.Hashing.of_width(self.hidden_size, self._heads, chunks, self._see, hashes)
        return made.replace(dropout=self.lsh_attention_probs_dropout_prob)

    def _local(self) -> parts.Attention:
        size, around = self.local_attn_chunk_length, (self.local_num_chunks_before, self.local_num_chunks_after)
        chunks = parts.Chunks(size, *around, "joined", *self._filling(size))
        if self.is_decoder and around[0] <= 1 and around[1] == 0:
            chunks = parts.Chunks(size, *around)  # the same where nobody may look from the first chunk to the last
        kernel = parts.Local(chunks, dropout=self.local_attention_probs_dropout_prob)
        return parts.Attention.of_heads(self.hidden_size, self._heads, self._see).replace(kernel=kernel)

    @property
    def _heads(self) -> parts.Heads:
        return parts.Heads(self.num_attention_heads, self.num_attention_heads, self.attention_head_size)

    @property
    def _see(self) -> parts.Rule:
        return CAUSAL if self.is_decoder else parts.SameDocument()

    def _filling(self, size: int) -> tuple[int | None, int | None]:
        """Return what rows are filled up to a multiple of, and up to which length they are not.

        The reference fills up the whole input for the chunks of all its layers.
        """
        lengths = {"lsh": self.lsh_attn_chunk_length, "local": self.local_attn_chunk_length}
        sizes = [lengths[kind] for kind in self.attn_layers]
        common = math.lcm(*sizes)
        return (None, None) if common == size else (common, min(sizes))

    def _head(self) -> Spec | None:
        width, labels = 2 * self.hidden_size, len(self.labels)
        if self.head in ("lm", "mlm"):
            unread = parts.Idle(((self.vocab_size,),))  # the reference has a bias there which it doesn't add
            return parts.LMHead(parts.Linear(width, self.vocab_size, bias=False), unread)
        if self.head == "sequence":
            rate = self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout
            dense = (parts.Dropout(rate), parts.Linear(width, self.hidden_size), parts.Activate("tanh"))
            return parts.Chain((parts.Nth(0), *dense, parts.Dropout(rate), parts.Linear(self.hidden_size, labels)))
        return parts.Linear(width, labels) if self.head == "span" else None

    def names(self) -> Names:
        prefix = "" if self.head == "none" else "reformer."
        heads = {
            "sequence": {"head.steps.2": "classifier.dense", "head.steps.5": "classifier.out_proj"},
            "span": {"head": "qa_outputs"},
        }
        words = [
            Row("head.projection.weight", "lm_head.decoder.weight"),
            Row("head.before.tensor_0", "lm_head.bias"),
        ]
        own = words if self.head in ("lm", "mlm") else module_rows(heads.get(self.head, {}))
        numbers = [f"{kind}mask_value_float{bits}" for kind in ("", "self_") for bits in (16, 32)]
        place = f"{prefix}encoder.layers.{{i}}.attention.self_attention"
        return Names([*below(prefix, self.rows()), *own], {f"{place}.{name}": is_number for name in numbers})

    def rows(self) -> list[Row]:
        """Return the rows of the base model's tensors, under their names there."""
        embed, stack = ("target", "decoder") if self.is_decoder else ("source", "encoder")
        below_g = "op." if self.chunk_size_feed_forward else ""
        up = "up.steps.0" if self._drops_first else "up"
        seen = {"qk": "query_key", "q": "query", "k": "key", "v": "value"}
        block = {f"f.steps.1.{mine}": f"attention.self_attention.{theirs}" for mine, theirs in seen.items()}
        block |= {
            "f.steps.0": "attention.layer_norm",
            "f.steps.1.o": "attention.output.dense",
            f"g.{below_g}steps.0": "feed_forward.layer_norm",
            f"g.{below_g}steps.1.{up}": "feed_forward.dense.dense",
            f"g.{below_g}steps.1.down": "feed_forward.output.dense",
        }
        return [
            Row(f"{embed}.tokens.weight", "embeddings.word_embeddings.weight"),
            *self._position_rows(embed),
            *module_rows(block, f"{stack}.blocks.{{i}}.", "encoder.layers.{i}."),
            *module_rows({f"{stack}.norm.steps.0": "encoder.layer_norm"}),
        ]

    def _position_rows(self, embed: str) -> list[Row]:
        disk = "embeddings.position_embeddings"
        if not self.axial_pos_embds:
            return [Row(f"{embed}.positions.weight", f"{disk}.embedding.weight")]
        found, axes = [], len(self.axial_pos_shape)
        for axis, (places, width) in enumerate(zip(self.axial_pos_shape, self.axial_pos_embds_dim, strict=True)):
            shape = tuple(places if one == axis else 1 for one in range(axes))
            turn = Reshape((*shape, width), (places, width))
            found.append(Row(f"{embed}.positions.axis_{axis}", f"{disk}.weights.{axis}", turn))
        return found
