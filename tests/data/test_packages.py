"""The corpora of real packages, where the machine has fetched them before: tests never fetch anything."""

from __future__ import annotations

import time

import pytest

from polyformer.data import DataRecipe, Gettext, LibreOfficeHelp, PairTokenizer, TokenizerRecipe, fetch, prepare
from polyformer.data.text import fold

WHEELS = ("spyder==6.1.0", "wagtail==8.0", "django==5.2", "horizon==27.0.0")


def need(*names: str) -> None:
    missing = [name for name in names if not (fetch.cache_folder() / name).is_dir()]
    if missing:
        pytest.skip(f"not in the cache of fetched packages: {', '.join(missing)}")


@pytest.mark.parametrize(
    ("language", "package", "least"), [("de", "de", 35_000), ("fr", "fr", 33_000), ("zh", "zh-cn", 24_000)]
)
def test_libreoffice_help_has_as_many_pairs_as_ever(language: str, package: str, least: int) -> None:
    need("debian/libreoffice-help-en-us", f"debian/libreoffice-help-{package}")
    start = time.perf_counter()
    direction = f"en-{language}"
    result = prepare(DataRecipe((LibreOfficeHelp(),), (direction,)))
    assert time.perf_counter() - start < 30
    pairs = [*result.train, *result.validation, *result.test]
    assert least < len(pairs) < 1.1 * least
    held_out = {fold(pair.source) for pair in result.test} | {fold(pair.target) for pair in result.test}
    assert not held_out & {fold(pair.source) for pair in result.train} & {fold(pair.target) for pair in result.train}


def test_wheels_have_catalogues_in_many_languages() -> None:
    need(*(f"wheels/{name.replace('==', '-')}" for name in WHEELS))
    corpus = Gettext(packages=WHEELS)
    assert {"de", "fr", "es", "ja", "zh", "zh_Hant", "ru", "pt_BR"} <= set(corpus.available())
    result = prepare(DataRecipe((corpus,), ("en-de", "de-en", "en-zh", "de-zh")))
    counted = {direction: result.report.counts["train"][direction] for direction in ("en-de", "en-zh", "de-zh")}
    assert counted["en-de"] == result.report.counts["train"]["de-en"] > 6_000
    assert counted["en-zh"] > 6_000
    assert counted["de-zh"] > 4_000


@pytest.mark.slow
def test_a_vocabulary_of_real_texts_is_learnt_in_seconds() -> None:
    need("debian/libreoffice-help-en-us", "debian/libreoffice-help-de")
    pairs = prepare(DataRecipe((LibreOfficeHelp(),), paragraphs="split")).train
    for kind in ("bpe", "byte_bpe", "wordpiece", "unigram"):
        start = time.perf_counter()
        tokens = PairTokenizer.train(pairs, TokenizerRecipe.from_data({"kind": kind, "vocabulary": 8000}))
        assert time.perf_counter() - start < 30
        back = [tokens.decode_target(ids) for ids in tokens.encode_targets([pair.target for pair in pairs])]
        assert sum(text == pair.target for text, pair in zip(back, pairs, strict=True)) > 0.999 * len(pairs)
