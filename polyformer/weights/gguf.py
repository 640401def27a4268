"""GGUF files (llama.cpp's format, versions 2 and 3): read lazily, checked before a byte of them is believed.

A file is a magic word, counts, metadata (keys with typed values), a description of each tensor, and the tensors'
bytes. A string or array tells its own length, so that a damaged or hostile file could ask for anything: every length
is held against what is left of the file, and the limits below, before it is followed.

Source: the format's specification, `docs/gguf.md` of the ggml project.
"""

from __future__ import annotations

import errno
import functools
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from polyformer.errors import WeightsError
from polyformer.weights.files import ReadMap, TensorMap
from polyformer.weights.ggml import FORMATS, Format

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Value = bool | int | float | str | tuple[Any, ...]

HEADER = 2**27
"""Bytes of metadata and descriptions that are read at most; the largest real ones need a third of it."""

ENTRIES = 2**15
"""Keys, and tensors, that a file may have at most."""

ELEMENTS = 2**21
"""Elements of all arrays together that a file may have at most; the largest vocabularies need two thirds."""

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

_SHORT, _LONG = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class GgufFile:
    """An open file.

    Attributes:
        metadata: keys and values; an array is read each time that it is asked for.
        tensors: by their names in the file, each converted when it is asked for.
        types: the name of each tensor's ggml format, and its shape in PyTorch's order.
        stored: each tensor's bytes as they are in the file.
        header: the bytes before those of the tensors, which say all but what is in these.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: TensorMap
    types: Mapping[str, tuple[str, tuple[int, ...]]]
    stored: Mapping[str, npt.NDArray[np.uint8]]
    header: memoryview


def read_gguf(path: Path, dtype: torch.dtype | None = None) -> GgufFile:
    """Open a GGUF file; it stays memory-mapped as long as something refers to it.

    PyTorch is imported when a tensor is asked for.

    Args:
        dtype: what floating-point tensors become (float32 if None), except those stored as F32. These, and whole
            numbers, are views of the file (private: training changes no file), so that nothing is rounded before a
            layout is undone.
    Raises:
        WeightsError: naming the file and the key or tensor: another or an older format, big-endian bytes, a part of
            a split model; cut off; impossible counts, lengths, shapes or offsets, duplicate names, unknown types;
            text that is not UTF-8 (in arrays: when they are asked for).
    """
    source = _open(path)
    header = _Header(source)
    tensor_count, key_count = header.counts()
    metadata = header.metadata(key_count)
    entries = header.tensors(tensor_count)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment.bit_count() > 1:
        raise WeightsError(f"{path}: general.alignment = {_brief(alignment)} is no power of two from 8 on")
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise WeightsError(f"{path} is one of {_brief(parts)} parts of a model; join them: llama-gguf-split --merge")
    start = -(-header.place // alignment) * alignment
    entries = {name: entry._replace(first=start + entry.first) for name, entry in entries.items()}
    _check_layout(path, entries.values(), alignment, source.size)
    # Of the last two, since a model whose q, k and v are one tensor on disk asks for its weight and bias in turns.
    read = functools.lru_cache(2)(functools.partial(_read, source, dtype))
    tensors = {name: functools.partial(read, entry) for name, entry in entries.items()}
    types = {name: (entry.kind.name, entry.shape) for name, entry in entries.items()}
    stored = {name: functools.partial(_bytes, source, entry) for name, entry in entries.items()}
    named = (lambda name: f"{name!r} of {path.name}",)
    header_bytes = memoryview(header.mapped)[: header.place]
    return GgufFile(path, metadata, TensorMap(tensors, *named), types, ReadMap(stored, *named), header_bytes)


class Metadata(Mapping[str, Value]):
    """Keys to values; arrays are read from the file each time that they are asked for, and not held."""

    def __init__(self, values: Mapping[str, Value | _Array]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Value:
        value = self._values[key]
        return value.read() if isinstance(value, _Array) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values


class _Source:
    """An open file, of which pieces are mapped: privately, so that what is written to them stays in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = -1
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self.handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self.handle).st_size

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)

    def piece(self, first: int, size: int) -> tuple[mmap.mmap, int]:
        """Map so many bytes, and perhaps a few more; return the map and where they begin in it."""
        before = first % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(self.handle, before + size, access=mmap.ACCESS_COPY, offset=first - before)
        except (OSError, ValueError) as error:  # ValueError: the file became shorter
            raise WeightsError(f"{self.path} can't be read: {error}") from None
        return mapped, before


