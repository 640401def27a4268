"""Safetensors files and folders of shards: read lazily, checked before a byte of them is believed.

A file is an 8-byte length, a JSON header naming each tensor's dtype, shape and bytes, and the bytes. The header is
checked in full first, since it may be damaged or hostile: no count in it can cause a large allocation.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from polyformer.errors import WeightsError
from polyformer.weights import strict_json
from polyformer.weights.folders import member, unsaved

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

BYTES_OF = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}


T = TypeVar("T")
Entry = tuple[str, tuple[int, ...], int, int]


class ReadMap(Mapping[str, T], Generic[T]):
    """Names to what is read when it is asked for; `called` is how a message should call one."""

    def __init__(self, readers: Mapping[str, Callable[[], T]], called: Callable[[str], str] = repr) -> None:
        self._readers = dict(readers)
        self.called = called

    def __getitem__(self, name: str) -> T:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers


class TensorMap(ReadMap["Tensor"]):
    """Names to tensors, each read when it is asked for."""


def called(tensors: Mapping[str, Tensor], name: str) -> str:
    """Return how a message should call a tensor: with its file and the name it has there, where that is known."""
    return tensors.called(name) if isinstance(tensors, TensorMap) else repr(name)


def read_tensors(path: Path) -> TensorMap:
    """Open a safetensors file, or a folder with `model.safetensors` or with shards and their index.

    Tensors are views of the memory-mapped file: private, so that training changes no file.

    Raises:
        WeightsError: damaged or hostile files, shards outside the folder, pickled weights, or no weights at all.
    """
    if not path.is_dir():
        return _read_file(path)
    if (path / SINGLE).exists():
        return _read_file(member(path, SINGLE))
    if (path / INDEX).exists():
        return _read_shards(path)
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if pickled:
        raise WeightsError(
            f"{path} has its weights in {pickled[0]}, a pickle: reading one can run any program hidden in it, so it "
            "is refused; polyformer convert FOLDER --from-pickle --out NEW reads it as data and runs nothing of it"
        )
    raise WeightsError(f"{path} holds no weights: neither {SINGLE} nor {INDEX}")


def read_notes(path: Path) -> dict[str, str]:
    """Return what a safetensors file says beside its tensors; raises `WeightsError` as `check_header` does."""
    check_header(path)
    with path.open("rb") as file:
        header = strict_json.parse(file.read(int.from_bytes(file.read(8), "little")), f"{path}: the header")
    notes = header.get("__metadata__", {})
    return {key: value for key, value in notes.items() if isinstance(value, str)} if isinstance(notes, dict) else {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; no two tensors may share memory.

    Args:
        notes: what else it says.
    Raises:
        WeightsError: the file can't be written (a full disk, say).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(ready, path, metadata={"format": "pt", **(notes or {})})
    except SafetensorError as error:
        cause = re.search(r"I/O error: (.*?) \(os error (\d+)\)", str(error))
        known = OSError(int(cause[2]), cause[1]) if cause else OSError(0, str(error))
        raise unsaved(path, known) from error


def check_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read and check the header of a safetensors file: each tensor's dtype (as written) and shape.

    Raises:
        WeightsError: naming the file and the tensor: truncated, a header longer than the file or than 8 MiB,
            duplicate names, an unknown dtype, sizes that don't fit, gaps or overlaps, bytes left over.
    """
    entries, _ = _read_header(path)
    return {name: (dtype, shape) for name, (dtype, shape, _, _) in entries.items()}


