from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyformer.data import Corpus, DataRecipe, Filters, Pair, Tsv, prepare
from polyformer.data.recipe import FAULTS, READ, SPLIT, SPLITS
from polyformer.data.split import Shares, split
from polyformer.data.text import fold
from polyformer.errors import DataError, SpecError

from .makers import english_chinese, english_german, lines


def tsv(path: Path, pairs: Sequence[Pair]) -> Tsv:
    return Tsv(str(lines(path, [f"{pair.source}\t{pair.target}" for pair in pairs])), languages=(pairs[0][2:]))


def texts(pairs: Sequence[Pair]) -> set[tuple[str, str]]:
    sides = {(pair.source_language, fold(pair.source)) for pair in pairs}
    return sides | {(pair.target_language, fold(pair.target)) for pair in pairs}


def test_what_is_dropped_is_counted_with_its_reason(tmp_path: Path) -> None:
    bad = [
        ("", "leer"), ("one side", "\u00a0"), ("", ""), ("LibreOffice", "LibreOffice"), ("1 + 1", "2"),
        ("A B C", "A " * 12), ("word " * 120, "Wort " * 120), ("打开文件", "Datei öffnen"),
        ("Open  the file and the folder", "Öffne Datei und Ordner"), ("Cafe\u0301", "Kaffee"),
    ]  # fmt: skip
    pairs = [*english_german(), *(Pair(one, other, "en", "de") for one, other in bad)]
    result = prepare(DataRecipe((tsv(tmp_path / "a.tsv", pairs),)))
    counted = {what: counts["en-de"] for what, counts in result.report.counts.items()}
    assert counted["read"] == len(pairs)
    assert {what: counted.get(what, 0) for what in FAULTS} == {
        "one side empty": 3, "source equals target": 1, "few letters": 1, "too short": 0, "too long": 1,
        "lengths too different": 1, "not in its language's script": 1, "duplicate": 1,
    }  # fmt: skip
    kept = [*result.train, *result.validation, *result.test]
    assert len(kept) == len(set(kept)) == len(pairs) - 9
    assert Pair("Café", "Kaffee", "en", "de") in kept


def test_the_report_adds_up_and_prints_as_a_table(tmp_path: Path) -> None:
    recipe = DataRecipe(
        (tsv(tmp_path / "a.tsv", english_german()), tsv(tmp_path / "b.tsv", english_chinese())),
        ("en-de", "de-en", "zh-en"),
    )
    report = prepare(recipe).report
    for direction in recipe.directions:
        counted = {what: counts[direction] for what, counts in report.counts.items()}
        assert counted[READ] + counted.get(SPLIT, 0) - sum(counted.get(fault, 0) for fault in FAULTS) == sum(
            counted[name] for name in SPLITS
        )
    table = str(report).splitlines()
    assert table[0].split() == ["pairs", "en-de", "de-en", "zh-en", "all"]
    assert table[1].split() == ["read", "1,440", "1,440", "1,440", "4,320"]
    assert len({len(line) for line in table}) == 1


def test_no_sentence_of_a_held_out_pair_is_trained_on_in_any_direction(tmp_path: Path) -> None:
    recipe = DataRecipe(
        (tsv(tmp_path / "a.tsv", english_german()), tsv(tmp_path / "b.tsv", english_chinese())),
        ("en-de", "de-en", "en-zh", "zh-en"),
        validation=0.05,
        test=0.1,
    )
    result = prepare(recipe)
    train, validation, test = texts(result.train), texts(result.validation), texts(result.test)
    assert not train & test
    assert not train & validation
    assert not validation & test
    total = sum(map(len, (result.train, result.validation, result.test)))
    assert 0.05 < len(result.test) / total < 0.15
    assert 0.02 < len(result.validation) / total < 0.09
    assert {pair.direction for pair in result.test} == set(recipe.directions)


TEXT = st.sampled_from(
    [
        f"{word}{end}"
        for word in ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"]
        for end in ("", ".", " 1")
    ]
)
PAIRS = st.lists(st.builds(Pair, TEXT, TEXT, st.just("en"), st.sampled_from(["de", "fr"])), min_size=1, unique=True)


@given(PAIRS, st.integers(0, 3), st.randoms())
def test_a_split_is_disjoint_complete_and_ignores_the_order(pairs: list[Pair], seed: int, order: random.Random) -> None:
    shares = Shares(0.2, 0.2, seed)
    try:
        parts = split(pairs, shares)
    except DataError:
        return
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            assert not texts(one) & texts(other)
    assert sorted(pair for part in parts for pair in part) == sorted(pairs)
    assert all(parts)
    order.shuffle(pairs)
    assert split(pairs, shares) == parts


def test_a_split_does_not_change_as_unrelated_pairs_come() -> None:
    pairs = [Pair(f"word{'x' * i}", f"wort{'x' * i}", "en", "de") for i in range(300)]
    shares = Shares(0.1, 0.1)
    small, large = split(pairs[:200], shares), split(pairs, shares)
    assert all(set(one) <= set(other) for one, other in zip(small, large, strict=True))
    assert split(pairs, Shares(0.1, 0.1, seed=1)) != large


