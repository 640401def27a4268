"""GGUF files as strangers may send them: read exactly, or refused by name, at once and without memory."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyformer.errors import WeightsError
from polyformer.weights import gguf as under_test
from polyformer.weights.dequantise import dequantise
from polyformer.weights.gguf import read_gguf
from tests.weights.gguf_writer import FORMAT, described, gguf, head, plain, smollm2, stored, text

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "count": 7,
    "negative": -7,
    "share": 0.25,
    "yes": True,
    "words": ["a", "", "Grüße", "\0"],
    "numbers": [1, 2, 3],
    "floats": [0.5, -1.0],
    "flags": [True, False],
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_what_is_written_is_read(tmp_path: Path, version: int, alignment: int) -> None:
    tensors = {
        "a": plain(torch.randn(3, 5)),
        "b": stored("Q4_1", 2, 64),
        "c": stored("Q6_K", 3, 2, 256),
        "none": ("Q8_0", (0, 32), b""),
        "scalar": plain(torch.tensor(2.5)),
        "ids": ("I32", (3,), struct.pack("<3i", 1, -2, 3)),
        "half": ("F16", (2, 3), torch.arange(6).half().numpy().tobytes()),
    }
    metadata = {"general.alignment": alignment, **METADATA}
    file = read_gguf(write(tmp_path / "x.gguf", gguf(metadata, tensors, alignment, version)))
    assert {**file.metadata} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()
    }
    assert type(file.metadata["yes"]) is bool
    assert file.types == {name: (kind, shape) for name, (kind, shape, _) in tensors.items()}
    assert set(file.tensors) == set(tensors)
    for name, (kind, shape, content) in tensors.items():
        found = file.tensors[name]
        data = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)]
        whole = kind.startswith("I")
        assert found.shape == shape
        assert found.dtype == (torch.int32 if whole else torch.float32)
        assert found.equal(dequantise(FORMAT[kind], data, shape).to(found.dtype))
    assert file.tensors.called("b") == "'b' of x.gguf"


def test_every_type_of_value(tmp_path: Path) -> None:
    values = {"B": 200, "b": -100, "H": 60000, "h": -30000, "I": 2**32 - 1, "i": -(2**31), "f": 0.5, "Q": 2**64 - 1}
    values |= {"q": -(2**63), "d": 1e300}
    kinds = dict(zip(values, (0, 1, 2, 3, 4, 5, 6, 10, 11, 12), strict=True))
    raw = {code: struct.pack(f"<I{code}", kinds[code], value) for code, value in values.items()}
    arrays = {code * 2: struct.pack(f"<IIQ2{code}", 9, kinds[code], 2, value, value) for code, value in values.items()}
    file = read_gguf(write(tmp_path / "x.gguf", gguf(raw | arrays, {})))
    assert {**file.metadata} == values | {code * 2: (value, value) for code, value in values.items()}


def test_the_package_writes_and_we_read(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    writer = package.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_context_length(2048)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "ü"])
    writer.add_token_scores([0.0, -1.0, 0.5])
    one, two = torch.randn(4, 6), torch.randn(4, 64)
    packed = package.quants.quantize(two.numpy(), package.GGMLQuantizationType.Q5_1)
    writer.add_tensor("one", one.numpy())
    writer.add_tensor("two", packed, raw_dtype=package.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "x.gguf")
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.context_length"] == 2048
    assert file.metadata["tokenizer.ggml.tokens"] == ("a", "b", "ü")
    assert file.metadata["tokenizer.ggml.scores"] == (0.0, -1.0, 0.5)
    assert file.types == {"one": ("F32", (4, 6)), "two": ("Q5_1", (4, 64))}
    assert file.tensors["one"].equal(one)
    wanted = package.quants.dequantize(packed, package.GGMLQuantizationType.Q5_1)
    assert file.tensors["two"].equal(torch.from_numpy(wanted))


# ---------------------------------------------------------------------------------------------------------------
# Memory


def test_another_dtype_is_for_what_must_be_converted(tmp_path: Path) -> None:
    tensors = {"norm": plain(torch.randn(4)), "b": stored("Q4_1", 2, 64), "i": ("I8", (1,), b"\5")}
    tensors["half"] = ("F16", (2,), torch.ones(2).half().numpy().tobytes())
    path = write(tmp_path / "x.gguf", gguf({}, tensors))
    file, single = read_gguf(path, torch.bfloat16), read_gguf(path)
    dtypes = {name: tensor.dtype for name, tensor in file.tensors.items()}
    assert dtypes == {"norm": torch.float32, "b": torch.bfloat16, "i": torch.int8, "half": torch.bfloat16}
    assert file.tensors["b"].equal(single.tensors["b"].bfloat16())


def test_writing_to_a_loaded_tensor_leaves_the_file_and_its_neighbours_alone(tmp_path: Path) -> None:
    tensors = {"a": plain(torch.ones(8)), "b": stored("Q8_0", 300, 32), "c": plain(torch.ones(8))}
    path = write(tmp_path / "x.gguf", gguf({}, tensors))
    content = path.read_bytes()
    file = read_gguf(path)
    first, last = file.tensors["a"].zero_(), file.tensors["c"].zero_()
    before = file.tensors["b"].clone()
    assert not first.any()  # reading b lets go of pages, but not of those that a and c are on
    assert not last.any()
    assert path.read_bytes() == content
    assert read_gguf(path).tensors["b"].equal(before)


def test_a_tensor_asked_for_twice_in_turns_is_in_memory_once(tmp_path: Path) -> None:
    tensors = {name: stored("Q8_0", 2, 32) for name in "abc"}
    file = read_gguf(write(tmp_path / "x.gguf", gguf({}, tensors)))
    first, other = file.tensors["a"], file.tensors["b"]
    assert file.tensors["a"].data_ptr() == first.data_ptr()
    assert file.tensors["b"].data_ptr() == other.data_ptr()


PEAK = """
import sys, torch
from pathlib import Path
from polyformer.weights.gguf import read_gguf

