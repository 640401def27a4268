"""Safetensors files as strangers may send them: read exactly, or refused by name, at once and without memory."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from polyformer.errors import WeightsError
from polyformer.weights.files import INDEX, SINGLE, check_header, read_tensors, write_tensors

Edit = Callable[[dict[str, Any]], Any]


def raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def two_tensors() -> dict[str, Any]:
    return {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "transposed": torch.randn(4, 2).T}
    whole = torch.randn(6, 2)
    tensors |= {"q": whole[:3], "k": whole[3:]}
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = read_tensors(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {})
    assert len(read_tensors(tmp_path / "x.safetensors")) == 0


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(4)})
    read_tensors(tmp_path / "x.safetensors")["a"].zero_()
    assert read_tensors(tmp_path / "x.safetensors")["a"].equal(torch.ones(4))


def bad_headers() -> dict[str, tuple[Edit, str]]:
    def change(name: str, **values: Any) -> Edit:
        return lambda header: header[name].update(values)

    return {
        "unknown dtype": (change("b", dtype="F13"), "tensor 'b' has an unknown dtype 'F13'"),
        "dtype no text": (change("b", dtype=["F32"]), "tensor 'b' has an unknown dtype"),
        "overlap": (change("b", data_offsets=[20, 28]), "tensor 'b' begins at byte 20, inside"),
        "gap": (change("a", data_offsets=[0, 20], shape=[5]), "4 bytes before tensor 'b'"),
        "beyond the end": (change("b", data_offsets=[24, 40], shape=[8]), "cut off: tensor 'b' ends at byte 40"),
        "far beyond": (change("b", data_offsets=[24, 24 + 2**51], shape=[2**50]), "cut off: tensor 'b'"),
        "left over": (lambda header: header.pop("b"), "8 bytes after the last tensor"),
        "wrong size": (change("a", shape=[2, 4]), r"tensor 'a' of shape \[2, 4\] in F32 needs 32 bytes"),
        "huge shape": (change("a", shape=[2**40, 2**40]), "tensor 'a' has an impossible shape"),
        "many dimensions": (change("a", shape=[1] * 100), "tensor 'a' has an impossible shape"),
        "hidden by a zero": (change("a", shape=[0, 2**59, 2**59]), "tensor 'a' has an impossible shape"),
        "negative shape": (change("a", shape=[-2, -3]), "tensor 'a' has an impossible shape"),
        "true as a size": (change("a", shape=[True, 6]), "tensor 'a' has an impossible shape"),
        "fractional": (change("a", shape=[2.0, 3]), "tensor 'a' has an impossible shape"),
        "backwards": (change("a", data_offsets=[24, 0]), "tensor 'a' of shape"),
        "negative offset": (change("a", data_offsets=[-24, 0]), "tensor 'a' has impossible data_offsets"),
        "three offsets": (change("a", data_offsets=[0, 12, 24]), "tensor 'a' has impossible data_offsets"),
        "extra key": (change("a", code="x"), "tensor 'a' should have a dtype, a shape and data_offsets"),
        "no table": (lambda header: header.update(a=[1]), "tensor 'a' should have a dtype"),
    }


@pytest.mark.parametrize("case", bad_headers())
def test_bad_headers_name_the_file_and_the_tensor(tmp_path: Path, case: str) -> None:
    edit, message = bad_headers()[case]
    header = two_tensors()
    edit(header)
    path = raw(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(32))
    with pytest.raises(WeightsError, match=f"x.safetensors.*{message}"):
        read_tensors(path)


def bad_files() -> dict[str, tuple[bytes, str]]:
    good = json.dumps(two_tensors()).encode()
    size = struct.pack("<Q", len(good))
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    twice = b"{" + entry + b"," + entry + b"}"
    within = b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}'
    many = b"{" + b",".join(b'"%d":0' % (n % 90_000) for n in range(180_000)) + b"}"
    deep = b"[" * 500_000
    number = b'{"a":' + b"9" * 100_000 + b"}"
    return {
        "empty": (b"", "cut off"),
        "seven bytes": (b"1234567", "cut off"),
        "cut in the header": (size + good[:-5], "cut off"),
        "cut in the data": (size + good + bytes(31), "cut off: tensor 'b' ends at byte 32"),
        "bytes behind": (size + good + bytes(33), "1 bytes after the last tensor"),
        "header longer than the file": (struct.pack("<Q", 2**63) + good, "cut off"),
        "oversized header": (struct.pack("<Q", 9 * 2**20) + bytes(9 * 2**20), "more than the"),
        "not UTF-8": (struct.pack("<Q", 2) + b"\xff\xfe", "not UTF-8 at byte 0"),
        "not JSON": (struct.pack("<Q", 5) + b"{'a'}", "not JSON"),
        "a list": (struct.pack("<Q", 2) + b"[]", "should hold a JSON object"),
        "a tensor twice": (struct.pack("<Q", len(twice)) + twice + bytes(4), "'a' twice"),
        "a dtype twice": (struct.pack("<Q", len(within)) + within + bytes(4), "'dtype' twice"),
        "many twice": (struct.pack("<Q", len(many)) + many, "twice"),
        "nested deeply": (struct.pack("<Q", len(deep)) + deep, "nested too deeply"),
        "a huge number": (struct.pack("<Q", len(number)) + number, "not usable JSON"),
    }


@pytest.mark.parametrize("case", bad_files())
def test_damaged_files_are_refused_quickly(tmp_path: Path, case: str) -> None:
    content, message = bad_files()[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(WeightsError, match=f"x.safetensors.*{message}"):
        read_tensors(path)
    assert time.process_time() - started < 5


def test_no_large_allocation_for_a_lying_file(tmp_path: Path) -> None:
    header = two_tensors()
    header["b"] = {"dtype": "F16", "shape": [2**45], "data_offsets": [24, 24 + 2**46]}
    path = raw(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(32))
    sparse = tmp_path / "y.safetensors"
    sparse.write_bytes(struct.pack("<Q", 2**40))
    os.truncate(sparse, 2**40 + 16)
    tracemalloc.start()
    for one in (path, sparse):
        with pytest.raises(WeightsError):
            read_tensors(one)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@given(st.data())
def test_a_flipped_or_cut_file_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4).half()}, path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, 150))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) - 40, len(content)))])
    try:
        dict(read_tensors(path))
    except WeightsError as error:
        assert "flipped.safetensors" in str(error)  # noqa: PT017


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"x\.safetensors can't be read: No such file"):
        check_header(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="holds no weights"):
        read_tensors(tmp_path)


def test_writing_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"x.safetensors could not be saved: No such file or directory; see that"):
        write_tensors(tmp_path / "missing" / "x.safetensors", {"a": torch.ones(1)})


# ---------------------------------------------------------------------------------------------------------------
# Folders of shards


def shards(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    own = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": own | (weight_map or {})}))
    return folder


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    found = read_tensors(shards(tmp_path))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [1, 1], "b": [0, 0, 0]}
    assert found.called("b") == "'b' of model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "", "a\0b"])
def test_a_weight_map_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="not inside the folder"):
        read_tensors(shards(tmp_path / "in", {"a": name}))


@pytest.mark.parametrize("linked", [SINGLE, INDEX, "model-00001-of-00002.safetensors"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, linked: str) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    shards(inside)
    if linked == SINGLE:
        save_file({"a": torch.ones(2)}, tmp_path / linked)
    else:
        (inside / linked).rename(tmp_path / linked)
    (inside / linked).symlink_to(tmp_path / linked)
    with pytest.raises(WeightsError, match=f"{linked} is a link out of its folder"):
        read_tensors(inside)


def test_links_within_a_folder_and_within_a_cache_are_followed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "real.safetensors")
    (tmp_path / SINGLE).symlink_to("real.safetensors")
    assert set(read_tensors(tmp_path)) == {"a"}
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "1234")
    (snapshot / SINGLE).symlink_to("../../blobs/1234")
    assert set(read_tensors(snapshot)) == {"a"}
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../../real.safetensors")
    with pytest.raises(WeightsError, match="link out of its folder"):
        read_tensors(snapshot)


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    shards(tmp_path, {"c": "model-00001-of-00002.safetensors"})
    with pytest.raises(WeightsError, match="holds 'c', but it doesn't"):
        read_tensors(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert set(read_tensors(tmp_path)) == {"a"}
    save_file({"a": torch.ones(2), "more": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match="holds 'more', which"):
        read_tensors(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="lacks model-00001-of-00002"):
        read_tensors(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(WeightsError, match="should have a weight_map"):
        read_tensors(tmp_path)


def test_pickled_weights_are_refused_with_a_reason(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        WeightsError, match=r"pytorch_model\.bin, a pickle.*any program.*polyformer convert FOLDER --from-pickle"
    ):
        read_tensors(tmp_path)
