"""Pickled weights, read as data: both layouts, and files that are damaged or up to no good."""

from __future__ import annotations

import io
import os
import pickle
import random
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyformer.errors import WeightsError
from polyformer.weights.files import read_tensors
from polyformer.weights.pickled import PICKLE, read_pickled

layouts = pytest.mark.parametrize("newer", [True, False], ids=["zip", "older"])


def saved(path: Path, content: Any, newer: bool = True) -> Path:
    """Save as PyTorch does, in either layout."""
    torch.save(content, path, _use_new_zipfile_serialization=newer)
    return path


def weights() -> dict[str, Tensor]:
    """Tensors of all kinds: tied, cut from others, transposed, of one number, of none."""
    base = torch.randn(4, 6)
    kinds = (
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    found = {str(kind): torch.arange(5).to(kind) for kind in kinds}
    return found | {
        "bool": torch.tensor([True, False]),
        "cut": base[1:3, 2:],
        "empty": torch.empty(0, 3),
        "one": torch.tensor(3.5),
        "parameter": nn.Parameter(torch.ones(2)),
        "tied": base,
        "transposed": base.T,
        "whole": base,
    }


@layouts
def test_every_tensor_comes_back(newer: bool, tmp_path: Path) -> None:
    wanted = weights()
    found = read_pickled(saved(tmp_path / "w.bin", OrderedDict(wanted), newer))
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].equal(tensor.detach()), name
    assert found.called("cut") == "'cut' of w.bin"


@layouts
def test_a_module_s_state(newer: bool, tmp_path: Path) -> None:
    """State dictionaries carry the versions of their modules beside their tensors."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = read_pickled(saved(tmp_path / "w.bin", module.state_dict(), newer))
    assert all(found[name].equal(tensor) for name, tensor in module.state_dict().items())
    assert len(found) == len(module.state_dict())


def test_the_newer_layout_is_mapped(tmp_path: Path) -> None:
    """Nothing is copied, and writing into a tensor changes no file."""
    path = saved(tmp_path / "w.bin", {"w": torch.ones(1000)})
    before = path.read_bytes()
    first, again = read_pickled(path), read_pickled(path)
    assert first["w"].data_ptr() == first["w"].data_ptr()
    first["w"].zero_()
    assert again["w"].equal(torch.ones(1000))
    assert path.read_bytes() == before


def test_a_folder_s_pickle_is_read_when_asked_for(tmp_path: Path) -> None:
    saved(tmp_path / PICKLE, {"w": torch.ones(2)})
    with pytest.raises(WeightsError, match="a pickle: reading one can run any program"):
        read_tensors(tmp_path)
    assert read_pickled(tmp_path)["w"].equal(torch.ones(2))
    with pytest.raises(WeightsError, match=r"w\.bin can't be read: No such file"):
        read_pickled(tmp_path / "w.bin")


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / PICKLE).symlink_to(saved(tmp_path / "w.bin", {"w": torch.ones(2)}))
    with pytest.raises(WeightsError, match="is a link out of its folder"):
        read_pickled(tmp_path / "in")


class Evil:
    """Makes whoever unpickles it run a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


