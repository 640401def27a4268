"""Reading files that a person made: what is wrong is told with file, line and byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from polyformer.errors import DataError

LONGEST_LINE = 4 << 20  # bytes; a file without line ends is refused before it fills the memory
LARGEST_FILE = 256 << 20  # bytes, of a file that is read whole


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers from 1, without their ends.

    A byte order mark is left out; lines end with LF or CRLF only, so that rare separators within a text don't
    shift the lines of parallel files.

    Raises:
        DataError: the file can't be read or is empty, a line is not UTF-8 or longer than 4 MiB.
    """
    number = 0
    try:
        with Path(path).expanduser().open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise DataError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes")
                yield number, _decode_line(line, path, number)
    except OSError as error:
        raise unreadable(path, error) from None
    if number == 0:
        raise DataError(f"{path} is empty")


def _decode_line(line: bytes, path: str | Path, number: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8"
        raise DataError(f"{path}, line {number}: {wrong}; convert the file to UTF-8") from None
    text = text.removesuffix("\n").removesuffix("\r")
    return text.removeprefix("\ufeff") if number == 1 else text


def read_whole(path: str | Path) -> bytes:
    """Return a file's bytes; raises `DataError` if it can't be read, is empty or larger than 256 MiB."""
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if not data:
        raise DataError(f"{path} is empty")
    if len(data) > LARGEST_FILE:
        raise DataError(f"{path} is larger than {LARGEST_FILE:,} bytes")
    return data


def decode_whole(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """Decode a whole file; raises `DataError` with the line and byte that can't be, or for an unknown encoding."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = error.start - data.rfind(b"\n", 0, error.start)
        value = f"0x{data[error.start]:02x}"
        raise DataError(f"{name}, line {line}: byte {byte} ({value}) is not {encoding.upper()}") from None
    except LookupError:
        raise DataError(f"{name} says that its encoding is '{encoding}', which is not known") from None


def unreadable(path: str | Path, error: OSError) -> DataError:
    """Say in one sentence why a file can't be read."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"there is no file {path}")
    return DataError(f"{path} can't be read: {error.strerror or error}")
