"""M2M100 (Fan et al. 2021) and NLLB's dense models (NLLB Team 2022): pre-norm, with tensor2tensor's sinusoids."""

from __future__ import annotations

from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.bart_kin import BartLike, layout
from polyformer.families.blocks import Placement
from polyformer.families.config import Head


class M2M100(BartLike):
    """The keys of an M2M100 `config.json`; its positions have no end, whatever `max_position_embeddings` says."""

    model_type: ClassVar[str] = "m2m_100"
    architectures: ClassVar[dict[str, Head]] = {"M2M100ForConditionalGeneration": "lm", "M2M100Model": "none"}
    paper: ClassVar[str] = "Fan et al. 2021"
    tokenizer: ClassVar[str] = "SentencePiece BPE"
    placement: ClassVar[Placement] = "pre"
    biased: ClassVar[bool] = False
    unused: ClassVar[dict[str, Any]] = BartLike.unused | layout(before=True, embedding=False, static=True)

    vocab_size: int = 128112
    encoder_layerdrop: float = 0.05
    decoder_layerdrop: float = 0.05
    activation_function: str = "relu"
    attention_dropout: float = 0.1
    scale_embedding: bool = True
    bos_token_id: int = 0
    decoder_start_token_id: int = 2

    def check(self) -> None:
        super().check()
        self.require(self.d_model % 2 == 0, f"sines and cosines can't share a d_model of {self.d_model} evenly")

    @property
    def positions(self) -> parts.Position:
        return parts.Sinusoidal(self.d_model, offset=2, layout="halves", spacing="ends")
