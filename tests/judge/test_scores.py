"""Scores are sacreBLEU's own."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import sacrebleu

from polyformer.errors import DataError
from polyformer.judge import bleu, bleu_tokenizer, chrf

HYPOTHESES = ["The cat sat on the mat.", "Hello, world!", "Save the file as"]
REFERENCES = ["The cat sat on a mat.", "Hello world!", "Save the file under another name"]
CHINESE = ["保存文件并关闭窗口。", "打开新的文档。"]
CHINESE_REFERENCES = ["保存该文件并关闭窗口。", "打开一个新文档。"]


def test_bleu_is_sacrebleus() -> None:
    score = bleu(HYPOTHESES, REFERENCES, "en")
    assert score.value == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score > 20
    assert score.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")


def test_chinese_is_cut_into_characters() -> None:
    score = bleu(CHINESE, CHINESE_REFERENCES, "zh_CN")
    assert score.value == sacrebleu.corpus_bleu(CHINESE, [CHINESE_REFERENCES], tokenize="zh").score
    assert score.value > bleu(CHINESE, CHINESE_REFERENCES, "de").value
    assert "tok:zh" in score.signature


def test_chrf_is_sacrebleus() -> None:
    score = chrf(HYPOTHESES, REFERENCES)
    assert score.value == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert score.name == "chrF2"
    assert score.signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.")


@pytest.mark.parametrize(
    ("language", "tokenizer"), [("de", "13a"), ("zh", "zh"), ("zh-Hant", "zh"), ("ZH_tw", "zh"), ("pt_BR", "13a")]
)
def test_the_language_chooses_the_tokenizer(language: str, tokenizer: str) -> None:
    assert bleu_tokenizer(language) == tokenizer


@pytest.mark.parametrize(("language", "package"), [("ja", "MeCab"), ("ko", "mecab_ko")])
def test_morphemes_where_their_package_is_installed(language: str, package: str) -> None:
    assert bleu_tokenizer(language) == (f"{language}-mecab" if find_spec(package) else "char")
    bleu(["文書を保存する"], ["文書を保存します"], language)


def test_a_score_goes_into_json() -> None:
    score = bleu(HYPOTHESES, REFERENCES, "en")
    assert json.loads(json.dumps(score.to_data())) == {
        "name": "BLEU",
        "value": score.value,
        "signature": score.signature,
    }


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(DataError, match="3 translations can't be held against 2 references"):
        bleu(HYPOTHESES, REFERENCES[:2], "en")
    with pytest.raises(DataError, match="no translations"):
        chrf([], [])
