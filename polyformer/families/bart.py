"""BART (Lewis et al. 2020): post-norm, with learned positions and normalised embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.bart_kin import BartLike, layout
from polyformer.families.blocks import judge
from polyformer.families.config import Head
from polyformer.spec import Spec


class Judging(BartLike, abstract=True):
    """Of BART and mBART there are classifiers too: there, the decoder reads the text that is to be judged."""

    classifier_dropout: float = 0.0
    bos_token_id: int = 0

    @property
    def delay(self) -> parts.Delay:
        """How the decoder reads the encoder's text."""
        raise NotImplementedError

    def spec(self) -> parts.Transformer:
        made = super().spec()
        return made.replace(delay=self.delay) if self.head in ("sequence", "span") else made

    def answers(self) -> Spec | None:
        if self.head == "sequence":
            return judge(self.d_model, len(self.labels), self.eos_token_id, self.classifier_dropout)
        return parts.Linear(self.d_model, 2) if self.head == "span" else super().answers()


class Bart(Judging):
    """The keys of a BART `config.json`."""

    model_type: ClassVar[str] = "bart"
    architectures: ClassVar[dict[str, Head]] = {
        "BartForConditionalGeneration": "lm",
        "BartModel": "none",
        "BartForSequenceClassification": "sequence",
        "BartForQuestionAnswering": "span",
    }
    paper: ClassVar[str] = "Lewis et al. 2020"
    tokenizer: ClassVar[str] = "byte-level BPE"
    normed: ClassVar[bool] = True
    unused: ClassVar[dict[str, Any]] = BartLike.unused | layout(before=False, embedding=True, static=False)

    decoder_start_token_id: int = 2

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """BART's classifiers tell three labels apart where a file is silent, as natural language inference needs."""
        return {"num_labels": 3, **super().modern(data, where)}

    @property
    def delay(self) -> parts.Delay:
        return parts.Delay(self.decoder_start_token_id)
