"""What a text is to the data room: its normal form, its folded form, its words and its script."""

from __future__ import annotations

import re
import unicodedata

# Control characters that are no white space; soft hyphen, zero-width space, byte order mark; lone surrogates.
UNWANTED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\ufeff\ud800-\udfff]")
PLACEHOLDER = re.compile(r"%\(\w+\)[a-zA-Z]|%\d*\$?[sdifgxcru]\b|%\d|\$?\{[\w.!:]*\}|\$\w+")
_NO_WORD = re.compile(r"[\W\d_]+")

_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_IDEOGRAPH = re.compile(f"[{_HAN}{_KANA}]")
_SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=["“„«(]?[^\W\d_a-zà-öø-ÿ])|(?<=[。！？])(?=[^」』”’）)])')
_RUN = re.compile(r"[^\W\d_]+")

_IDEOGRAPHIC = {"zh": re.compile(f"[{_HAN}]"), "ja": _IDEOGRAPH}
_SCRIPT_RANGES = {
    "A-Za-zÀ-ÖØ-öø-\u024f\u1e00-\u1eff": (
        "en de fr es it pt nl pl cs sk sl hr hu ro sv da nb nn no fi et lt lv is ga cy eu ca gl tr id vi"
    ),
    "\u0400-\u052f": "ru uk be bg mk mn ky tg",
    "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefe": "ar fa ur ug",
    "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af": "ko",
    "\u0370-\u03ff\u1f00-\u1fff": "el",
    "\u0590-\u05ff": "he",
    "\u0900-\u097f": "hi mr ne",
    "\u0e00-\u0e7f": "th",
}
_ALPHABETIC = {
    language: re.compile(f"[{letters}]") for letters, many in _SCRIPT_RANGES.items() for language in many.split()
}


def normalise(text: str) -> str:
    """Return the text in Unicode's form NFC, on one line, with single spaces, without control characters.

    Soft hyphens, zero-width spaces and lone surrogates go too; the joiners that emoji, Persian and Indian scripts
    need stay. The function is idempotent, and is applied to what is trained on and to what is translated alike.
    """
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()
    return " ".join(unicodedata.normalize("NFC", UNWANTED.sub("", text)).split())


def fold(text: str) -> str:
    """Return a form in which texts that say the same are equal: without case, digits, punctuation, placeholders.

    Two texts of one fold must not stand on both sides of a split: "Page 1 of 2" would give "page 3 of 7" away.
    A text that has nothing else is its own fold.
    """
    folded = _NO_WORD.sub(" ", unicodedata.normalize("NFKC", PLACEHOLDER.sub(" ", text)).casefold()).strip()
    return folded or text


def count_words(text: str) -> float:
    """Count words: runs without spaces; two Chinese or Japanese characters count as one word."""
    if text.isascii():
        return float(len(text.split()))
    rest, characters = _IDEOGRAPH.subn(" ", text)
    return len(rest.split()) + characters / 2


def sentences(text: str) -> list[str]:
    """Split a paragraph after the marks that end sentences, where the next doesn't begin with a small letter.

    Abbreviations can be mistaken for ends; who splits pairs should see that both sides have as many sentences.
    """
    return [sentence.strip() for sentence in _SENTENCE_END.split(text) if sentence.strip()] or [text]


def letter_share(text: str) -> float:
    """Return which share of the characters that are no spaces are letters of any script, from 0 to 1."""
    letters = sum(map(len, _RUN.findall(text)))
    return letters / max(len(text) - text.count(" "), 1)


def script_share(text: str, language: str) -> float:
    """Return which share of the text's words is in the script of its language, from 0 to 1.

    1 for a language whose script is not known here and for a text without letters. Names of products stay Latin
    in every language, so that even good translations are often below 1.
    """
    base = language.split("_")[0]
    if base not in _IDEOGRAPHIC and base not in _ALPHABETIC:
        return 1.0
    if base == "en" and text.isascii():  # quick for the most frequent case
        return 1.0
    rest, ideographs = _IDEOGRAPH.subn(" ", text)
    runs = _RUN.findall(rest)
    total = len(runs) + ideographs / 2
    if base in _IDEOGRAPHIC:
        inside = len(_IDEOGRAPHIC[base].findall(text)) / 2
    else:
        inside = sum(_ALPHABETIC[base].match(run) is not None for run in runs)
    return inside / total if total else 1.0
