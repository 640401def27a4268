"""The corpus that a file or folder holds, told by its name; for commands that are given a bare file."""

from __future__ import annotations

from pathlib import Path

from polyformer.data.corpus import Corpus
from polyformer.data.documents import JsonlTexts, TextFiles, Texts
from polyformer.data.gettext import Gettext
from polyformer.data.tables import Jsonl, Tsv
from polyformer.errors import DataError, suggest

_CATALOGUES, _TABLES = (".po", ".mo", ".whl", ".zip"), (".tsv", ".txt", ".jsonl")


def corpus_of(path: str | Path, languages: tuple[str, str] = ("en", "de")) -> Corpus:
    """Return the corpus at `path`: `Tsv` (.tsv, .txt), `Jsonl`, or `Gettext` (.po, .mo, .whl, .zip, a folder).

    Args:
        languages: of the columns of a table, source first.
    Raises:
        DataError: there is nothing at `path`, or its kind is not known.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"there is no file or folder {path}")
    if place.is_dir() or place.suffix in _CATALOGUES:
        return Gettext(paths=(str(path),))
    if place.suffix not in _TABLES:
        near = suggest(place.suffix, (*_TABLES, *_CATALOGUES))
        raise DataError(f"can't tell what kind of corpus {path} is by its name{near}")
    return (Jsonl if place.suffix == ".jsonl" else Tsv)(path=str(path), languages=languages)


def texts_of(path: str | Path) -> Texts:
    """Return the corpus of texts at `path`: `JsonlTexts` (.jsonl), or `TextFiles` (any other file, or a folder)."""
    return JsonlTexts(str(path)) if Path(path).suffix == ".jsonl" else TextFiles((str(path),))
