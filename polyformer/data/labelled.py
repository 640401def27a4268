"""Items with labels, and texts that belong together, as encoders are tuned on them.

Shape letters: B items of a batch, S tokens of an item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from polyformer.data.batches import Column, cuts
from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.data.examples import Example
from polyformer.data.reader import IGNORED, Ints, Reader
from polyformer.errors import DataError
from polyformer.parts.flow import Trace
from polyformer.parts.model import TransformerPart

if TYPE_CHECKING:
    from polyformer.data.images import ImageReader

PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.bmp", "*.gif", "*.webp", "*.tif", "*.tiff", "*.ppm")


@dataclass
class ItemBatch:
    """Items as a model takes them.

    Attributes:
        inputs: what `forward` takes, by name.
        labels: int64, [B] of whole items, [B, S] of tokens, -100 where nothing is asked.
        target_tokens: number of real labels.
        rows: which items these are.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    target_tokens: int
    rows: Ints

    def on(self, model: TransformerPart) -> dict[str, Tensor]:
        """Return the inputs where the model is, in its precision."""
        parameter = next(model.parameters())
        return {
            name: one.to(parameter.device, parameter.dtype if one.is_floating_point() else None)
            for name, one in self.inputs.items()
        }

    def hidden(self, model: TransformerPart, trace: Trace | None = None) -> Tensor:
        """Return the model's rows [B, S, D]."""
        given = self.on(model)
        ids, mask = given["input_ids"], given["attention_mask"]
        if model.encoder is None:
            return model.decode(ids, mask, trace=trace)
        return model.encode(ids, mask, trace=trace).hidden


@dataclass
class RelatedBatch:
    """Texts that belong together: B anchors, their positives, and of some a text that doesn't belong to them.

    Attributes:
        anchors, others: ids and mask [B, S] of the anchors, and of the positives followed by the negatives.
        same: integers, which text each of `others` is; equal texts have equal numbers.
        target_tokens: B.
        rows: which examples these are.
    """

    anchors: tuple[Tensor, Tensor]
    others: tuple[Tensor, Tensor]
    same: Tensor
    target_tokens: int
    rows: Ints


@dataclass
class Fitted:
    """Encoded texts, each at most so long; `cut` of them were longer."""

    ids: Column
    cut: int
    pad_id: int

    @property
    def notes(self) -> list[str]:
        """What a person should know of how they fit."""
        return [f"cut to {int(self.ids.lengths.max())} tokens: {self.cut:,} texts"] if self.cut else []


def fit(tokenizer: TextTokenizer, texts: Sequence[str], length: int) -> Fitted:
    """Encode texts, and cut those that are longer; a control token at a text's end is kept."""
    rows = tokenizer.encode_batch(list(texts))
    control = {tokenizer.token_id(token) for token in tokenizer.control}
    cut = sum(len(ids) > length for ids in rows)
    kept = [ids if len(ids) <= length else _shortened(ids, length, ids[-1] in control) for ids in rows]
    empty = next((text for text, ids in zip(texts, kept, strict=True) if not ids), None)
    if empty is not None:
        raise DataError(f"a text has no tokens: {empty[:40]!r}")
    return Fitted(Column(kept), cut, tokenizer.pad_id or 0)


def _shortened(ids: list[int], length: int, ends: bool) -> list[int]:
    return [*ids[: length - 1], ids[-1]] if ends else ids[:length]


class ItemRows(Reader[ItemBatch]):
    """An endless iterator of batches of texts with labels, of about equal lengths; each comes once in an epoch."""

    what = "examples"

    def __init__(self, texts: Fitted, labels: Sequence[int] | Sequence[Sequence[int]], tokens: int, seed: int) -> None:
        """Plan batches.

        Args:
            labels: of each text, one of the whole or as many as it has tokens.
            tokens: the most of a batch.
        """
        self.texts, self.seed = texts, seed
        self.whole = isinstance(labels[0], int)
        self.labels = Column([[one] if isinstance(one, int) else one for one in labels])
        lengths = texts.ids.lengths
        items = np.argsort(lengths, kind="stable")
        super().__init__(items, cuts(lengths[items], max(tokens, int(lengths.max()))))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.seed} {self.cuts.tolist()}".encode())
        for column in (self.texts.ids, self.labels):
            digest.update(column.starts.tobytes())
            digest.update(column.flat.tobytes())
        return digest.hexdigest()[:16]

    def shuffled(self) -> tuple[Ints, Ints]:
        """Return this epoch's items, still by length, and its order of the batches."""
        random = np.random.default_rng([self.seed, self.epoch])
        mixed = random.permutation(len(self.items))
        order = np.argsort(self.texts.ids.lengths[mixed], kind="stable")
        return mixed[order], random.permutation(len(self))

    def collate(self, chosen: Ints, epoch: int | None = None) -> ItemBatch:
        """Put these items into a batch, padded on the right."""
        ids, mask = _padded(self.texts, chosen)
        found, _ = self.labels.padded(chosen, IGNORED)
        labels = torch.from_numpy(found[:, 0] if self.whole else found)
        return ItemBatch({"input_ids": ids, "attention_mask": mask}, labels, int((labels >= 0).sum()), chosen)