@layouts
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": Evil()}, r"asks for \w+\.system, which no file of weights needs; refused"),
        (Evil(), r"asks for \w+\.system"),
        (nn.Linear(2, 2), r"asks for torch\.nn\.modules\.linear\.Linear"),
        ({"w": bytearray(3)}, r"asks for __builtin__\.bytearray"),
        ({"model": {"w": torch.ones(2)}, "epoch": 3}, r"'model' in .* is no tensor: a checkpoint of training, perhaps"),
        ([torch.ones(2)], "holds no table of tensors"),
        ({3: torch.ones(2)}, "keys are not names"),
        ({"w": torch.ones(1).expand(1000)}, "tensor 'w' is larger than its storage of 1 elements"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_is_no_table_of_weights(content: Any, message: str, newer: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.bin", content, newer)
    with pytest.raises(WeightsError, match=message):
        read_pickled(path)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    """A few bytes of a bomb become gigabytes."""
    source = zipfile.ZipFile(saved(tmp_path / "w.bin", {"w": torch.zeros(10**6)}))
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as bomb:
        for one in source.namelist():
            bomb.writestr(one, source.read(one))
    assert (tmp_path / "bomb.bin").stat().st_size < 10**5
    with pytest.raises(WeightsError, match="is compressed, which PyTorch never does"):
        read_pickled(tmp_path / "bomb.bin")


def packed(path: Path, instructions: bytes, storage: bytes = b"\0" * 16, **members: bytes) -> Path:
    """A file of the newer layout with any instructions and one storage, "0"."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": instructions, "data/0": storage, **members}.items():
            archive.writestr(f"w/{name}", content)
    return path


def instructions(count: int, offset: Any, shape: Any, strides: Any) -> bytes:
    """A pickle of one tensor that says anything of itself."""

    class Storage:
        pass

    class Cut:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(thing, Storage) else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"w": Cut()})
    return file.getvalue()


def test_a_tensor_as_it_should_be(tmp_path: Path) -> None:
    assert read_pickled(packed(tmp_path / "w.bin", instructions(4, 1, (3,), (1,))))["w"].equal(torch.zeros(3))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((4, 0, (5,), (1,)), "is larger than its storage of 4 elements"),
        ((4, 2, (3,), (1,)), "is larger than its storage of 4 elements"),
        ((4, 0, (2, 2), (1, 9)), "is larger than its storage"),
        ((4, 0, (2**62,), (0,)), "has an impossible shape"),
        ((4, 0, (2**40,), (0,)), "is larger than its storage"),
        ((4, 0, (-1,), (1,)), "has an impossible shape"),
        ((4, -1, (1,), (1,)), "has an impossible shape"),
        ((4, 0, (1, 1), (1,)), "has an impossible shape"),
        ((4, 0, (1.5,), (1,)), "has an impossible shape"),
        ((4, 0, (1,) * 17, (1,) * 17), "has an impossible shape"),
        ((4, 0, "ab", "ab"), "has an impossible shape"),
        ((2**50, 0, (2**50,), (1,)), "refers to bytes that are not there"),
        ((3, 0, (3,), (1,)), "refers to bytes that are not there"),
        ((-1, 0, (1,), (1,)), "is damaged, or no file of weights"),
    ],
)
def test_tensors_that_are_not_inside_their_storage(said: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        read_pickled(packed(tmp_path / "w.bin", instructions(*said)))


NESTED = b"\x80\x02}" + b")" + b"\x85" * 10**6
"""An empty tuple in a tuple in a tuple …, a million times."""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02}h\x07.",
        b"\x80\x02}(U",
        b"\x80\x02}X\x01\x00\x00\x00w}R.",
        NESTED + b"Ns.",
        NESTED + b"0.",
        NESTED + b".",
        NESTED + b"Q.",
        b"\x80\x02}" + b"(" * 10**5 + b"u.",
        b"\x80\x02" + b"]q\x00(h\x00" + b"h\x00" * 1000 + b"e.",
    ],
    ids=lambda content: str(len(content)),
)
def test_instructions_that_make_no_sense(content: bytes, tmp_path: Path) -> None:
    """No crash, no large memory, no long time."""
    start = time.process_time()
    with pytest.raises(WeightsError):
        read_pickled(packed(tmp_path / "w.bin", content))
    assert time.process_time() - start < 20


@layouts
def test_damaged_files(newer: bool, tmp_path: Path) -> None:
    """Cut off or with a changed byte anywhere before the numbers: an error of ours, or tensors of some kind."""
    whole = saved(tmp_path / "w.bin", {"w": torch.ones(40), "v": torch.zeros(3, 2)}, newer).read_bytes()
    chance, path, refused = random.Random(0), tmp_path / "damaged.bin", 0
    damaged = [whole[:end] for end in range(0, len(whole) - 1, 7)]
    for place in range(len(whole)):
        damaged.append(whole[:place] + bytes([chance.randrange(256)]) + whole[place + 1 :])
    for one in damaged:
        path.write_bytes(one)
        try:
            found = read_pickled(path)
            assert all(found[name].numel() <= len(whole) for name in found)
        except WeightsError:
            refused += 1
    assert refused > len(whole) // 7


def test_a_big_endian_machine_s_file(tmp_path: Path) -> None:
    path = packed(tmp_path / "w.bin", instructions(4, 0, (4,), (1,)), byteorder=b"big")
    with pytest.raises(WeightsError, match="big-endian machine"):
        read_pickled(path)