def test_a_giant_group_is_trained_on() -> None:
    giant = [Pair("Name", f"Name von {'x' * i}", "en", "de") for i in range(1, 200)]
    others = [Pair(f"word{'x' * i}", f"wort{'x' * i}", "en", "de") for i in range(200)]
    for seed in range(20):
        train, _, _ = split([*giant, *others], Shares(0.2, 0.2, seed))
        assert set(giant) <= set(train)


def test_preparing_gives_the_same_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    pairs = english_german()
    one = prepare(DataRecipe((tsv(tmp_path / "a.tsv", pairs),)))
    random.Random(1).shuffle(pairs)
    other = prepare(DataRecipe((tsv(tmp_path / "b.tsv", pairs),)))
    assert (one.train, one.validation, one.test) == (other.train, other.validation, other.test)
    assert one.train != sorted(one.train)


def test_paragraphs_are_split_where_the_sentences_match(tmp_path: Path) -> None:
    pairs = [
        *english_german(),
        Pair("Opens a file. Closes it.", "Öffnet eine Datei. Schließt sie.", "en", "de"),
        Pair("Opens a file. Closes it.", "Öffnet eine Datei und schließt sie.", "en", "de"),
        Pair("It. Opens the one and the other and the third.", "Das eine und das andere öffnet es. Ja.", "en", "de"),
    ]
    result = prepare(DataRecipe((tsv(tmp_path / "a.tsv", pairs),), paragraphs="split"))
    kept = {*result.train, *result.validation, *result.test}
    assert Pair("Closes it.", "Schließt sie.", "en", "de") in kept
    assert pairs[-3] not in kept
    assert {pairs[-2], pairs[-1]} <= kept
    assert result.report.counts[SPLIT]["en-de"] == 1


def test_without_held_out_shares_everything_is_trained_on(tmp_path: Path) -> None:
    result = prepare(DataRecipe((tsv(tmp_path / "a.tsv", english_german()[:3]),), validation=0, test=0))
    assert (len(result.train), result.validation, result.test) == (3, [], [])


class Scripted(Corpus):
    """Two languages, no pairs."""

    def available(self) -> tuple[str, ...]:
        return ("fr", "it")

    def pairs(self, directions: Sequence[str]) -> Iterator[Pair]:
        return iter(())


def test_a_direction_without_pairs_names_the_languages_that_there_are(tmp_path: Path) -> None:
    corpora = (tsv(tmp_path / "a.tsv", english_german()), Scripted())
    with pytest.raises(DataError, match=r"no pairs for the direction 'en-fr'; the corpora have: de, en, fr, it"):
        prepare(DataRecipe(corpora, ("en-de", "en-fr")))


def test_a_corpus_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    pairs = [Pair("", "x", "en", "de"), Pair("same", "same", "en", "de"), Pair("", "y", "en", "de")]
    with pytest.raises(
        DataError, match=r"none of the 3 pairs .*'en-de' can be used \(one side empty: 2, source equals target: 1\)"
    ):
        prepare(DataRecipe((tsv(tmp_path / "a.tsv", pairs),)))


def test_too_few_pairs_to_hold_out_are_refused(tmp_path: Path) -> None:
    pairs = [Pair("Name", "Name des", "en", "de"), Pair("name.", "Titel", "en", "de")]
    with pytest.raises(DataError, match="2 pairs in 1 groups of related sentences are too few"):
        prepare(DataRecipe((tsv(tmp_path / "a.tsv", pairs),)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpora": ()}, "at least one corpus"),
        ({"directions": ()}, "at least one direction"),
        ({"directions": ("en-de", "en-de")}, "names a direction twice"),
        ({"directions": ("ende",)}, "not 'ende'"),
        ({"validation": -0.1}, "should not be negative"),
        ({"test": 0.6}, "leave half"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        DataRecipe((Scripted(),)).replace(**changes)


def test_formulas_can_be_left_out(tmp_path: Path) -> None:
    formula = Pair("=FACT(3) returns 6", "=FAKULTÄT(3) ergibt 6", "en", "de")
    corpus = tsv(tmp_path / "a.tsv", [*english_german(), formula, Pair("=COS(1;2;3)", "=KOS(1;2;3)", "en", "de")])
    for share, dropped in ((0.0, 0), (0.6, 1), (0.8, 2)):
        report = prepare(DataRecipe((corpus,), filters=Filters(letter_share=share))).report
        assert sum(report.counts.get("few letters", {}).values()) == dropped


def test_filters_that_cannot_be_are_refused() -> None:
    for wrong in (
        {"minimum_words": 0},
        {"minimum_words": 9, "maximum_words": 8},
        {"maximum_ratio": 0.5},
        {"script_share": 2.0},
    ):
        with pytest.raises(SpecError):
            Filters().replace(**wrong)


def test_a_recipe_is_a_file() -> None:
    recipe = DataRecipe(
        (Tsv("a.tsv", languages=("en", "zh")), Scripted()), ("en-zh",), Filters(minimum_words=2), "split"
    )
    assert DataRecipe.from_toml(recipe.to_toml()) == recipe
    with pytest.raises(SpecError, match=r"unknown key 'langages' \(did you mean 'languages'\?\)"):
        DataRecipe.from_data({"corpora": [{"type": "Tsv", "path": "a", "langages": ["en", "de"]}]})
