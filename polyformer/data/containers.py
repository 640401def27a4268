"""Files where they lie: alone, in folders, and in wheels or other zip archives, which are read without unpacking."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from polyformer.data.files import read_whole, unreadable
from polyformer.errors import DataError

_ARCHIVES = (".whl", ".zip")
_CATALOGUES = (".mo", ".po")
_LARGEST_MEMBER = 64 << 20  # bytes, unpacked
_MOST_MEMBERS = 100_000

Keep = Callable[[Iterable[str]], list[str]]
"""Chooses among the names of files."""


class Found(NamedTuple):
    """A file that was found.

    Attributes:
        name: what to call it in errors.
        path: where it stands in its folder or archive, with "/" between folders.
        named: a person named this very file (it was not found in a folder or archive).
        read: returns its bytes.
    """

    name: str
    path: str
    named: bool
    read: Callable[[], bytes]


def files(path: str | Path, keep: Keep) -> Iterator[Found]:
    """Yield a file, or those in or below a folder or an archive that `keep` keeps, in the order of their names.

    Archives in a folder are looked into. A file that is named itself is kept whatever it is called.

    Raises:
        DataError: there is nothing at `path`, or an archive is damaged.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        inside = {file.relative_to(place).as_posix(): file for file in sorted(place.rglob("*")) if file.is_file()}
        kept = set(keep(name for name in inside if not name.endswith(_ARCHIVES)))
        for name, file in inside.items():
            if name.endswith(_ARCHIVES):
                yield from _in_archive(file, keep)
            elif name in kept:
                yield _file(file, name, named=False)
    elif not place.exists():
        raise DataError(f"there is no file or folder {path}")
    elif place.suffix in _ARCHIVES:
        yield from _in_archive(place, keep)
    else:
        yield _file(place, place.as_posix(), named=True)


def catalogues(path: str | Path) -> Iterator[Found]:
    """Yield the `.mo` and `.po` files at, in or below `path`, in the order of their names.

    Where a catalogue stands there both compiled and as source, the compiled one is taken.

    Raises:
        DataError: there is nothing at `path`, it is of another kind, or an archive is damaged.
    """
    place = Path(path).expanduser()
    if place.is_file() and place.suffix not in (*_ARCHIVES, *_CATALOGUES):
        raise DataError(f"{path} should be a folder or end with {', '.join((*_CATALOGUES, *_ARCHIVES))}")
    return files(path, lambda names: _without_sources([name for name in names if name.endswith(_CATALOGUES)]))


def _file(file: Path, path: str, named: bool) -> Found:
    return Found(str(file), path, named, lambda: read_whole(file))


def _without_sources(names: list[str]) -> list[str]:
    """Leave out each `.po` that has its `.mo` beside it."""
    known = set(names)
    return [name for name in names if not (name.endswith(".po") and name[:-3] + ".mo" in known)]


def _in_archive(file: Path, keep: Keep) -> Iterator[Found]:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise DataError(f"{file} is no wheel or zip archive, or is truncated") from None
    except OSError as error:
        raise unreadable(file, error) from None
    with archive:
        names = archive.namelist()
        if len(names) > _MOST_MEMBERS:
            raise DataError(f"{file} has {len(names):,} members; at most {_MOST_MEMBERS:,} are read")
        for name in sorted(keep(names)):
            yield Found(f"{file}/{name}", name, False, lambda name=name: _member(archive, name, file))  # type: ignore[misc]


def _member(archive: zipfile.ZipFile, name: str, file: Path) -> bytes:
    """Return a member's bytes; what the archive says of its size is not trusted."""
    try:
        with archive.open(name) as member:
            data = member.read(_LARGEST_MEMBER + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise DataError(f"{name} in {file} can't be unpacked ({error})") from None
    if len(data) > _LARGEST_MEMBER:
        raise DataError(f"{name} in {file} is larger than {_LARGEST_MEMBER:,} bytes")
    return data