def _read_header(path: Path) -> tuple[dict[str, Entry], bytes]:
    """Do what `check_header` does; return each tensor's line, and the header itself."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                told = f"its header should have {length:,} bytes, but only" if size >= 8 else "only"
                raise WeightsError(
                    f"{path} is cut off or no safetensors file: {told} {max(size - 8, size % 8):,} are there"
                )
            if length > strict_json.LIMIT:
                raise WeightsError(
                    f"{path}: a header of {length:,} bytes is more than the {strict_json.LIMIT:,} allowed"
                )
            text = file.read(length)
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror}") from None
    header = strict_json.parse(text, f"{path}: the header")
    header.pop("__metadata__", None)
    entries = {name: _entry(told, f"{path}: tensor '{name[:100]}'") for name, told in header.items()}
    _check_layout(path, entries, size - 8 - length)
    return entries, text


def _entry(told: Any, where: str) -> Entry:
    """Check one tensor's line of the header: (dtype, shape, first byte, byte after the last)."""
    if not isinstance(told, dict) or set(told) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{where} should have a dtype, a shape and data_offsets, and nothing else")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_OF:
        raise WeightsError(f"{where} has an unknown dtype {str(dtype)[:40]!r}")
    if not _counts(shape) or len(shape) > 16 or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise WeightsError(f"{where} has an impossible shape {str(shape)[:80]}")
    if not _counts(offsets) or len(offsets) != 2:
        raise WeightsError(f"{where} has impossible data_offsets {str(offsets)[:80]}")
    needed = math.prod(shape) * BYTES_OF[dtype]
    if offsets[1] - offsets[0] != needed:
        raise WeightsError(
            f"{where} of shape {shape} in {dtype} needs {needed:,} bytes, not {offsets[0]} to {offsets[1]}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**60 for value in values)


def _check_layout(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """The tensors must fill the file's bytes one after the other."""
    end = 0
    for name, (_, _, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if first < end:
            raise WeightsError(f"{path}: tensor '{name[:100]}' begins at byte {first:,}, inside the one before it")
        if first > end:
            raise WeightsError(f"{path}: {first - end:,} bytes before tensor '{name[:100]}' belong to none")
        if last > size:
            raise WeightsError(
                f"{path} is cut off: tensor '{name[:100]}' ends at byte {last:,} of the {size:,} there are"
            )
        end = last
    if end != size:
        raise WeightsError(f"{path}: {size - end:,} bytes after the last tensor belong to none")


def _read_file(path: Path) -> TensorMap:
    from safetensors import SafetensorError, safe_open

    known = check_header(path)
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} can't be read: {error}") from error

    def called(name: str) -> str:
        return f"'{name}' of {path.name}"

    return TensorMap({name: functools.partial(file.get_tensor, name) for name in known}, called)


def _read_shards(folder: Path) -> TensorMap:
    place = _placed(folder)
    shards = {file: _read_file(file) for file in set(place.values())}
    readers = {name: functools.partial(shards[file].__getitem__, name) for name, file in place.items()}
    return TensorMap(readers, lambda name: shards[place[name]].called(name))


def _placed(folder: Path) -> dict[str, Path]:
    """Return in which shard each tensor is, by the index, with which the shards must agree."""
    path = member(folder, INDEX)
    place = strict_json.read(path).get("weight_map")
    if not isinstance(place, dict) or not all(isinstance(shard, str) for shard in place.values()):
        raise WeightsError(f"{path} should have a weight_map from tensor names to file names")
    shards = {}
    for name in sorted(set(place.values())):
        shard = member(folder, name)
        if not shard.is_file():
            raise WeightsError(f"{folder} lacks {name}, which {INDEX} names")
        shards[name] = check_header(shard)
    for name, file in place.items():
        if name not in shards[file]:
            raise WeightsError(f"{path} says that {file} holds '{name[:100]}', but it doesn't")
    for file, held in shards.items():
        for name in held:
            if place.get(name) != file:
                raise WeightsError(f"{folder / file} holds '{name[:100]}', which {INDEX} does not place there")
    return {name: member(folder, file) for name, file in place.items()}


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a folder as its files hold them.

    Attributes:
        types: the dtype of each as the files write it, and its shape.
        stored: the bytes of each.
        headers: those of the files, which say all but what is in the tensors.
    """

    types: Mapping[str, tuple[str, tuple[int, ...]]]
    stored: ReadMap[npt.NDArray[np.uint8]]
    headers: tuple[bytes, ...]


def read_stored(folder: Path) -> StoredTensors | None:
    """Open the safetensors files of a folder as `read_tensors` does, but for their bytes; None if there are none.

    Nothing here needs PyTorch, and a tensor is in memory no longer than somebody refers to it.

    Raises:
        WeightsError: damaged or hostile files, shards outside the folder.
    """
    if (folder / SINGLE).exists():
        files = [member(folder, SINGLE)]
    elif (folder / INDEX).exists():
        files = sorted(set(_placed(folder).values()))
    else:
        return None
    types: dict[str, tuple[str, tuple[int, ...]]] = {}
    readers: dict[str, Callable[[], npt.NDArray[np.uint8]]] = {}
    headers = []
    for file in files:
        entries, header = _read_header(file)
        headers.append(header)
        for name, (dtype, shape, first, last) in entries.items():
            types[name] = dtype, shape
            readers[name] = functools.partial(_bytes, file, 8 + len(header) + first, last - first)
    return StoredTensors(types, ReadMap(readers), tuple(headers))


def _bytes(file: Path, first: int, size: int) -> npt.NDArray[np.uint8]:
    import numpy as np

    if not size:
        return np.empty(0, dtype=np.uint8)
    try:
        return np.memmap(file, dtype=np.uint8, mode="r", offset=first, shape=(size,))
    except (OSError, ValueError) as error:  # ValueError: the file became shorter
        raise WeightsError(f"{file} can't be read: {error}") from None
