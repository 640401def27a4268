from __future__ import annotations

from pathlib import Path

import pytest

from polyformer.data import LibreOfficeHelp
from polyformer.errors import DataError

PAGE = """<html><body><div id="DisplayArea"><a name="x"></a><h1 id="hd_1" dir="auto">{title}</h1>
<p id="par_1" class="paragraph" dir="auto"><span class="avis">{first}
</span>&amp; <a target="_top" href="x.html">more</a>.<br>Next</p>
<p class="embedded">no id</p><p id="par_empty"> </p>
<p id="par_2">{twice}</p><p id="par_2">{again}</p>
{more}</div></body></html>"""
MAC = (
    '<span id="sw" class="switchinline"><span hidden="true" id="MAC1" class="MAC"><span class="keycode">Command</span>'
    '</span><span hidden="true" id="default1"><span class="keycode">Ctrl</span></span></span>'
)
PROGRAM = '<span class="switchinline"><span hidden="true" id="W" class="WRITER">In Writer</span></span>'


def page(folder: Path, language: str, *texts: str, more: str = "") -> None:
    place = folder / language / "text" / "shared"
    place.mkdir(parents=True)
    content = PAGE.format(title=texts[0], first=texts[1], twice=texts[2], again=texts[3], more=more)
    (place / "a.html").write_text(content, encoding="utf-8")


def test_elements_meet_by_page_id_and_occurrence(tmp_path: Path) -> None:
    page(tmp_path, "en-US", "Save", "Saves it", "one", "two", more='<p id="par_9">only here</p>')
    page(tmp_path, "de", "Speichern", "Speichert es", "eins", "zwei")
    corpus = LibreOfficeHelp(folder=str(tmp_path))
    assert corpus.available() == ("de", "en")
    assert [pair[:2] for pair in corpus.pairs(("en-de", "en-fr"))] == [
        ("Save", "Speichern"),
        ("Saves it\n& more. Next", "Speichert es\n& more. Next"),
        ("one", "eins"),
        ("two", "zwei"),
    ]


def test_of_texts_for_systems_the_general_one_is_taken_and_those_for_programs_are_left_out(tmp_path: Path) -> None:
    more = f'<p id="par_3">Press {MAC} now</p><p id="par_4">{PROGRAM} do</p><p id="par_5">Last</p>'
    page(tmp_path, "en-US", "a", "b", "c", "d", more=more)
    page(tmp_path, "zh-CN", "a", "b", "c", "d", more=more)
    found = [pair.source for pair in LibreOfficeHelp(folder=str(tmp_path)).pairs(("en-zh",))]
    assert found[-2:] == ["Press Ctrl now", "Last"]


def test_a_folder_without_pages_and_a_page_that_is_not_utf8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no help pages; it should have folders such as en-US/text and de/text"):
        LibreOfficeHelp(folder=str(tmp_path)).available()
    page(tmp_path, "de", "a", "b", "c", "d")
    (tmp_path / "de" / "text" / "b.html").write_bytes(b"ok\n\xff")
    with pytest.raises(DataError, match=r"b\.html, line 2: byte 1 \(0xff\) is not UTF-8"):
        list(LibreOfficeHelp(folder=str(tmp_path)).pairs(("de-en",)))
