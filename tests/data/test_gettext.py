from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import polib
import pytest

from polyformer.data import Gettext, Pair
from polyformer.data.gettext import language_of, plain
from polyformer.data.messages import read_catalogue
from polyformer.errors import DataError, SpecError

from .makers import catalogue, wheel


def texts(pairs: Iterable[Pair]) -> list[tuple[str, str]]:
    return sorted(pair[:2] for pair in pairs)


def locale(folder: Path, language: str, messages: dict[str, str], name: str = "app", compiled: bool = True) -> Path:
    place = folder / "locale" / language / "LC_MESSAGES"
    place.mkdir(parents=True, exist_ok=True)
    made = catalogue(messages)
    made.save_as_mofile(str(place / f"{name}.mo")) if compiled else made.save(str(place / f"{name}.po"))
    return place


def test_a_folder_gives_every_direction_over_the_english_message(tmp_path: Path) -> None:
    locale(tmp_path, "de", {"Open": "Öffnen", "Close": "Schließen", "Print": ""})
    locale(tmp_path, "zh_Hans", {"Open": "打开", "Save": "保存"}, compiled=False)
    corpus = Gettext(paths=(str(tmp_path),))
    assert corpus.available() == ("de", "en", "zh")
    assert texts(corpus.pairs(("en-de",))) == [("Close", "Schließen"), ("Open", "Öffnen")]
    assert list(corpus.pairs(("de-zh",))) == [Pair("Öffnen", "打开", "de", "zh")]
    assert texts(corpus.pairs(("zh-en",))) == [("保存", "Save"), ("打开", "Open")]
    assert list(corpus.pairs(("en-fr",))) == []


def test_a_wheel_is_read_without_unpacking_and_packs_of_one_language_join(tmp_path: Path) -> None:
    de, fr = catalogue({"Open": "Öffnen"}), catalogue({"Open": "Ouvrir"})
    one = wheel(tmp_path / "pack_de-1-py3-none-any.whl", {"pack_de_DE/locale/de_DE/LC_MESSAGES/app.mo": de.to_binary()})
    two = wheel(tmp_path / "pack_fr-1-py3-none-any.whl", {"pack_fr_FR/locale/fr_FR/LC_MESSAGES/app.po": str(fr)})
    assert texts(Gettext(paths=(str(one), str(two))).pairs(("de-fr",))) == [("Öffnen", "Ouvrir")]
    assert texts(Gettext(paths=(str(tmp_path),)).pairs(("fr-de",))) == [("Ouvrir", "Öffnen")]


def test_the_compiled_catalogue_is_taken_where_both_stand(tmp_path: Path) -> None:
    locale(tmp_path, "de", {"Open": "Öffnen"})
    locale(tmp_path, "de", {"Open": "alt", "Close": "alt"}, compiled=False)
    assert texts(Gettext(paths=(str(tmp_path),)).pairs(("en-de",))) == [("Open", "Öffnen")]


def test_contexts_keep_equal_messages_apart_and_fuzzy_and_obsolete_ones_stay_out(tmp_path: Path) -> None:
    for language, month, verb in (("de", "Mai", "dürfen"), ("fr", "mai", "pouvoir")):
        made = catalogue({})
        made.append(polib.POEntry(msgid="May", msgstr=month, msgctxt="month"))
        made.append(polib.POEntry(msgid="May", msgstr=verb, msgctxt="verb"))
        made.append(polib.POEntry(msgid="Guess", msgstr="geraten", flags=["fuzzy"]))
        made.append(polib.POEntry(msgid="Old", msgstr="alt", obsolete=True))
        made.save(str(tmp_path / f"{language}.po"))
    corpus = Gettext(paths=(str(tmp_path / "de.po"), str(tmp_path / "fr.po")))
    assert texts(corpus.pairs(("de-fr",))) == [("Mai", "mai"), ("dürfen", "pouvoir")]
    assert texts(corpus.pairs(("en-de",))) == [("May", "Mai"), ("May", "dürfen")]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_plural_gives_its_first_and_its_last_form(tmp_path: Path, compiled: bool) -> None:
    made = catalogue({}, "ru")
    forms = {0: "файл", 1: "файла", 2: "файлов"}
    made.append(polib.POEntry(msgid="file", msgid_plural="files", msgstr_plural=forms))
    path = tmp_path / ("app.mo" if compiled else "app.po")
    made.save_as_mofile(str(path)) if compiled else made.save(str(path))
    assert texts(Gettext(paths=(str(path),)).pairs(("en-ru",))) == [("file", "файл"), ("files", "файлов")]


