from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyformer.data.text import count_words, fold, letter_share, normalise, script_share, sentences

ANY = st.text(st.characters() | st.sampled_from("\t\n\r \u00a0\u2028\u200b\ufeff\ud800\u0301\u0308"))


@given(ANY)
def test_normalising_twice_is_normalising_once_and_leaves_one_clean_line(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once.split() == once.split(" ") or once == ""
    assert not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in once)


def test_normalising_keeps_what_a_reader_sees() -> None:
    assert normalise("  a\tb \x00 c\u00a0d\r\n") == "a b c d"
    assert normalise("Zu\u0308rich so\u00adft \ufeffx\u200by \ud800z") == "Zürich soft xy z"
    assert normalise("👨\u200d👩\u200d👧 می\u200cخواهم") == "👨\u200d👩\u200d👧 می\u200cخواهم"


def test_folding_forgets_case_digits_marks_and_placeholders() -> None:
    same = ["Page 1 of 2.", "page 33 of %d", "PAGE of {total}!", "Page %(n)s of %s", "page：of…"]
    assert {fold(text) for text in same} == {"page of"}
    assert fold("Straße") == fold("STRASSE")
    assert fold("保存文件。") == fold("保存文件") != fold("打开文件")
    assert fold("100 %") == "100 %"


def test_words_are_counted_in_chinese_too() -> None:
    assert count_words("Save the file") == 3
    assert count_words("保存文件") == 2
    assert count_words("在 LibreOffice 中打开") == 1 + 4 / 2


@pytest.mark.parametrize(
    ("text", "language", "low", "high"),
    [
        ("使用 LibreOffice Basic 打开文件", "zh", 0.6, 0.8),
        ("Select this option 选项", "zh", 0.0, 0.3),
        ("テストのファイル", "ja", 1.0, 1.0),
        ("テストのファイル", "zh", 0.0, 0.0),
        ("Öffnen Sie die Datei", "de", 1.0, 1.0),
        ("Открыть файл LibreOffice", "ru", 0.6, 0.7),
        ("打开文件", "en", 0.0, 0.0),
        ("anything", "xx", 1.0, 1.0),
        ("1 + 1", "zh", 1.0, 1.0),
        ("ไฟล์", "th", 1.0, 1.0),
    ],
)
def test_the_share_of_words_in_the_languages_script(text: str, language: str, low: float, high: float) -> None:
    assert low <= script_share(text, language) <= high


def test_the_share_of_letters() -> None:
    assert letter_share("1 + 1 = 2") == 0
    assert letter_share("") == 0
    assert letter_share("Ö 文 (x)") == 3 / 5


def test_paragraphs_are_split_after_sentences() -> None:
    assert sentences("Opens it. Use 3.5 or e.g. this! Really? Yes") == [
        "Opens it.", "Use 3.5 or e.g. this!", "Really?", "Yes"
    ]  # fmt: skip
    assert sentences("打开文件。保存（文件。）再见！") == ["打开文件。", "保存（文件。）再见！"]
    assert sentences("") == [""]
