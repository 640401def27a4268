"""The messages of one gettext catalogue, `.po` (source) or `.mo` (compiled)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from polyformer.data.files import decode_whole
from polyformer.errors import DataError

_CHARSET = re.compile(rb"charset=([\w.:-]+)", re.IGNORECASE)
_LANGUAGE = re.compile(r"^Language:[ \t]*([A-Za-z]\w*(?:[-@]\w+)?)", re.MULTILINE | re.IGNORECASE)


class Message(NamedTuple):
    """A message and its translation.

    Attributes:
        context: tells equal messages apart (msgctxt); "" for none.
        singular: the message (msgid).
        plural: its plural (msgid_plural), or None.
        forms: the translations: one, or as many as the language has plural forms; "" where it is not translated.
    """

    context: str
    singular: str
    plural: str | None
    forms: tuple[str, ...]


class Catalogue(NamedTuple):
    """What a file holds: the language that its header names ("" for none) and the messages."""

    language: str
    messages: list[Message]


def read_catalogue(data: bytes, name: str) -> Catalogue:
    """Read a catalogue; `name` tells its kind (`.mo` or `.po`) and what to call it in errors.

    Obsolete messages are left out, and fuzzy ones (a program's guess that no translator has looked at), as gettext's
    own compiler does.

    Raises:
        DataError: no such file, truncated, or not in the encoding that it names.
    """
    return _read_mo(data, name) if name.endswith(".mo") else _read_po(data, name)


def _encoding(header: bytes) -> str:
    found = _CHARSET.search(header)
    named = found[1].decode("ascii", "replace") if found else "utf-8"
    return "utf-8" if named.upper() in ("CHARSET", "ASCII", "US-ASCII") else named


def _language(header: str) -> str:
    found = _LANGUAGE.search(header)
    return found[1] if found else ""


def _read_po(data: bytes, name: str) -> Catalogue:
    import polib

    text = decode_whole(data, name, _encoding(data[:8192])).removeprefix("\ufeff")
    try:
        entries = polib.pofile(text + "\n")  # with a line end, it can't be taken for the name of a file
    except (OSError, ValueError, IndexError) as error:
        reason = re.sub(r"po file .*\(line (\d+)\)", r"line \1", str(error).split("\n")[0])
        raise DataError(f"{name} is no gettext catalogue ({reason[:200]})") from None
    messages = []
    for entry in entries:
        if entry.msgid and not entry.obsolete and not entry.fuzzy:
            forms = tuple(entry.msgstr_plural[i] for i in sorted(entry.msgstr_plural)) or (entry.msgstr,)
            messages.append(Message(entry.msgctxt or "", entry.msgid, entry.msgid_plural or None, forms))
    return Catalogue(entries.metadata.get("Language", ""), messages)


def _read_mo(data: bytes, name: str) -> Catalogue:
    """Read the compiled form (GNU gettext manual, section "The Format of GNU MO Files").

    Every offset is checked; strings may overlap, so their lengths are bounded together.
    """
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        raise DataError(f"{name} is no compiled gettext catalogue (it doesn't begin like one)")
    pairs = list(_mo_strings(data, name, order))
    header = next((value for key, value in pairs if not key), b"")
    encoding = _encoding(header)
    messages = []
    for key, value in pairs:
        if key:
            context, _, ids = decode_whole(key, name, encoding).rpartition("\x04")
            singular, plural, _ = (*ids.split("\0", 2), "", "")[:3]
            forms = tuple(decode_whole(value, name, encoding).split("\0"))
            messages.append(Message(context, singular, plural or None, forms))
    return Catalogue(_language(decode_whole(header, name, encoding)), messages)


def _mo_strings(data: bytes, name: str, order: str) -> Iterator[tuple[bytes, bytes]]:
    truncated = DataError(f"{name} is truncated or damaged: its {len(data):,} bytes don't hold what its table says")
    if len(data) < 28:
        raise truncated
    _, count, at_keys, at_values = struct.unpack_from(order + "4I", data, 4)
    if max(at_keys, at_values) + 8 * count > len(data):
        raise truncated
    total = 0
    for i in range(count):
        both = []
        for at in (at_keys, at_values):
            length, start = struct.unpack_from(order + "2I", data, at + 8 * i)
            total += length
            if start + length > len(data) or total > 4 * len(data):
                raise truncated
            both.append(data[start : start + length])
        yield both[0], both[1]