def test_keys_are_replaced_by_the_english_catalogue(tmp_path: Path) -> None:
    locale(tmp_path, "en", {"menu.open": "Open", "menu.none": ""})
    locale(tmp_path, "de", {"menu.open": "Öffnen"})
    assert texts(Gettext(paths=(str(tmp_path),)).pairs(("en-de",))) == [("Open", "Öffnen")]


def test_the_language_stands_in_the_header_or_the_name(tmp_path: Path) -> None:
    catalogue({"Open": "Abrir"}, "pt_BR").save(str(tmp_path / "application.po"))
    assert Gettext(paths=(str(tmp_path / "application.po"),)).available() == ("en", "pt_BR")
    catalogue({"Open": "Otwórz"}).save(str(tmp_path / "app.pl.po"))
    assert Gettext(paths=(str(tmp_path / "app.pl.po"),)).available() == ("en", "pl")
    catalogue({"Open": "?"}).save(str(tmp_path / "application.po"))
    with pytest.raises(DataError, match=r"can't tell the language of .*application\.po; name it like de\.po"):
        Gettext(paths=(str(tmp_path / "application.po"),)).available()
    assert Gettext(paths=(str(tmp_path),)).available() == ("en", "pl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("&Open", "Open"),
        ("Re&name", "Rename"),
        ("打开(&O)", "打开"),
        ("Öffnen... (_O)", "Öffnen..."),
        ("Save _as", "Save as"),
        ("R&D and Q&A", "R&D and Q&A"),
        ("this && that", "this & that"),
        ("a &lt;tag&gt;", "a <tag>"),
        ("__init__ and foo_bar", "__init__ and foo_bar"),
        ("<b>Note</b>:<br/>see <a href='x'>this</a>", "Note: see this"),
        ("1 < 2 > 0", "1 < 2 > 0"),
    ],
)
def test_marks_of_shortcuts_and_html_are_taken_out(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_placeholders_are_kept_or_dropped(tmp_path: Path) -> None:
    messages = {
        "%d files": "%d Dateien",
        "Hi {name}": "Hallo {name}",
        "100% sure": "100% sicher",
        "%(n)s of it": "%(n)s",
        "Drop %1": "%1 weg",
    }
    locale(tmp_path, "de", messages)
    assert len(list(Gettext(paths=(str(tmp_path),)).pairs(("en-de",)))) == 5
    kept = Gettext(paths=(str(tmp_path),), placeholders="drop").pairs(("en-de",))
    assert texts(kept) == [("100% sure", "100% sicher")]


@pytest.mark.parametrize(
    ("locale", "language"),
    [
        ("de", "de"), ("de_DE", "de"), ("de-AT", "de_AT"), ("zh_CN", "zh"), ("zh-Hans-CN", "zh"), ("zh_TW", "zh_Hant"),
        ("zh_Hant", "zh_Hant"), ("pt-br", "pt_BR"), ("pt_PT", "pt"), ("ja_JP", "ja"), ("sr@latin", "sr_latin"),
        ("es_419", "es_419"), ("EN_us", "en"),
    ],
)  # fmt: skip
def test_locales_become_languages(locale: str, language: str) -> None:
    assert language_of(locale) == language


def test_a_catalogue_in_another_encoding(tmp_path: Path) -> None:
    content = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=ISO-8859-1\\n"\n\nmsgid "Open"\nmsgstr "Öffnen"\n'
    (tmp_path / "de.po").write_bytes(content.encode("latin-1"))
    assert texts(Gettext(paths=(str(tmp_path / "de.po"),)).pairs(("en-de",))) == [("Open", "Öffnen")]
    (tmp_path / "de.po").write_bytes(content.replace("ISO-8859-1", "klingon").encode())
    with pytest.raises(DataError, match="its encoding is 'klingon', which is not known"):
        Gettext(paths=(str(tmp_path / "de.po"),)).available()


def test_big_endian_catalogues_are_read() -> None:
    key, value = b"Open\0", "Öffnen".encode() + b"\0"
    head = struct.pack(">7I", 0x950412DE, 0, 1, 28, 36, 0, 0)
    data = head + struct.pack(">4I", 4, 44, len(value) - 1, 44 + len(key)) + key + value
    assert read_catalogue(data, "x.mo").messages[0].forms == ("Öffnen",)


def mo() -> bytes:
    data: bytes = catalogue({"Open": "Öffnen", "Close": "Schließen"}).to_binary()
    return data


@pytest.mark.parametrize("length", [4, 20, 27, 40, 60, -1])
def test_a_truncated_compiled_catalogue_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "de.mo").write_bytes(mo().rstrip(b"\0")[:length])
    with pytest.raises(DataError, match=r"de\.mo is truncated or damaged"):
        list(Gettext(paths=(str(tmp_path / "de.mo"),)).pairs(("en-de",)))


