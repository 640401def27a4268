"""Sentence pairs from the translations of programs: gettext catalogues in files, folders and wheels."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from polyformer.data import fetch
from polyformer.data.containers import catalogues
from polyformer.data.corpus import Aligned
from polyformer.data.messages import Message, read_catalogue
from polyformer.data.text import PLACEHOLDER
from polyformer.errors import DataError

logger = logging.getLogger(__name__)

_LOCALE = r"[A-Za-z]{2,3}(?:[_-][A-Za-z0-9]+)*(?:@[A-Za-z]+)?"
_IN_FOLDER = re.compile(rf"(?:^|/)({_LOCALE})/LC_MESSAGES/[^/]+$")
_IN_NAME = re.compile(rf"(?:^|[/.])({_LOCALE})\.[pm]o$")

# The region whose written language is meant when none is named, where it isn't spelt like the language.
_HOME = {
    **{"cs": "CZ", "da": "DK", "el": "GR", "en": "US", "et": "EE", "fa": "IR", "he": "IL", "hi": "IN", "ja": "JP"},
    **{"ko": "KR", "nb": "NO", "sl": "SI", "sv": "SE", "uk": "UA", "vi": "VN", "zh": "CN"},
}
_CHINESE = {"HANS": "", "SG": "", "HANT": "_Hant", "TW": "_Hant", "HK": "_Hant", "MO": "_Hant"}

_SHORTCUT = re.compile(r"\s*\([&_]\w\)|(?<![A-Z&])&(?=\w)(?!\w+;)")  # "打开(&O)", "Re&name"; not "R&D", "&quot;"
_GTK_SHORTCUT = re.compile(r"(?<!\w)_(?=[A-Za-z][^_]*$)")  # "_Open", "Save _as"
_INLINE_TAG = re.compile(r"</?(?:a|abbr|b|code|em|i|kbd|small|span|strong|sub|sup|tt|u)\b[^<>]*>", re.IGNORECASE)
_BLOCK_TAG = re.compile(r"</?(?:br|dd|div|dl|dt|h[1-6]|hr|img|li|ol|p|pre|td|th|tr|ul)\b[^<>]*>", re.IGNORECASE)


class Gettext(Aligned):
    """The messages of programs and their translations, from gettext catalogues.

    `paths` are `.po` and `.mo` files, wheels, and folders that hold such; `packages` are pinned requirements such as
    "django==5.2", whose wheels are fetched with pip. A catalogue's language stands in its path (`de/LC_MESSAGES/`),
    else in its header or name (`po/de.po`). English is the message itself, or its translation in an English catalogue,
    as there is where messages are keys; two other languages meet by the English message, so that "de-zh" works too.

    Messages that are not translated, fuzzy or obsolete make no pair. Of a plural, the first form goes with the
    singular and the last with the plural. Marks of keyboard shortcuts ("&Open", "打开(&O)", "_Open") and HTML tags are
    taken out; messages with placeholders ("%s files", "{name}") are kept or dropped, as `placeholders` says.
    """

    paths: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    placeholders: Literal["keep", "drop"] = "keep"

    def check(self) -> None:
        self.require(bool(self.paths or self.packages), "needs paths or packages")
        for requirement in self.packages:
            pinned = fetch.PINNED.fullmatch(requirement) is not None
            self.require(pinned, f"a package is named with its version, such as 'django==5.2', not '{requirement}'")

    def available(self) -> tuple[str, ...]:
        return tuple(sorted({"en", *(one.language for one in self._catalogues(None))}))

    def texts(self, languages: frozenset[str]) -> Mapping[str, Mapping[Hashable, str]]:
        texts: dict[str, dict[Hashable, str]] = {language: {} for language in languages | {"en"}}
        originals: dict[Hashable, str] = {}
        for domain in self._catalogues(languages | {"en"}):
            for message in domain.messages:
                for form, original, text in self._forms(message):
                    key = (domain.name, message.context, message.singular, form)
                    originals.setdefault(key, original)
                    texts[domain.language].setdefault(key, text)
        texts["en"] = originals | texts["en"]
        return texts

    def _catalogues(self, languages: frozenset[str] | None) -> Iterator[_Domain]:
        """Yield the catalogues of these languages (None: of all)."""
        places: list[str | Path] = [*self.paths, *(fetch.wheel(package) for package in self.packages)]
        for place in places:
            for file in catalogues(place):
                in_folder = _IN_FOLDER.search(file.path)
                if in_folder and languages is not None and language_of(in_folder[1]) not in languages:
                    continue
                told, messages = read_catalogue(file.read(), file.name)
                in_name = _IN_NAME.search(file.path)
                locale = in_folder[1] if in_folder else told or (in_name[1] if in_name else "")
                if not locale and file.named:
                    raise DataError(f"can't tell the language of {file.name}; name it like de.po")
                if not locale:
                    logger.info("%s: left out, since its language can't be told", file.name)
                elif languages is None or language_of(locale) in languages:
                    name = re.sub(rf"(?<![A-Za-z]){re.escape(locale)}(?![A-Za-z])", "*", file.path[:-3])
                    yield _Domain(name, language_of(locale), messages)

    def _forms(self, message: Message) -> Iterator[tuple[str, str, str]]:
        """Yield (form, English, translation) for the one or two forms of a message that are translated."""
        both = [("one", message.singular, message.forms[0])]
        if message.plural is not None:
            both.append(("many", message.plural, message.forms[-1]))
        for form, original, text in both:
            if text and not (
                self.placeholders == "drop" and (PLACEHOLDER.search(original) or PLACEHOLDER.search(text))
            ):
                yield form, plain(original), plain(text)


class _Domain(NamedTuple):
    """A catalogue: its name with "*" for the language, so that it is the same in all, the language, the messages."""

    name: str
    language: str
    messages: list[Message]


def language_of(locale: str) -> str:
    """Return the code that a recipe uses for a locale: "de_DE" -> "de", "zh_Hans" -> "zh", "pt-BR" -> "pt_BR"."""
    base, *rest = re.split(r"[_@-]", locale)
    base = base.lower()
    if base == "zh" and rest:
        return "zh" + _CHINESE.get(rest[0].upper(), "" if rest[0].upper() == "CN" else "_" + rest[0])
    if len(rest) == 1 and rest[0].upper() == _HOME.get(base, base.upper()):
        return base
    return "_".join([base, *(part.upper() if len(part) == 2 else part for part in rest)])


def plain(text: str) -> str:
    """Return a message as a person reads it: without shortcut marks and HTML tags, entities resolved."""
    text = _BLOCK_TAG.sub(" ", _INLINE_TAG.sub("", text))
    text = _GTK_SHORTCUT.sub("", _SHORTCUT.sub("", text)) if "_" in text or "&" in text else text
    return html.unescape(text.replace("&&", "&"))
