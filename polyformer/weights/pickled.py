"""PyTorch's own files (`pytorch_model.bin`), read as data: nothing in them is ever looked up or called.

A pickle is a program for a small stack machine that may name any function and call it. A file of weights needs two
dozen of its instructions and a handful of names; here these few are interpreted, and everything else is refused by
its name. PyTorch's restricted loader would also do, but it can't map the older of the two layouts into memory, and
some of what it allows makes objects of any size.

Both layouts hold one pickle, whose tensors refer to storages by key, and the storages' bytes:

- since PyTorch 1.6 a zip archive of uncompressed members `NAME/data.pkl` and `NAME/data/KEY`;
- before, four pickles (a magic number, a version, the machine's sizes, the tensors), the list of keys, and for each
  key its count of elements and its bytes.
"""

from __future__ import annotations

import functools
import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from polyformer.errors import WeightsError
from polyformer.weights.files import TensorMap
from polyformer.weights.folders import member

PICKLE = "pytorch_model.bin"
LIMIT, MOST = 8 * 2**20, 2**19
"""Bytes of instructions, and their count, that are read at most: enough for twenty thousand tensors."""

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
DTYPES = {
    "torch BFloat16Storage": torch.bfloat16,
    "torch BoolStorage": torch.bool,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch ShortStorage": torch.int16,
}
ORDERED, PARAMETER = "collections OrderedDict", "torch._utils _rebuild_parameter"
TENSORS = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2")
DAMAGE = (
    *(zipfile.BadZipFile, EOFError, OverflowError, RuntimeError, struct.error),  # from an archive
    *(AttributeError, LookupError, TypeError, ValueError),  # from instructions that make no sense
)
KNOWN = frozenset((*DTYPES, ORDERED, PARAMETER, *TENSORS))


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A stretch of numbers that tensors are cut from."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class _Cut:
    """A tensor: its element [i, j, …] is number `offset` + i · strides[0] + j · strides[1] … of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


Cuts = dict[str, _Cut]
Places = dict[str, tuple[int, int]]
"""For each storage its first byte in the file, and its length in bytes."""


def read_pickled(path: Path) -> TensorMap:
    """Open a pickled file of weights, or the `pytorch_model.bin` of a folder.

    Tensors of the newer layout are views of the memory-mapped file (private, so that training changes no file); those
    of the older one, which are not aligned there, are copied when they are asked for.

    Raises:
        WeightsError: no such file, a damaged one, one that names anything but tensors, compressed members, tensors
            that reach beyond their storage or repeat its elements, or that are not in one flat table.
    """
    if path.is_dir():
        path = member(path, PICKLE)
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            cuts, places = _read_zip(path, file) if zipped else _read_older(path, file)
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror}") from None
    except WeightsError:
        raise
    except DAMAGE as error:
        raise WeightsError(f"{path} is damaged, or no file of weights that PyTorch wrote") from error
    size = path.stat().st_size
    for name, cut in cuts.items():
        _check(f"{path}: tensor '{name[:100]}'", cut, places, size)
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    readers = {name: functools.partial(_read, mapped, places, cut) for name, cut in cuts.items()}
    return TensorMap(readers, lambda name: f"'{name}' of {path.name}")


def _read_zip(path: Path, file: IO[bytes]) -> tuple[Cuts, Places]:
    with zipfile.ZipFile(file) as archive:
        members = {one.filename: one for one in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise WeightsError(f"{path} has two members of one name; it is damaged or made to mislead")
        for name, one in members.items():
            if one.compress_type != zipfile.ZIP_STORED or one.compress_size != one.file_size:
                raise WeightsError(f"{path}: '{name[:100]}' is compressed, which PyTorch never does; refused")
        (pickled,) = (name for name in members if name.count("/") == 1 and name.endswith("/data.pkl"))
        if members[pickled].file_size > LIMIT:
            raise WeightsError(f"{path} has more than {LIMIT:,} bytes of pickle before any weights; refused")
        folder = pickled.removesuffix("data.pkl")
        order = members.get(f"{folder}byteorder")
        if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
            raise WeightsError(f"{path} was written on a big-endian machine; convert it there")
        cuts = _flat(path, _Machine(path).run(io.BytesIO(archive.read(pickled))))
    places = {}
    for name, one in members.items():
        if name.startswith(f"{folder}data/"):
            file.seek(one.header_offset + 26)  # where the lengths of what stands between header and bytes are
            name_length, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            places[name.removeprefix(f"{folder}data/")] = (one.header_offset + 30 + name_length + extra, one.file_size)
    return cuts, places


def _read_older(path: Path, file: IO[bytes]) -> tuple[Cuts, Places]:
    file.seek(0)
    head = io.BytesIO(file.read(LIMIT))
    magic, version, machine, found, keys = (_Machine(path).run(head) for _ in range(5))
    if magic != MAGIC or version != VERSION:
        raise WeightsError(f"{path} is no file of weights that PyTorch wrote")
    if machine["little_endian"] is not True:
        raise WeightsError(f"{path} was written on a big-endian machine; convert it there")
    cuts = _flat(path, found)
    storages = {cut.storage.key: cut.storage for cut in cuts.values()}
    places, start, size = {}, head.tell(), path.stat().st_size
    for key in keys:
        if not isinstance(key, str):
            raise TypeError("a storage without a name")
        file.seek(start)
        count = int.from_bytes(file.read(8), "little")
        places[key] = (start + 8, count * storages[key].dtype.itemsize)
        start += 8 + places[key][1]
        if start > size:
            raise WeightsError(f"{path} is cut off in the middle of its tensors")
    return cuts, places


class _Machine:
    """Runs the instructions of one pickle as far as weights need them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: IO[bytes]) -> Any:
        """Return what a pickle holds, and leave `file` behind it.

        Raises:
            WeightsError: an instruction or a name that weights don't need.
            ValueError, LookupError, TypeError, AttributeError: what is no sensible pickle.
        """
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if count > MOST:
                raise WeightsError(f"{self.path} has more than {MOST:,} instructions, too many for weights; refused")
            if operation.name not in STEPS:
                told = f"{self.path} has the pickle instruction {operation.name}"
                raise WeightsError(f"{told}, which no file of weights needs; refused")
            STEPS[operation.name](self, argument)
        (found,) = self.stack
        if self.marks:
            raise ValueError("a mark without an end")
        return found

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def above_mark(self) -> list[Any]:
        """Take what was put on the stack since the last mark."""
        return self.top(len(self.stack) - self.marks.pop())

    def top(self, count: int) -> list[Any]:
        """Take the last `count` values."""
        start = len(self.stack) - count
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def name(self, argument: str) -> None:
        """Name a class or a function."""
        if argument not in KNOWN:
            named = argument.replace(" ", ".")[:100]
            raise WeightsError(f"{self.path} asks for {named}, which no file of weights needs; refused")
        self.push(_Name(argument))

    def extend(self, items: list[Any]) -> None:
        """Put values at the end of the list below them."""
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values that follow each other into the dictionary below them."""
        if not all(isinstance(key, str) for key in items[::2]):  # a tuple nested deeply crashes Python when hashed
            raise WeightsError(f"{self.path} holds a table whose keys are not names; it is no file of weights")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def refer(self) -> None:
        """Refer to a storage: ("storage", its class, key, device, count of elements, perhaps None)."""
        kind, storage, key, _, count, *view = self.stack.pop()
        if kind != "storage" or view not in ([], [None]) or not isinstance(key, str) or not _is_count(count):
            raise ValueError("a reference to something that is no storage")
        self.push(_Storage(DTYPES[storage.name], key, count))

    def call(self) -> None:
        """Stand for the call of one of the few known functions."""
        function, arguments = self.top(2)
        if function.name == ORDERED and arguments == ():
            self.push({})
        elif function.name == PARAMETER and isinstance(arguments[0], _Cut):
            self.push(arguments[0])
        elif function.name in TENSORS and isinstance(arguments[0], _Storage):
            self.push(_Cut(*arguments[:4]))
        else:
            raise ValueError("a call that makes no tensor")

    def build(self) -> None:
        """Drop an ordered dictionary's further attributes: PyTorch notes the versions of modules there."""
        dictionary, attributes = self.top(2)
        if not isinstance(dictionary, dict) or not isinstance(attributes, dict):
            raise ValueError("an object that is no dictionary")
        self.push(dictionary)


STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.above_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.top(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.top(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.top(3))),
    "APPEND": lambda machine, _: machine.extend(machine.top(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.above_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.top(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.above_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, place: machine.push(machine.memo[place])),
    "GLOBAL": _Machine.name,
    "BINPERSID": lambda machine, _: machine.refer(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}


def _flat(path: Path, found: Any) -> Cuts:
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds no table of tensors, but something else; it is no file of weights")
    for name, cut in found.items():
        if not isinstance(cut, _Cut):
            told = f"'{name[:100]}' in {path} is no tensor"
            raise WeightsError(f"{told}: a checkpoint of training, perhaps; save its weights alone")
    return found


def _check(where: str, cut: _Cut, places: Places, size: int) -> None:
    """Refuse a tensor that is not wholly inside its storage, or whose storage is not inside the file."""
    shape, strides, storage = cut.shape, cut.strides, cut.storage
    if not (_are_counts(shape) and _are_counts(strides) and len(shape) == len(strides) and _is_count(cut.offset)):
        raise WeightsError(f"{where} has an impossible shape")
    start, length = places.get(storage.key, (0, -1))
    if length != storage.count * storage.dtype.itemsize or start + length > size:
        raise WeightsError(f"{where} refers to bytes that are not there; the file is cut off or damaged")
    elements = math.prod(shape)
    last = cut.offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if elements > storage.count or (elements and last >= storage.count):
        raise WeightsError(f"{where} is larger than its storage of {storage.count:,} elements")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= 16 and all(_is_count(value) for value in values)


def _read(mapped: Tensor, places: Places, cut: _Cut) -> Tensor:
    start, length = places[cut.storage.key]
    raw = mapped[start : start + length]
    aligned = raw if start % cut.storage.dtype.itemsize == 0 else raw.clone()
    numbers = aligned.view(cut.storage.dtype)
    return numbers.as_strided(cut.shape, cut.strides, numbers.storage_offset() + cut.offset)