def test_hostile_compiled_catalogues_are_refused_at_once() -> None:
    with pytest.raises(DataError, match="doesn't begin like one"):
        read_catalogue(b"PK\3\4" + bytes(40), "x.mo")
    many = struct.pack("<7I", 0x950412DE, 0, 2**32 - 1, 28, 28, 0, 0) + bytes(100)
    with pytest.raises(DataError, match="truncated"):
        read_catalogue(many, "x.mo")
    count = 10_000  # each of the overlapping strings is the whole file
    table = struct.pack("<2I", 28 + 8 * count, 0) * count
    with pytest.raises(DataError, match="truncated or damaged"):
        read_catalogue(struct.pack("<7I", 0x950412DE, 0, count, 28, 28, 0, 0) + table, "x.mo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'msgid "a"\nmsgstr "\xe4"\n', r"de\.po, line 2: byte 9 \(0xe4\) is not UTF-8"),
        (b'msgid "a"\nmsgstr "b"\nnonsense\n', r"de\.po is no gettext catalogue \(Syntax error in line 3\)"),
        (b"", r"de\.po is empty"),
    ],
)
def test_a_bad_catalogue_names_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "de.po").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(Gettext(paths=(str(tmp_path / "de.po"),)).pairs(("en-de",)))


def test_what_is_no_archive_or_is_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"a\.whl is no wheel or zip archive"):
        Gettext(paths=(str(tmp_path / "a.whl"),)).available()
    path = wheel(tmp_path / "b.whl", {"locale/de/LC_MESSAGES/app.mo": mo()})
    data = bytearray(path.read_bytes())
    data[data.index(b"\xde\x12") + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"app\.mo in .*b\.whl can't be unpacked"):
        Gettext(paths=(str(path),)).available()
    with pytest.raises(DataError, match="there is no file or folder"):
        Gettext(paths=(str(tmp_path / "none"),)).available()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt should be a folder or end with \.mo, \.po"):
        Gettext(paths=(str(tmp_path / "a.txt"),)).available()


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyformer.data.containers._LARGEST_MEMBER", 1000)
    path = wheel(tmp_path / "b.whl", {"locale/de/LC_MESSAGES/app.mo": bytes(1001)})
    with pytest.raises(DataError, match="larger than 1,000 bytes"):
        Gettext(paths=(str(path),)).available()


def test_a_catalogues_text_is_never_taken_for_a_file(tmp_path: Path) -> None:
    catalogue({"secret": "geheim"}, "de").save(str(tmp_path / "secret.po"))
    path = wheel(tmp_path / "b.whl", {"locale/de/LC_MESSAGES/app.po": str(tmp_path / "secret.po")})
    with pytest.raises(DataError, match="no gettext catalogue"):
        list(Gettext(paths=(str(path),)).pairs(("en-de",)))


def test_the_recipe_is_checked() -> None:
    with pytest.raises(SpecError, match="needs paths or packages"):
        Gettext()
    for wrong in ("django", "django>=5", "--index-url=x==1", "a==1; b"):
        with pytest.raises(SpecError, match=r"named with its version, such as 'django==5\.2'"):
            Gettext(packages=(wrong,))
