"""Pegasus (Zhang et al. 2020): pre-norm, with sinusoids in halves, for summaries."""

from __future__ import annotations

from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.bart_kin import BartLike, layout
from polyformer.families.blocks import Placement
from polyformer.families.config import Head


class Pegasus(BartLike):
    """The keys of a Pegasus `config.json`. Since its version 5, the reference library saves the positions too."""

    model_type: ClassVar[str] = "pegasus"
    architectures: ClassVar[dict[str, Head]] = {"PegasusForConditionalGeneration": "lm", "PegasusModel": "none"}
    paper: ClassVar[str] = "Zhang et al. 2020"
    tokenizer: ClassVar[str] = "SentencePiece Unigram"
    placement: ClassVar[Placement] = "pre"
    kept: ClassVar[bool] = True
    unused: ClassVar[dict[str, Any]] = BartLike.unused | layout(before=True, embedding=False, static=True)

    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    @property
    def positions(self) -> parts.Position:
        return parts.Sinusoidal(self.d_model, self.max_position_embeddings, layout="halves")
