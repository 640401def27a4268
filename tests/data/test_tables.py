from __future__ import annotations

from pathlib import Path

import pytest

from polyformer.data import Jsonl, Pair, Parallel, Tsv, corpus_of, read_pairs, write_pairs
from polyformer.data.gettext import Gettext
from polyformer.errors import DataError, SpecError

from .makers import english_german, lines


def test_tsv_gives_both_directions_and_a_third_language(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.tsv", ["Open\tÖffnen\t打开", "Close\tSchließen\t关闭"])
    corpus = Tsv(str(path), languages=("en", "de", "zh"))
    assert list(corpus.pairs(("de-zh", "en-fr"))) == [
        Pair("Öffnen", "打开", "de", "zh"),
        Pair("Schließen", "关闭", "de", "zh"),
    ]
    assert next(corpus.pairs(("zh-en",))) == Pair("打开", "Open", "zh", "en")


def test_windows_line_ends_a_byte_order_mark_and_odd_separators_stay_within_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes("\ufeffOne\u2028two\x0c\tEins\r\nThree\tDrei".encode())
    assert [pair[:2] for pair in Tsv(str(path)).pairs(("en-de",))] == [("One\u2028two\x0c", "Eins"), ("Three", "Drei")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nc\td\te\tf\n", r"a\.tsv, line 2: has 3 tabs; with 2 columns \(en, de\) there should be 1"),
        (b"a\tb\nonly\n", r"line 2: has 0 tabs"),
        (b"a\tb\n\nab\xff\tc\n", r"a\.tsv, line 3: byte 3 \(0xff\) is not UTF-8; convert the file"),
        (b"", r"a\.tsv is empty"),
    ],
)
def test_a_bad_tsv_names_file_line_and_byte(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(Tsv(str(tmp_path / "a.tsv")).pairs(("en-de",)))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*none\.tsv"):
        list(Tsv(str(tmp_path / "none.tsv")).pairs(("en-de",)))
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        list(Tsv(str(tmp_path)).pairs(("en-de",)))


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyformer.data.files.LONGEST_LINE", 100)
    path = lines(tmp_path / "a.tsv", ["a\tb", "x" * 101 + "\tb"])
    with pytest.raises(DataError, match="line 2: longer than 100 bytes"):
        list(Tsv(str(path)).pairs(("en-de",)))


def test_a_direction_must_be_two_languages(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.tsv", ["a\tb"])
    for wrong in ("ende", "en-en", "en-", "en_de", "en-de-fr"):
        with pytest.raises(SpecError, match=f"not '{wrong}'"):
            list(Tsv(str(path)).pairs((wrong,)))
    with pytest.raises(SpecError, match="at least two columns"):
        Tsv("x", languages=("en",))
    with pytest.raises(SpecError, match="each column differently"):
        Tsv("x", languages=("en", "en"))


def test_jsonl_reads_its_keys(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", ['{"q": "Open", "a": "打开", "more": 1}', "", '{"a": "关", "q": "Close"}'])
    corpus = Jsonl(str(path), source_key="q", target_key="a", languages=("en", "zh"))
    assert [pair[:2] for pair in corpus.pairs(("en-zh",))] == [("Open", "打开"), ("Close", "关")]
    assert [pair[:2] for pair in corpus.pairs(("zh-en",))] == [("打开", "Open"), ("关", "Close")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"source": "a", "target": ', r"line 2: no valid JSON \("),
        ("[" * 100_000, r"line 2: no valid JSON \("),
        ('["a", "b"]', "line 2: should be an object"),
        ('{"source": "a", "targt": "b"}', r"line 2: lacks the key 'target' \(it has: source, targt\)"),
        ('{"source": "a", "target": 3}', "line 2: 'target' should be text, not int"),
    ],
)
def test_a_bad_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = lines(tmp_path / "a.jsonl", ['{"source": "a", "target": "b"}', line])
    with pytest.raises(DataError, match=message):
        list(Jsonl(str(path)).pairs(("en-de",)))


def test_parallel_files_match_line_by_line(tmp_path: Path) -> None:
    one, two = lines(tmp_path / "a.en", ["Open", "Close"]), lines(tmp_path / "a.de", ["Öffnen", "Schließen"])
    corpus = Parallel(str(one), str(two))
    assert list(corpus.pairs(("de-en",)))[1] == Pair("Schließen", "Close", "de", "en")


@pytest.mark.parametrize(
    ("more", "longer"), [("en", r"a\.en has 5 lines, but .*a\.de has 2"), ("de", r"a\.de has 5 .*a\.en has 2")]
)
def test_unequal_line_counts_are_told(tmp_path: Path, more: str, longer: str) -> None:
    for language in ("en", "de"):
        lines(tmp_path / f"a.{language}", ["x"] * (5 if language == more else 2))
    with pytest.raises(DataError, match=longer):
        list(Parallel(str(tmp_path / "a.en"), str(tmp_path / "a.de")).pairs(("en-de",)))


def test_pairs_survive_a_file(tmp_path: Path) -> None:
    pairs = [*english_german()[:20], Pair('"\t\n\u2028', "🙂", "en", "zh_Hant")]
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert read_pairs(tmp_path / "p.jsonl") == pairs
    with pytest.raises(DataError, match="line 1: lacks the key 'source_language'"):
        read_pairs(lines(tmp_path / "q.jsonl", ['{"source": "a", "target": "b"}']))


def test_the_kind_of_a_corpus_is_told_by_its_name(tmp_path: Path) -> None:
    for name in ("a.tsv", "a.jsonl", "a.whl", "a.csv"):
        lines(tmp_path / name, ["x"])
    assert corpus_of(tmp_path / "a.tsv", ("de", "en")) == Tsv(str(tmp_path / "a.tsv"), languages=("de", "en"))
    assert isinstance(corpus_of(tmp_path / "a.jsonl"), Jsonl)
    assert isinstance(corpus_of(tmp_path / "a.whl"), Gettext)
    assert isinstance(corpus_of(tmp_path), Gettext)
    with pytest.raises(DataError, match=r"a\.csv .*did you mean '\.tsv'"):
        corpus_of(tmp_path / "a.csv")
    with pytest.raises(DataError, match="there is no file or folder"):
        corpus_of(tmp_path / "b.tsv")
