"""Marian (Junczys-Dowmunt et al. 2018) as the OPUS-MT translation models have it (Tiedemann and Thottingal 2020).

The 2017 Transformer in post-norm form, with sinusoidal positions in halves, a bias on the logits, and usually one
embedding for source, target and head.
"""

from __future__ import annotations

from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.bart_kin import BartLike, layout
from polyformer.families.config import Head


class Marian(BartLike):
    """The keys of a Marian `config.json`."""

    model_type: ClassVar[str] = "marian"
    architectures: ClassVar[dict[str, Head]] = {"MarianMTModel": "lm"}
    paper: ClassVar[str] = "Junczys-Dowmunt et al. 2018"
    tokenizer: ClassVar[str] = "two SentencePiece models"
    unused: ClassVar[dict[str, Any]] = BartLike.unused | layout(before=False, embedding=False, static=True)

    vocab_size: int = 58101
    decoder_vocab_size: int | None = None
    share_encoder_decoder_embeddings: bool = True
    pad_token_id: int = 58100
    bos_token_id: int | None = None
    eos_token_id: int = 0
    decoder_start_token_id: int = 58100
    forced_eos_token_id: int = 0

    def check(self) -> None:
        super().check()
        same = self.decoder_vocab_size in (None, self.vocab_size)
        self.require(same or not self.shared, "decoder_vocab_size differs from vocab_size, but they share embeddings")

    @property
    def shared(self) -> bool:
        return self.share_encoder_decoder_embeddings

    @property
    def written(self) -> int:
        return self.decoder_vocab_size or self.vocab_size

    @property
    def positions(self) -> parts.Position:
        return parts.Sinusoidal(self.d_model, self.max_position_embeddings, layout="halves")
