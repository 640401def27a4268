"""Small corpora made on the spot."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import polib

from polyformer.data import Pair

NOUNS = [
    "file",
    "folder",
    "table",
    "chart",
    "image",
    "window",
    "button",
    "menu",
    "font",
    "page",
    "line",
    "cell",
    "row",
    "column",
    "header",
    "footer",
]
VERBS = {
    "Open": "Öffne",
    "Save": "Speichere",
    "Delete": "Lösche",
    "Copy": "Kopiere",
    "Move": "Verschiebe",
    "Show": "Zeige",
}
GERMAN = [
    "Datei",
    "Ordner",
    "Tabelle",
    "Diagramm",
    "Bild",
    "Fenster",
    "Knopf",
    "Menü",
    "Schrift",
    "Seite",
    "Zeile",
    "Zelle",
    "Reihe",
    "Spalte",
    "Kopf",
    "Fuß",
]
CHINESE = [
    "文件",
    "文件夹",
    "表格",
    "图表",
    "图像",
    "窗口",
    "按钮",
    "菜单",
    "字体",
    "页面",
    "行",
    "单元格",
    "横行",
    "列",
    "页眉",
    "页脚",
]
CHINESE_VERBS = dict(zip(VERBS, ["打开", "保存", "删除", "复制", "移动", "显示"], strict=True))


def english_german() -> list[Pair]:
    """1,440 pairs such as "Open the file and the menu" — "Öffne Datei und Menü"."""
    return [
        Pair(f"{verb} the {one} and the {other}", f"{VERBS[verb]} {eins} und {zwei}", "en", "de")
        for verb in VERBS
        for one, eins in zip(NOUNS, GERMAN, strict=True)
        for other, zwei in zip(NOUNS, GERMAN, strict=True)
        if one != other
    ]


def english_chinese() -> list[Pair]:
    """1,440 pairs such as "Open the file and the menu" — "打开文件和菜单"."""
    return [
        Pair(f"{verb} the {one} and the {other}", f"{CHINESE_VERBS[verb]}{eins}和{zwei}", "en", "zh")
        for verb in VERBS
        for one, eins in zip(NOUNS, CHINESE, strict=True)
        for other, zwei in zip(NOUNS, CHINESE, strict=True)
        if one != other
    ]


def babble(number: int) -> list[Pair]:
    """Pairs of made-up words, of which some are frequent, so that large vocabularies can be learnt."""
    chance = random.Random(0)
    words = ["".join(chance.choices("aeioubdfglmnrst", k=chance.randint(2, 9))) for _ in range(1500)]
    weights = [1 / (rank + 20) for rank in range(len(words))]
    texts = [" ".join(chance.choices(words, weights, k=chance.randint(1, 20))) for _ in range(2 * number)]
    return [Pair(one, other, "en", "de") for one, other in zip(texts[::2], texts[1::2], strict=True)]


def catalogue(messages: Mapping[str, str], language: str = "") -> polib.POFile:
    """A gettext catalogue with a header."""
    made = polib.POFile()
    made.metadata = {"Content-Type": "text/plain; charset=UTF-8", **({"Language": language} if language else {})}
    made.extend(polib.POEntry(msgid=original, msgstr=text) for original, text in messages.items())
    return made


def wheel(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """A zip archive."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def lines(path: Path, texts: Sequence[str]) -> Path:
    """A text file."""
    path.write_bytes("".join(f"{text}\n" for text in texts).encode())
    return path
