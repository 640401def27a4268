"""What readers of training data have in common: an order for each epoch, and a position that can be gone back to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from polyformer.errors import RunError
from polyformer.parts.flow import Trace
from polyformer.parts.model import TransformerPart

Ints = npt.NDArray[np.int64]
IGNORED = -100  # the label that a loss leaves out; PyTorch's convention


class TrainingBatch(Protocol):
    """What training and judging ask of a batch.

    Attributes:
        labels: [B, S] int64: what each row of the model should say, -100 where nothing is asked.
        target_tokens: number of real labels.
    """

    labels: Tensor
    target_tokens: int

    def hidden(self, model: TransformerPart, trace: Trace | None = None) -> Tensor:
        """Return the model's rows [B, S, D] that are held against the labels; it is run on its own device."""


B = TypeVar("B")


class Reader(ABC, Generic[B]):
    """An endless iterator of batches, epoch after epoch; each item comes once in each.

    The items, in an order of the epoch, are cut into batches at places that are the same in every epoch, and the
    batches come in another order each time. So a position is two numbers.

    Attributes:
        epoch: epochs that are finished.
        index: batches of the current epoch that were given.
    """

    def __init__(self, items: Ints, cuts: Ints) -> None:
        """Take the items in the order in which they are evaluated, and where batches begin, with the end."""
        self.items, self.cuts = items, cuts
        self.epoch = self.index = 0
        self._order: tuple[Ints, Ints] | None = None

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.cuts) - 1

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        if self._order is None:
            self._order = self.shuffled()
        items, order = self._order
        number = int(order[self.index])
        batch = self.collate(items[self.cuts[number] : self.cuts[number + 1]], self.epoch)
        self.index += 1
        if self.index == len(self):
            self.epoch, self.index, self._order = self.epoch + 1, 0, None
        return batch

    def in_order(self) -> Iterator[B]:
        """Yield each item once, wherever the endless iteration stands and always alike; for evaluation."""
        for number in range(len(self)):
            yield self.collate(self.items[self.cuts[number] : self.cuts[number + 1]])

    def state(self) -> dict[str, Any]:
        """Return where the iteration stands, as JSON can hold it."""
        return {"epoch": self.epoch, "index": self.index, "data": self.fingerprint()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state()` was taken; the batches that follow are the same as there.

        Raises:
            RunError: the state belongs to other data, another tokenizer or another recipe.
        """
        if state["data"] != self.fingerprint():
            raise RunError(
                f"the run was left with other training {self.what} or batches; resume with the same data and recipe"
            )
        self.epoch, self.index, self._order = state["epoch"], state["index"], None

    what = "data"

    @abstractmethod
    def shuffled(self) -> tuple[Ints, Ints]:
        """Return this epoch's items, and its order of the batches."""

    @abstractmethod
    def collate(self, chosen: Ints, epoch: int | None = None) -> B:
        """Put these items into a batch, for an epoch of training, or None for evaluation."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short hash of all that the order of batches depends on."""