class RelatedRows(Reader[RelatedBatch]):
    """An endless iterator of batches of texts that belong together, in any order; each comes once in an epoch."""

    what = "examples"

    def __init__(
        self, tokenizer: TextTokenizer, examples: Sequence[Example], length: int, sizes: tuple[int, int]
    ) -> None:
        """Plan batches; `sizes` are the examples of one, and the seed of the order."""
        each, self.seed = sizes
        found = [one.data for one in examples]
        self.anchors = fit(tokenizer, [one["anchor"] for one in found], length)
        positives = [one["positive"] for one in found]
        negatives = [one["negative"] for one in found if "negative" in one]
        self.others = fit(tokenizer, [*positives, *negatives], length)
        numbers: dict[str, int] = {}
        self.same = torch.tensor([numbers.setdefault(text, len(numbers)) for text in (*positives, *negatives)])
        place = np.cumsum([0, *("negative" in one for one in found)])
        self.negative = [len(found) + int(place[i]) if "negative" in one else -1 for i, one in enumerate(found)]
        count = len(found)
        last = max(count - 1, 1)  # a single pair has no others to be told from, and goes with those before it
        edges = [*range(0, last, each), count]
        super().__init__(np.arange(count), np.array(edges, np.int64))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.seed} {self.cuts.tolist()}".encode())
        for column in (self.anchors.ids, self.others.ids):
            digest.update(column.starts.tobytes())
            digest.update(column.flat.tobytes())
        return digest.hexdigest()[:16]

    def shuffled(self) -> tuple[Ints, Ints]:
        """Return this epoch's order of the examples; the batches are cut out of it from left to right."""
        random = np.random.default_rng([self.seed, self.epoch])
        return random.permutation(len(self.items)), np.arange(len(self))

    def collate(self, chosen: Ints, epoch: int | None = None) -> RelatedBatch:
        """Put these examples into a batch."""
        negatives = [self.negative[i] for i in chosen.tolist() if self.negative[i] >= 0]
        others = np.array([*chosen.tolist(), *negatives], np.int64)
        return RelatedBatch(
            _padded(self.anchors, chosen), _padded(self.others, others), self.same[others], len(chosen), chosen
        )


class PictureRows(Reader[ItemBatch]):
    """An endless iterator of batches of images with labels, which are read anew each time."""

    what = "examples"

    def __init__(
        self, reader: ImageReader, files: Sequence[str], labels: Sequence[int], sizes: tuple[int, int]
    ) -> None:
        """Plan batches; `sizes` are the images of one, and the seed of the order."""
        each, self.seed = sizes
        self.reader, self.files, self.labels = reader, files, np.asarray(labels, np.int64)
        super().__init__(np.arange(len(files)), np.array([*range(0, len(files), each), len(files)], np.int64))

    def fingerprint(self) -> str:
        told = f"{self.seed} {self.cuts.tolist()} {self.files} {self.labels.tolist()} {self.reader.to_json()}"
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def shuffled(self) -> tuple[Ints, Ints]:
        """Return this epoch's order of the images; the batches are cut out of it from left to right."""
        random = np.random.default_rng([self.seed, self.epoch])
        return random.permutation(len(self.items)), np.arange(len(self))

    def collate(self, chosen: Ints, epoch: int | None = None) -> ItemBatch:
        """Read these images into a batch."""
        pixels = self.reader.batch([self.files[i] for i in chosen.tolist()])
        labels = torch.from_numpy(self.labels[chosen])
        return ItemBatch({"pixel_values": pixels}, labels, len(chosen), chosen)


def _padded(texts: Fitted, chosen: Ints) -> tuple[Tensor, Tensor]:
    ids, real = texts.ids.padded(chosen, texts.pad_id)
    return torch.from_numpy(ids), torch.from_numpy(real)


def tag_labels(
    tokenizer: TextTokenizer, words: Sequence[str], tags: Sequence[int], length: int
) -> tuple[list[int], list[int]]:
    """Return the ids of words, written with spaces between them, and a label for each: of a word's first token its tag.

    All other tokens, and control tokens, have the label -100.
    """
    placed = tokenizer.encode_places(" ".join(words))
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    labels, seen = list[int](), set[int]()
    for one in placed:
        word = int(np.searchsorted(starts, one.stop, "left")) - 1 if one.stop > one.start else -1
        labels.append(IGNORED if word < 0 or word in seen else tags[word])
        seen.add(word)
    ids = [one.id for one in placed]
    if len(ids) <= length:
        return ids, labels
    control = {tokenizer.token_id(token) for token in tokenizer.control}
    ends = ids[-1] in control
    return _shortened(ids, length, ends), _shortened(labels, length, ends)


def pictures_in(folder: Path) -> list[dict[str, Any]]:
    """Return the images in a folder, each with the name of the folder in it that it stands in as its label.

    Raises:
        DataError: no folders with images in it.
    """
    found = [
        {"image": str(file), "label": place.name}
        for place in sorted(folder.iterdir())
        if place.is_dir()
        for file in sorted(place.rglob("*"))
        if any(file.match(pattern) or file.match(pattern.upper()) for pattern in PICTURES)
    ]
    if not found:
        raise DataError(f"{folder} has no folders with images in them, one for each label")
    return found