class _Entry(NamedTuple):
    """A tensor and where it is: its first byte, from the start of the tensors or (once placed) of the file."""

    name: str
    kind: Format
    shape: tuple[int, ...]
    first: int
    size: int


@dataclass(frozen=True)
class _Array:
    """Where an array is in the file; its bytes were checked to be there."""

    mapped: mmap.mmap
    where: str
    kind: int
    count: int
    first: int

    def read(self) -> tuple[Any, ...]:
        if self.kind != STRING:
            return struct.unpack_from(f"<{self.count}{NUMBERS[self.kind]}", self.mapped, self.first)
        found, place, mapped, length_at = [], self.first, self.mapped, _LONG.unpack_from
        try:
            for _ in range(self.count):
                end = place + 8 + length_at(mapped, place)[0]
                found.append(mapped[place + 8 : end].decode())
                place = end
        except UnicodeDecodeError:
            raise WeightsError(f"{self.where}: string {len(found)} of it is not UTF-8") from None
        return tuple(found)


class _Header:
    """Goes through the file from its start; `place` is the next byte."""

    def __init__(self, source: _Source) -> None:
        self.path, self.place, self.elements = source.path, 0, 0
        self.end = min(source.size, HEADER)
        self.whole = self.end == source.size
        self.mapped, _ = source.piece(0, self.end)

    def counts(self) -> tuple[int, int]:
        """Check magic and version; return the numbers of tensors and of keys."""
        if self.mapped[:4] != b"GGUF":
            raise WeightsError(f"{self.path} is no GGUF file: it begins with {self.mapped[:4]!r}")
        self.place = 4
        version = self.number(_SHORT)
        if version and version % 2**16 == 0:
            raise WeightsError(f"{self.path} is a GGUF file for big-endian machines; convert it to little-endian")
        if version not in (2, 3):
            raise WeightsError(f"{self.path} has version {version} of GGUF; versions 2 and 3 can be read")
        tensors, keys = self.number(_LONG), self.number(_LONG)
        for count, what in ((tensors, "tensors"), (keys, "keys")):
            if count > ENTRIES:
                raise WeightsError(f"{self.path} claims {count:,} {what}, more than the {ENTRIES:,} believed at most")
        return tensors, keys

    def metadata(self, count: int) -> Metadata:
        found: dict[str, Value | _Array] = {}
        for _ in range(count):
            key = self.text(f"{self.path}: a key")
            where = f"{self.path}: the key {key[:100]!r}"
            if key in found:
                raise WeightsError(f"{where} is there twice; the file is damaged or made to mislead")
            found[key] = self.value(where)
        return Metadata(found)

    def value(self, where: str) -> Value | _Array:
        kind = self.number(_SHORT)
        if kind == ARRAY:
            return self.array(where)
        if kind == STRING:
            return self.text(where)
        if kind not in NUMBERS:
            raise WeightsError(f"{where} is of type {kind}, which is not known")
        found: bool | int | float = self.number(struct.Struct(f"<{NUMBERS[kind]}"))
        return found

    def array(self, where: str) -> _Array:
        kind, count = self.number(_SHORT), self.number(_LONG)
        self.elements += count
        if self.elements > ELEMENTS:
            raise WeightsError(f"{where} makes it more than the {ELEMENTS:,} array elements believed at most")
        found = _Array(self.mapped, where, kind, count, self.place)
        if kind == STRING:
            self.skip_strings(count, where)
        elif kind in NUMBERS:
            self.skip(count * struct.calcsize(f"<{NUMBERS[kind]}"), where)
        else:
            what = "of arrays, which are not supported" if kind == ARRAY else f"of type {kind}, which is not known"
            raise WeightsError(f"{where} is an array {what}")
        return found

    def tensors(self, count: int) -> dict[str, _Entry]:
        found: dict[str, _Entry] = {}
        for _ in range(count):
            entry = self.tensor()
            if entry.name in found:
                raise WeightsError(f"{self.path} has the tensor {entry.name[:100]!r} twice; it is damaged")
            found[entry.name] = entry
        return found

    def tensor(self) -> _Entry:
        name = self.text(f"{self.path}: the name of a tensor")
        where = f"{self.path}: tensor {name[:100]!r}"
        dimensions = self.number(_SHORT)
        if dimensions > 4:
            raise WeightsError(f"{where} has {dimensions:,} dimensions, more than the 4 possible")
        shape = tuple(self.number(_LONG) for _ in range(dimensions))[::-1]  # the file begins with the innermost
        code, first = self.number(_SHORT), self.number(_LONG)
        if math.prod(max(length, 1) for length in shape) >= 2**60:
            raise WeightsError(f"{where} has an impossible shape {list(shape)}")
        if code not in FORMATS:
            raise WeightsError(f"{where} is of ggml type {code}, which is not known here")
        size = FORMATS[code].size(shape)
        if size is None:
            raise WeightsError(f"{where} of shape {list(shape)} can't be made of {FORMATS[code].name} blocks")
        return _Entry(name, FORMATS[code], shape, first, size)

    def number(self, layout: struct.Struct) -> Any:
        first = self.place
        self.skip(layout.size, f"{self.path}: the header")
        return layout.unpack_from(self.mapped, first)[0]

    def text(self, where: str) -> str:
        length = self.number(_LONG)
        first = self.place
        self.skip(length, where)
        try:
            return self.mapped[first : self.place].decode()
        except UnicodeDecodeError:
            raise WeightsError(f"{where} is not UTF-8 (it begins at byte {first:,})") from None

    def skip_strings(self, count: int, where: str) -> None:
        place, mapped, length_at = self.place, self.mapped, _LONG.unpack_from
        try:
            for _ in range(count):
                place += 8 + length_at(mapped, place)[0]
        except (struct.error, OverflowError):  # beyond the file, or beyond all addresses
            place += 8
        self.skip(place - self.place, where)

    def skip(self, count: int, where: str) -> None:
        """Go on by so many bytes, which must be there."""
        if count > self.end - self.place:
            most = "its end" if self.whole else "the most that is read of a header"
            raise WeightsError(f"{where} is cut off or damaged: it goes beyond byte {self.end:,} of the file, {most}")
        self.place += count


