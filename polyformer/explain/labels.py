"""Labels that can be drawn: fonts are looked for that have their characters, and nothing is drawn as a box."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

FIRST_CHOICE = "DejaVu Sans"
"""Comes with matplotlib, and has the letters of most alphabets, but no Chinese, Japanese or Korean."""

LONGEST = 24
"""Characters of a token that are shown."""

NOT_FOR_TEXT = ("Last Resort", "STIX", "cm", "DejaVu Sans Display", "DejaVu Serif Display")
"""Beginnings of the names of fonts that come with matplotlib too, but draw boxes or formulas."""


@dataclass(frozen=True)
class Lettering:
    """Fonts in the order in which they are asked for a character, and the characters that none of them has."""

    families: list[str]
    missing: frozenset[str]

    def caption(self) -> str:
        """Return what to tell the reader about `missing`; empty if all is well."""
        if not self.missing:
            return ""
        return "‹…› stands for characters that no installed font has; install one that does, such as Noto Sans CJK"

    def label(self, text: str) -> str:
        """Return `text` as it can be drawn: what no font has, and what can't be seen, as its code point."""
        text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
        return "".join(f"‹{ord(c):X}›" if c in self.missing or not _visible(c) else c for c in text)


def _visible(character: str) -> bool:
    return character == " " or unicodedata.category(character)[0] not in "CZ"


def breadth(text: str) -> float:
    """Return about how wide a text is, in units of the font's size; East Asian characters are as wide as high."""
    return sum(1.0 if unicodedata.east_asian_width(c) in "FW" else 0.6 for c in text)


def find_lettering(texts: Iterable[str]) -> Lettering:
    """Choose fonts of this machine for all characters of `texts`; as few as will do."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    wanted = {c for text in texts for c in text if _visible(c)}
    families = [FIRST_CHOICE]
    own = FT2Font(font_manager.findfont(FIRST_CHOICE)).get_charmap()
    missing = {c for c in wanted if ord(c) not in own}
    if missing:
        fonts = {e.name: e.fname for e in font_manager.fontManager.ttflist if not e.name.startswith(NOT_FOR_TEXT)}
        gains = {name: missing & {chr(code) for code in FT2Font(file).get_charmap()} for name, file in fonts.items()}
        while missing:
            best = max(sorted(gains), key=lambda name: len(gains[name] & missing))
            if not gains[best] & missing:
                break
            families.append(best)
            missing -= gains[best]
    return Lettering(families, frozenset(missing))