def kib(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])

dtype = getattr(torch, sys.argv[2])
warm = read_gguf(Path(sys.argv[1]), dtype).tensors["small"]
open("/proc/self/clear_refs", "w").write("5")  # forget the highest memory so far
before = kib("VmRSS")
tensors = dict(read_gguf(Path(sys.argv[1]), dtype).tensors)
size = sum(tensor.nbytes for tensor in tensors.values())
print((kib("VmHWM") - before) * 1024 / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the highest memory of a process is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_file_and_model_are_not_both_in_memory(tmp_path: Path, dtype: str) -> None:
    tensors = {"small": stored("Q8_0", 4, 32), "norm": plain(torch.ones(2**18)), "large": stored("Q8_0", 2**15, 1024)}
    path = write(tmp_path / "x.gguf", gguf({}, tensors))
    command = [sys.executable, "-c", PEAK, str(path), dtype]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=alone)
    assert float(done.stdout) < 1.15


# ---------------------------------------------------------------------------------------------------------------
# Damaged and hostile files


def tensor_file(*entries: bytes, data: int = 1024, metadata: bytes = b"", keys: int = 0) -> bytes:
    """A file with these descriptions of tensors."""
    found = head(len(entries), keys) + metadata + b"".join(entries)
    return found + bytes(-len(found) % 32) + bytes(data)


def key_file(*values: bytes, key: bytes = b"k") -> bytes:
    """A file with these typed values."""
    return head(0, len(values)) + b"".join(text(key + b"%d" % i) + value for i, value in enumerate(values))


def typed(kind: int, content: bytes) -> bytes:
    return struct.pack("<I", kind) + content


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return typed(9, struct.pack("<IQ", kind, count) + content)


