"""Sentence pairs from the help pages of LibreOffice, which Debian packages in many languages (MPL-2.0)."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path

from polyformer.data import fetch
from polyformer.data.corpus import Aligned
from polyformer.data.files import decode_whole, read_whole
from polyformer.data.gettext import language_of
from polyformer.errors import DataError

_PACKAGED = (
    "ca cs da de dz el en_GB en es et eu fi fr gl hi hu id it ja km ko nl om pl pt pt_BR ru sk sl sv tr vi zh zh_Hant"
)
_DEBIAN = {"en": "en-us", "zh": "zh-cn", "zh_Hant": "zh-tw"}

# Headings and paragraphs carry the id of the text that was translated. Paragraphs don't nest.
_ELEMENT = re.compile(r'<(p|h[1-6])\b[^>]*\bid="([^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)
_BREAK, _TAG = re.compile(r"<br\b[^>]*>"), re.compile(r"<[^>]*>")
# A text for some systems only, beside the one for the others: <span hidden="true" … class="MAC">…</span>.
_OTHER_SYSTEM = re.compile(
    r'<span hidden="true"[^>]* class="(?:MAC|WIN|UNIX)">(?:[^<]|<(?!/?span)|<span[^>]*>[^<]*</span>)*</span>'
)
_OTHER_PROGRAM = re.compile(r'<span hidden="true"[^>]* class="[A-Z]')


class LibreOfficeHelp(Aligned):
    """Headings and paragraphs of LibreOffice's help, aligned by page and by the id of the element.

    `folder` is one that has a folder of pages for each language (`en-US`, `de`, …), such as
    `/usr/share/libreoffice/help`; without it, the Debian packages `libreoffice-help-…` of the languages that are asked
    for are fetched with apt-get (2–3 MB each). Texts that differ between the programs of the suite are left out, and
    of those that differ between systems the general one is taken.
    """

    folder: str | None = None

    def available(self) -> tuple[str, ...]:
        return tuple(sorted(self._folders())) if self.folder is not None else tuple(_PACKAGED.split())

    def texts(self, languages: frozenset[str]) -> Mapping[str, Mapping[Hashable, str]]:
        return {language: _pages(self._place(language)) for language in sorted(languages & set(self.available()))}

    def _place(self, language: str) -> Path:
        """Return the folder with the pages of a language."""
        if self.folder is not None:
            return self._folders()[language]
        package = "libreoffice-help-" + _DEBIAN.get(language, language.lower().replace("_", "-"))
        folders = [place.parent for place in (fetch.debian(package) / "usr/share/libreoffice/help").glob("*/text")]
        if len(folders) != 1:
            raise DataError(f"the Debian package {package} has no help pages where they are expected")
        return folders[0]

    def _folders(self) -> dict[str, Path]:
        folder = Path(self.folder or "").expanduser()
        found = {language_of(place.parent.name): place.parent for place in sorted(folder.glob("*/text"))}
        if not found:
            raise DataError(f"{self.folder} has no help pages; it should have folders such as en-US/text and de/text")
        return found


def _pages(folder: Path) -> dict[Hashable, str]:
    """Return the texts of all pages, by page, id, and how often the id came before on that page."""
    texts: dict[Hashable, str] = {}
    for page in sorted(folder.rglob("*.html")):
        name = page.relative_to(folder).as_posix()
        seen: Counter[str] = Counter()
        for identity, text in _elements(decode_whole(read_whole(page), str(page))):
            texts[name, identity, seen[identity]] = text
            seen[identity] += 1
    return texts


def _elements(page: str) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of the headings and paragraphs that have a text."""
    for _, identity, inner in _ELEMENT.findall(page):
        if "hidden=" in inner:
            inner = _OTHER_SYSTEM.sub("", inner)
            if _OTHER_PROGRAM.search(inner):
                continue
        text = html.unescape(_TAG.sub("", _BREAK.sub(" ", inner))).strip()
        if text:
            yield identity, text
