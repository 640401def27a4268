"""mBART (Liu et al. 2020) and mBART-50 (Tang et al. 2020): BART with its norms in front, and a language's code in each
text: behind it where it is read, before it where it is written."""

from __future__ import annotations

from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.bart import Judging
from polyformer.families.bart_kin import layout
from polyformer.families.blocks import Placement
from polyformer.families.config import Head


class MBart(Judging):
    """The keys of an mBART `config.json`."""

    model_type: ClassVar[str] = "mbart"
    architectures: ClassVar[dict[str, Head]] = {
        "MBartForConditionalGeneration": "lm",
        "MBartModel": "none",
        "MBartForSequenceClassification": "sequence",
        "MBartForQuestionAnswering": "span",
    }
    paper: ClassVar[str] = "Liu et al. 2020"
    tokenizer: ClassVar[str] = "SentencePiece Unigram"
    placement: ClassVar[Placement] = "pre"
    normed: ClassVar[bool] = True
    unused: ClassVar[dict[str, Any]] = Judging.unused | layout(before=True, embedding=True, static=False)

    decoder_start_token_id: int | None = None

    @property
    def delay(self) -> parts.Delay:
        return parts.Delay()