GOOD = gguf(METADATA, {"a": plain(torch.ones(4)), "b": stored("Q4_0", 32)})
VALUE = typed(4, bytes(4))
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut off or no GGUF file: it has 0 bytes"),
    "short": (GOOD[:23], "cut off or no GGUF file"),
    "another file": (b"PK\3\4" + GOOD[4:], r"no GGUF file: it begins with b'PK"),
    "the format before": (head(0, 0, magic=b"tjgg"), "no GGUF file"),
    "version 1": (head(0, 0, 1), "has version 1 of GGUF; versions 2 and 3"),
    "version 4": (head(0, 0, 4), "has version 4 of GGUF"),
    "version 0": (head(0, 0, 0), "has version 0 of GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "big-endian"),
    "tensors": (head(2**40, 0), "claims 1,099,511,627,776 tensors"),
    "keys": (head(0, 2**63), "claims 9,223,372,036,854,775,808 keys"),
    "cut in a key": (GOOD[:36], "a key is cut off or damaged: it goes beyond byte 36 of the file, its end"),
    "cut in the metadata": (GOOD[:80], "cut off or damaged"),
    "cut in the descriptions": (GOOD[: GOOD.index(b"\1\0\0\0\0\0\0\0b") + 12], "cut off or damaged"),
    "cut in the data": (GOOD[:-40], "is cut off: tensor 'b' ends at byte"),
    "key twice": (head(0, 2) + (text("k") + VALUE) * 2, "the key 'k' is there twice"),
    "long key": (head(0, 1) + struct.pack("<Q", 2**62) + bytes(99), "a key is cut off or damaged"),
    "key not UTF-8": (head(0, 1) + text(b"\xff\xfe") + VALUE, "a key is not UTF-8"),
    "long text": (key_file(typed(8, struct.pack("<Q", 2**64 - 1))), "'k0' is cut off or damaged"),
    "text not UTF-8": (key_file(typed(8, text(b"\xc3"))), "'k0' is not UTF-8"),
    "unknown type": (key_file(typed(13, bytes(8))), "'k0' is of type 13, which is not known"),
    "huge array": (key_file(array(4, 2**40)), "'k0' makes it more than the 2,097,152 array elements"),
    "huge array of texts": (key_file(array(8, 2**62)), "'k0' makes it more than"),
    "many arrays": (key_file(*[array(0, 2**20, bytes(2**20))] * 3), "'k2' makes it more than"),
    "array beyond the end": (key_file(array(12, 1000)), "'k0' is cut off or damaged"),
    "texts beyond the end": (key_file(array(8, 3, text("a") * 2)), "'k0' is cut off or damaged"),
    "texts beyond all": (key_file(array(8, 3, (b"\xff" * 8) * 9)), "'k0' is cut off or damaged"),
    "array in an array": (key_file(array(9, 1, array(4, 0))), "'k0' is an array of arrays"),
    "array of what": (key_file(array(77, 1, bytes(8))), "'k0' is an array of type 77"),
    "alignment 0": (gguf({"general.alignment": 0}, {}), "general.alignment = 0 is no power of two"),
    "alignment 48": (gguf({"general.alignment": 48}, {}), "general.alignment = 48 is no power of two"),
    "alignment 4": (gguf({"general.alignment": 4}, {}), "general.alignment = 4 is no power of two"),
    "alignment a word": (gguf({"general.alignment": "x" * 999}, {}), "general.alignment = 'x+ is no power of two"),
    "far alignment": (gguf({"general.alignment": 2**31}, {"a": plain(torch.ones(1))}), "cut off: tensor 'a'"),
    "a part": (gguf({"split.count": 3}, {}), "one of 3 parts of a model; join them: llama"),
    "tensor twice": (tensor_file(*[described("a", (4,), 0, 0)] * 2), "the tensor 'a' twice"),
    "dimensions": (tensor_file(described("a", (1,) * 5, 0, 0)), "'a' has 5 dimensions"),
    "many dimensions": (tensor_file(text("a") + b"\xff" * 4), "'a' has 4,294,967,295 dimensions"),
    "shape": (tensor_file(described("a", (2**31, 2**31), 0, 0)), "'a' has an impossible shape"),
    "shape hidden by a zero": (tensor_file(described("a", (0, 2**63), 0, 0)), "'a' has an impossible shape"),
    "ggml type": (tensor_file(described("a", (4,), 4, 0)), "'a' is of ggml type 4, which is not known here"),
    "no blocks": (tensor_file(described("a", (4, 33), 2, 0)), r"'a' of shape \[4, 33\] can't be made of Q4_0 blocks"),
    "offset": (tensor_file(described("a", (4,), 0, 4)), "'a' begins at byte .* no multiple of 32"),
    "offset beyond": (tensor_file(described("a", (4,), 0, 2**62)), "is cut off: tensor 'a' ends at"),
    "overlap": (tensor_file(described("a", (64,), 0, 0), described("b", (4,), 0, 32)), "'b' begins at .* inside"),
    "the same bytes": (tensor_file(described("a", (4,), 0, 0), described("b", (4,), 0, 0)), "'b' begins at .* inside"),
    "beyond the end": (tensor_file(described("a", (257,), 0, 0)), "is cut off: tensor 'a' ends at byte"),
    "far beyond": (tensor_file(described("a", (2**55,), 0, 0)), "is cut off: tensor 'a' ends at byte"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_quickly_and_without_memory(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = write(tmp_path / "x.gguf", content)
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(WeightsError, match=f"x.gguf.*{message}"):
            read_gguf(path)
        assert time.process_time() - started < 10
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_enormous_sparse_files(tmp_path: Path) -> None:
    cases = {
        "texts": head(0, 1) + text("k") + array(8, 2**21 - 1),
        "a text": head(0, 1) + text("k") + typed(8, struct.pack("<Q", 2**39)),
        "tensors": head(2**15, 0),
    }
    for name, content in cases.items():
        path = write(tmp_path / "x.gguf", content)
        os.truncate(path, 2**40)
        started = time.process_time()
        if name == "tensors":
            with pytest.raises(WeightsError, match="the tensor '' twice"):
                read_gguf(path)
        elif name == "texts":
            assert len(read_gguf(path).metadata) == 1  # two million empty texts are no lie
        else:
            with pytest.raises(WeightsError, match=r"beyond byte 134,217,728 of the file, the most that is read"):
                read_gguf(path)
        assert time.process_time() - started < 10, name


def test_text_in_an_array_is_checked_when_asked_for(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path / "x.gguf", key_file(array(8, 2, text("a") + text(b"\xff")))))
    assert list(file.metadata) == ["k0"]
    with pytest.raises(WeightsError, match=r"x.gguf: the key 'k0': string 1 of it is not UTF-8"):
        file.metadata["k0"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"x\.gguf can't be read: No such file"):
        read_gguf(tmp_path / "x.gguf")
    with pytest.raises(WeightsError, match="can't be read: Is a directory"):
        read_gguf(tmp_path)


def test_a_missing_package_names_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    file = read_gguf(write(tmp_path / "x.gguf", gguf({}, {"a": stored("IQ4_NL", 32)})))
    with pytest.raises(WeightsError, match=r"x\.gguf: tensor 'a': weights stored as IQ4_NL are read by the package"):
        file.tensors["a"]


@given(st.data())
def test_a_flipped_or_cut_file_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(GOOD) - 40, len(GOOD)))])
    try:
        file = read_gguf(path)
        dict(file.tensors)
        dict(file.metadata)
    except WeightsError as error:
        assert "flipped.gguf" in str(error)  # noqa: PT017


