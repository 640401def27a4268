"""Who comes next: users share what there is, however many requests each of them has sent."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue to each user, of which the one is served whose user has been given least so far.

    What was given is counted in tokens. A user who comes back begins at the least count among those who wait, so that
    nobody saves up time by staying away. Of one user's requests, the one that came first is first.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._given: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def push(self, user: str, item: T, first: bool = False) -> None:
        """Put an item behind the user's others, or before them."""
        if not self._waiting.get(user):
            least = min((self._given[one] for one, items in self._waiting.items() if items), default=0.0)
            self._given[user] = max(self._given.get(user, 0.0), least)
        items = self._waiting.setdefault(user, deque())
        (items.appendleft if first else items.append)(item)

    def peek(self) -> T:
        """Return the next item, which stays."""
        return self._waiting[self._next()][0]

    def pop(self) -> T:
        """Take the next item."""
        user = self._next()
        item = self._waiting[user].popleft()
        if not self._waiting[user]:
            del self._waiting[user]
        return item

    def charge(self, user: str, tokens: int) -> None:
        """Count what a user was given."""
        self._given[user] = self._given.get(user, 0.0) + tokens

    def settle(self, users: set[str]) -> None:
        """Forget the counts of all who neither wait nor are among `users`."""
        self._given = {one: given for one, given in self._given.items() if one in users or one in self._waiting}

    def take(self, item: T, user: str) -> bool:
        """Take an item out of the queue wherever it stands; tell whether it was there."""
        items = self._waiting.get(user)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[user]
        return True

    def items(self) -> list[T]:
        """Return all that wait."""
        return [item for items in self._waiting.values() for item in items]

    def _next(self) -> str:
        return min(self._waiting, key=lambda user: self._given[user])
