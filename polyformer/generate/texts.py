"""From tokens to text while it is written: whole characters only, and nothing of what stops it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "�"


class Decoder(Protocol):
    """What turns tokens into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""

    def settled(self, token: int) -> bool:
        """Tell whether the text up to this token stays as it is whatever follows, unfinished characters aside."""


class TextStream:
    """Gives out a text piece by piece as its tokens come; the pieces together are the whole text's decoding.

    A character that is spread over several tokens is given out when it is whole; what may be the beginning of a stop
    string, when it is known not to be. Each token is decoded with those before it that gave text last, as some tokens
    read differently at the beginning of a text.

    Attributes:
        stopped: whether a stop string was met.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()) -> None:
        self.decoder, self.stops = decoder, tuple(stops)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._decoded = ""
        self._start = self._read = 0

    def push(self, token: int) -> str:
        """Take a token and return what it adds to the text, which may be nothing yet."""
        if self.stopped:
            return ""
        self.ids.append(token)
        if not self.decoder.settled(token):
            return ""
        old = self.decoder.decode(self.ids[self._start : self._read])
        new = self.decoder.decode(self.ids[self._start :])
        if new.endswith(UNFINISHED):
            return ""
        if len(new) > len(old):
            self._start, self._read = self._read, len(self.ids)
            self._decoded += new[len(old) :]
        return self._given(self._searched())

    def finish(self) -> str:
        """Return what is left when no token follows: unfinished characters, and beginnings of stop strings."""
        if self.stopped:
            return ""
        whole = self.decoder.decode(self.ids)
        if whole.startswith(self._decoded):
            self._decoded = whole
        self._searched()
        return self._given(len(self._decoded))

    def _searched(self) -> int:
        """Look for stop strings in what was not given out; return up to where the text is safe."""
        given = len(self.text)
        found = [place for one in self.stops if (place := self._decoded.find(one, given)) >= 0]
        if found:
            self.stopped = True
            self._decoded = self._decoded[: min(found)]
            return len(self._decoded)
        held = (self._beginning(one, given) for one in self.stops)
        return len(self._decoded) - max(held, default=0)

    def _beginning(self, stop: str, given: int) -> int:
        """Return how many of the last characters are the beginning of a stop string."""
        longest = min(len(stop) - 1, len(self._decoded) - given)
        return next((count for count in range(longest, 0, -1) if self._decoded.endswith(stop[:count])), 0)

    def _given(self, end: int) -> str:
        piece = self._decoded[len(self.text) : end]
        self.text += piece
        return piece