# ---------------------------------------------------------------------------------------------------------------
# Speed, and a real file


def test_a_large_vocabulary_is_opened_at_once(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(256_000)]
    metadata = {"tokens": words, "merges": [f"{word} x" for word in words], "types": [1] * len(words)}
    path = write(tmp_path / "x.gguf", gguf(metadata, {}))
    taken = []
    for _ in range(3):
        started = time.process_time()
        file = read_gguf(path)
        taken.append(time.process_time() - started)
    assert min(taken) < 0.5
    assert file.metadata["tokens"] == tuple(words)


def test_a_real_file() -> None:
    file = read_gguf(smollm2())
    assert file.metadata["general.architecture"] == "llama"
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple)
    assert len(tokens) == 49152
    assert file.types["token_embd.weight"][1] == (49152, 576)
    assert {kind for kind, _ in file.types.values()} == {"F32", "Q4_1", "Q8_0"}
    norm = file.tensors["blk.0.attn_norm.weight"]
    assert norm.shape == (576,)
    assert norm.isfinite().all()


def test_real_tensors_are_the_packages() -> None:
    package = pytest.importorskip("gguf")
    path = smollm2()
    file = read_gguf(path)
    entries = {one.name: one for one in package.GGUFReader(path).tensors}
    assert set(entries) == set(file.tensors)
    for name in ("output_norm.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight", "token_embd.weight"):
        wanted = package.quants.dequantize(entries[name].data, entries[name].tensor_type)
        assert file.tensors[name].equal(torch.from_numpy(wanted.copy())), name


def test_limits_leave_room_for_the_largest_real_files() -> None:
    assert under_test.ELEMENTS > 3 * 262_144 + 514_906  # Gemma 3's tokens, scores and types, and its merges


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", gguf({}, {"a": plain(torch.ones(2**12))}))
    file = read_gguf(path)
    os.truncate(path, 2**12)
    with pytest.raises(WeightsError, match=r"x\.gguf can't be read: mmap length is greater"):
        file.tensors["a"]


def test_a_long_array_where_a_number_should_be(tmp_path: Path) -> None:
    content = head(0, 1) + text("general.alignment") + array(8, 2**21 - 1, bytes(2**24))
    path = write(tmp_path / "x.gguf", content)
    started = time.process_time()
    with pytest.raises(WeightsError, match=r"general\.alignment = an array is no power of two"):
        read_gguf(path)
    assert time.process_time() - started < 10
