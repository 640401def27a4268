"""Reading SentencePiece models: the few fields of their protocol buffers that are needed, within bounds."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from polyformer.errors import DataError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LONGEST_PIECE = 256  # characters; published ones have 32 at most
_LARGEST = 32 << 20  # bytes; published ones have 5 MB at most


class SentencePieceModel(NamedTuple):
    """What a SentencePiece model holds (`sentencepiece_model.proto` names the fields).

    Attributes:
        pieces, scores, kinds: of each token, by id.
        model: `UNIGRAM` or `BPE`.
        byte_fallback: whether unknown characters are written as the tokens of their bytes.
        unk, bos, eos: ids; −1 for none.
        charsmap: the compiled table of the normalizer.
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    model: int
    byte_fallback: bool
    unk: int
    bos: int
    eos: int
    charsmap: bytes


def read_model(data: bytes, name: str) -> SentencePieceModel:
    """Read a SentencePiece model.

    Raises:
        DataError: it is truncated or no such file, has no pieces, or is of a kind that has no subwords.
    """
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, int] = {}
    charsmap = b""
    if len(data) > _LARGEST:
        raise DataError(f"{name} is larger than {_LARGEST:,} bytes, so it is no SentencePiece model")
    try:
        for field, value in _fields(data):
            if field == 1:
                piece, score, kind = "", 0.0, NORMAL
                for inner, said in _fields(_bytes(value)):
                    if inner == 1:
                        piece = _bytes(said).decode("utf-8")
                    elif inner == 2:
                        score = struct.unpack("<f", struct.pack("<I", _number(said)))[0]
                    elif inner == 3:
                        kind = _number(said)
                if len(piece) > LONGEST_PIECE:
                    raise ValueError(f"a piece of {len(piece):,} characters")
                pieces.append(piece)
                scores.append(score)
                kinds.append(kind)
            elif field == 2:
                trainer |= {inner: said for inner, said in _fields(_bytes(value)) if isinstance(said, int)}
            elif field == 3:
                charsmap = next((_bytes(said) for inner, said in _fields(_bytes(value)) if inner == 2), b"")
    except (ValueError, struct.error) as error:
        raise DataError(f"{name} is no SentencePiece model: {error}") from None
    model = trainer.get(3, UNIGRAM)
    if not pieces:
        raise DataError(f"{name} is no SentencePiece model: it has no pieces")
    if model not in (UNIGRAM, BPE):
        raise DataError(f"{name} is a SentencePiece model of words or characters; only unigram and BPE can be read")
    ids = {key: _signed(trainer.get(key, default)) for key, default in ((40, 0), (41, 1), (42, 2))}
    for number in ids.values():
        if not -1 <= number < len(pieces):
            raise DataError(f"{name} names the control token {number} of only {len(pieces):,}")
    return SentencePieceModel(
        pieces, scores, kinds, model, bool(trainer.get(35, 0)), ids[40], ids[41], ids[42], charsmap
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field of a message; fixed-width numbers as the integers of their bits."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        sort = key & 7
        if sort == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if sort == 2:
            size, at = _varint(data, at)
        elif sort in (1, 5):
            size = 8 if sort == 1 else 4
        else:
            raise ValueError(f"a field of unknown sort {sort} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"a field at byte {at} ends behind the file")
        part = data[at : at + size]
        at += size
        yield key >> 3, part if sort == 2 else int.from_bytes(part, "little")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    found = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"a number at byte {at} doesn't end")
        byte = data[at]
        at += 1
        found |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return found, at


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text should be")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number should be")
    return value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
