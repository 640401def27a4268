"""Batches of about equally many tokens, whose sentences are about equally long.

The sentences are encoded once, into flat arrays. They are sorted by length and cut into batches that fit a budget of
tokens; each epoch the sentences of equal lengths change places and the batches come in another order. Since the
lengths at each place stay as they are, the cuts are the same in every epoch, which makes an epoch's length and its
padding known from the start, and a position in it one number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyformer.data.pairs import Pair
from polyformer.data.reader import IGNORED, Ints, Reader
from polyformer.data.tokenizer import TextPairTokenizer
from polyformer.errors import DataError
from polyformer.parts.flow import Trace
from polyformer.parts.model import TransformerPart
from polyformer.spec import Record


class BatchRecipe(Record):
    """How sentence pairs are put into batches.

    Attributes:
        tokens: the most tokens on either side of a batch, padding included.
        longest: the most tokens on either side of a pair, control tokens included.
        too_long: longer pairs are dropped and counted, or refused.
        seed: of the order.
    """

    tokens: int = 4096
    longest: int = 128
    too_long: Literal["drop", "refuse"] = "drop"
    seed: int = 0

    def check(self) -> None:
        self.require(self.longest >= 2, "longest should be at least 2")
        self.require(self.tokens >= 1, "tokens should be at least 1")


class Column:
    """Sequences of ids one after the other: `flat` holds them all, sequence i is `flat[starts[i]:starts[i + 1]]`."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.lengths: Ints = np.fromiter((len(ids) for ids in sequences), np.int64, len(sequences))
        self.starts: Ints = np.concatenate(([0], np.cumsum(self.lengths)))
        total = int(self.starts[-1])
        self.flat: npt.NDArray[np.int32] = np.fromiter((i for ids in sequences for i in ids), np.int32, total)

    def padded(self, rows: Ints, fill: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return (ids, which are real) [B, T] of these sequences, T the longest of them."""
        lengths = self.lengths[rows]
        real = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(real.shape, fill, np.int64)
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        ids[real] = self.flat[np.repeat(self.starts[rows], lengths) + within]
        return ids, real


@dataclass
class Encoded:
    """Encoded sentence pairs.

    Attributes:
        source, target: the ids of both sides, eos included.
        pairs: the pairs themselves, in the same order.
        pad_id, bos_id: to fill up with, and to begin the decoder's input with.
        dropped: how many pairs were too long.
    """

    source: Column
    target: Column
    pairs: Sequence[Pair]
    pad_id: int
    bos_id: int
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def longer(self) -> Ints:
        """Tokens of the longer side of each pair."""
        return np.maximum(self.source.lengths, self.target.lengths)


@dataclass
class Batch:
    """Sentence pairs as a model takes them; B pairs, T source tokens, S target tokens.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] bool, True where real.
        decoder_input_ids: [B, S] int64: the target moved one place to the right, after bos.
        decoder_attention_mask: [B, S] bool.
        labels: [B, S] int64: the target with eos; -100 where it is padding.
        target_tokens: number of real labels.
        rows: which pairs of `Encoded` these are.
    """

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor
    decoder_attention_mask: Tensor
    labels: Tensor
    target_tokens: int
    rows: Ints

    def hidden(self, model: TransformerPart, trace: Trace | None = None) -> Tensor:
        """Teacher forcing: return the decoder's rows [B, S, D], each of which has seen the target before it."""
        device = next(model.parameters()).device
        memory = model.encode(self.input_ids.to(device), self.attention_mask.to(device), trace=trace)
        target, real = self.decoder_input_ids.to(device), self.decoder_attention_mask.to(device)
        return model.decode(target, real, memory, trace=trace)


def encode_pairs(tokenizer: TextPairTokenizer, pairs: Sequence[Pair], recipe: BatchRecipe) -> Encoded:
    """Encode pairs once and for all.

    Raises:
        DataError: a pair is longer than `recipe.longest` and the recipe refuses such, or none is left.
    """
    sources = tokenizer.encode_sources([pair.source for pair in pairs], [pair.target_language for pair in pairs])
    targets = tokenizer.encode_targets([pair.target for pair in pairs])
    kept = []
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if max(len(source), len(target)) <= recipe.longest:
            kept.append(i)
        elif recipe.too_long == "refuse":
            sizes = f"{len(source)} and {len(target)} tokens, longest is {recipe.longest}"
            raise DataError(f"a pair is too long ({sizes}): {_shortened(pairs[i])}")
    if not kept:
        raise DataError(
            f"none of {len(pairs):,} pairs has at most {recipe.longest} tokens on both sides; raise longest"
        )
    return Encoded(
        Column([sources[i] for i in kept]),
        Column([targets[i] for i in kept]),
        [pairs[i] for i in kept],
        tokenizer.pad_id,
        tokenizer.bos_id,
        len(pairs) - len(kept),
    )