def _open(path: Path) -> _Source:
    try:
        source = _Source(path)
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror}") from None
    if source.size < 24:
        raise WeightsError(f"{path} is cut off or no GGUF file: it has {source.size} bytes")
    return source


def _brief(value: Value) -> str:
    return "an array" if isinstance(value, tuple) else repr(value)[:40]


def _check_layout(path: Path, entries: Iterable[_Entry], alignment: int, size: int) -> None:
    """Each tensor must begin at a multiple of the alignment, behind the one before it, and end in the file."""
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.first, entry.size)):
        where = f"{path}: tensor {entry.name[:100]!r}"
        if entry.first % alignment:
            raise WeightsError(f"{where} begins at byte {entry.first:,}, which is no multiple of {alignment}")
        if entry.first < end:
            raise WeightsError(f"{where} begins at byte {entry.first:,}, inside the one before it")
        end = entry.first + entry.size
        if end > size:
            raise WeightsError(f"{path} is cut off: tensor {entry.name[:100]!r} ends at byte {end:,} of {size:,}")


def _read(source: _Source, dtype: torch.dtype | None, entry: _Entry) -> Tensor:
    import torch

    from polyformer.weights.dequantise import as_it_is, dequantise

    kept = as_it_is(entry.kind)
    if not entry.size:
        return torch.empty(entry.shape, dtype=kept or dtype or torch.float32, device="cpu")
    mapped, first = source.piece(entry.first, entry.size)
    if kept is not None:
        return torch.frombuffer(mapped, dtype=kept, offset=first).view(entry.shape)
    data = torch.frombuffer(mapped, dtype=torch.uint8, offset=first)
    try:
        return dequantise(
            entry.kind, data, entry.shape, dtype or torch.float32, functools.partial(_release, mapped, first)
        )
    except WeightsError as error:
        raise WeightsError(f"{source.path}: tensor {entry.name[:100]!r}: {error}") from None


def _bytes(source: _Source, entry: _Entry) -> npt.NDArray[np.uint8]:
    if not entry.size:
        return np.empty(0, dtype=np.uint8)
    mapped, first = source.piece(entry.first, entry.size)
    return np.frombuffer(mapped, dtype=np.uint8, count=entry.size, offset=first)


def _release(mapped: mmap.mmap, first: int, count: int) -> None:
    """Let go of the memory of pages that were read, so that file and model are not both in memory."""
    pages = (first + count) // mmap.PAGESIZE
    if pages and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, 0, pages * mmap.PAGESIZE)