class Batches(Reader[Batch]):
    """An endless iterator of batches, epoch after epoch; each pair comes once in each.

    Attributes:
        epoch: epochs that are finished.
        index: batches of the current epoch that were given.
        padding: share of the source and target tokens of an epoch that are padding, from 0 to 1.
    """

    what = "pairs"

    def __init__(self, data: Encoded, recipe: BatchRecipe) -> None:
        """Plan the batches.

        Raises:
            DataError: a sentence that alone is longer than the budget; names it and both lengths.
        """
        worst = int(np.argmax(data.longer))
        if data.longer[worst] > recipe.tokens:
            raise DataError(
                f"a batch of {recipe.tokens} tokens can't hold a sentence of {data.longer[worst]}: "
                f"{_shortened(data.pairs[worst])}; raise the batch's tokens or lower longest"
            )
        self.data, self.recipe = data, recipe
        items = _by_length(data)
        super().__init__(items, cuts(data.longer[items], recipe.tokens))
        self.padding = self._padding()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.recipe.to_json().encode())
        for column in (self.data.source, self.data.target):
            digest.update(column.starts.tobytes())
            digest.update(column.flat.tobytes())
        return digest.hexdigest()[:16]

    def shuffled(self) -> tuple[Ints, Ints]:
        """Return this epoch's pairs, still by length, and its order of the batches."""
        random = np.random.default_rng([self.recipe.seed, self.epoch])
        mixed = random.permutation(len(self.data))
        return mixed[_by_length(self.data, mixed)], random.permutation(len(self))

    def collate(self, chosen: Ints, epoch: int | None = None) -> Batch:
        """Put these pairs into a batch, each side padded to its longest."""
        data = self.data
        source, source_real = data.source.padded(chosen, data.pad_id)
        labels, target_real = data.target.padded(chosen, IGNORED)
        inputs = np.full_like(labels, data.pad_id)
        inputs[:, 0] = data.bos_id
        inputs[:, 1:] = np.where(target_real[:, 1:], labels[:, :-1], data.pad_id)
        return Batch(
            torch.from_numpy(source),
            torch.from_numpy(source_real),
            torch.from_numpy(inputs),
            torch.from_numpy(target_real),
            torch.from_numpy(labels),
            int(target_real.sum()),
            chosen,
        )

    def _padding(self) -> float:
        real = given = 0
        for column in (self.data.source, self.data.target):
            lengths = column.lengths[self.items]
            longest = np.maximum.reduceat(lengths, self.cuts[:-1])
            real += int(lengths.sum())
            given += int((longest * np.diff(self.cuts)).sum())
        return 1 - real / given


def _by_length(data: Encoded, among: Ints | None = None) -> Ints:
    """Return the order of the pairs by their longer side, and by the difference of the sides up and down in turn.

    The turns keep neighbours alike on both sides where the longer side becomes one longer. Equal ones stay in order.
    """
    source, target = data.source.lengths, data.target.lengths
    if among is not None:
        source, target = source[among], target[among]
    longer = np.maximum(source, target)
    return np.lexsort(((source - target) * np.where(longer % 2, -1, 1), longer))


def cuts(lengths: Ints, tokens: int) -> Ints:
    """Return where batches begin, and the end: as many rows as fit `tokens`, each as long as the longest."""
    cuts, longest = [0], 0
    for i, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if longest * (i + 1 - cuts[-1]) > tokens:
            cuts.append(i)
            longest = length
    return np.array([*cuts, len(lengths)], np.int64)


def _shortened(pair: Pair) -> str:
    return " → ".join(f"'{text[:60]}…'" if len(text) > 60 else f"'{text}'" for text in (pair.source, pair.target))
