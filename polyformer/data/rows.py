"""Rows of equal length cut out of documents, as language models read them.

Shape letters: B rows of a batch, S tokens of a row, N tokens of all documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.data.documents import Document
from polyformer.data.masking import Asked, Guess, TextObjective
from polyformer.data.reader import Ints, Reader
from polyformer.data.text_tokenizer import Letters, encode_documents, letters_of
from polyformer.errors import DataError, SpecError
from polyformer.parts.flow import Trace
from polyformer.parts.model import TransformerPart
from polyformer.spec import Record


class RowRecipe(Record):
    """How documents are put into rows and batches.

    Attributes:
        length: tokens of a row; what a model reads at once.
        tokens: the most tokens of a batch.
        documents: "joined" lets a row's tokens see those of another document that it holds before them, as GPT-2 was
            trained; "apart" keeps them apart by `SameDocument`, which costs a mask, and asks for no token across.
        seed: of the order.
    """

    length: int = 256
    tokens: int = 2048
    documents: Literal["joined", "apart"] = "joined"
    seed: int = 0

    def check(self) -> None:
        self.require(self.length >= 2, f"length should be at least 2, not {self.length}")
        self.require(self.tokens >= self.length, f"a batch of {self.tokens} tokens can't hold a row of {self.length}")


@dataclass
class EncodedTexts:
    """Encoded documents, one after the other.

    Attributes:
        flat: all ids [N].
        starts: where each document begins in it.
        bytes: of all texts in UTF-8.
        tokenizer: what they were encoded with.
    """

    flat: npt.NDArray[np.int32]
    starts: Ints
    bytes: int
    tokenizer: TextTokenizer
    letters: Letters

    def __len__(self) -> int:
        return len(self.flat)

    def first(self, tokens: int) -> EncodedTexts:
        """Return what stands in the first so many tokens; `bytes` stays that of all."""
        return replace(self, flat=self.flat[:tokens], starts=self.starts[self.starts < max(tokens, 1)])


def encode_texts(tokenizer: TextTokenizer, documents: Sequence[Document]) -> EncodedTexts:
    """Encode documents once and for all, each between bos and eos."""
    encoded = [np.asarray(ids, np.int32) for ids in encode_documents(tokenizer, [one.text for one in documents])]
    starts = np.cumsum([0, *(len(ids) for ids in encoded[:-1])])
    flat = np.concatenate(encoded) if encoded else np.zeros(0, np.int32)
    size = sum(len(one.text.encode()) for one in documents)
    return EncodedTexts(flat, starts, size, tokenizer, letters_of(tokenizer))


@dataclass
class TextBatch:
    """Rows of documents as a model takes them.

    Attributes:
        input_ids: [B, S] int64.
        labels: [B, S] int64: what is asked for at each place, -100 where nothing is.
        attention_mask: [B, S] bool, True where real; None if all are.
        document_ids: [B, S] int64, where documents are kept apart; else None.
        target_tokens: number of real labels.
        rows: which rows these are.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    document_ids: Tensor | None
    target_tokens: int
    rows: Ints

    def hidden(self, model: TransformerPart, trace: Trace | None = None) -> Tensor:
        """Return the model's rows [B, S, D]: of its decoder, or of its encoder if it has no decoder."""
        device = next(model.parameters()).device
        ids, mask, documents = (
            None if one is None else one.to(device) for one in (self.input_ids, self.attention_mask, self.document_ids)
        )
        assert ids is not None
        if model.encoder is None:
            return model.decode(ids, mask, document_ids=documents, trace=trace)
        if model.decoder is not None:
            raise SpecError("an encoder–decoder model reads pairs; texts alone need a model with one of the two")
        return model.encode(ids, mask, documents, trace).hidden


class TextRows(Reader[TextBatch]):
    """An endless iterator of batches of rows, epoch after epoch; each row comes once in each.

    Row i holds the tokens from i · length on, of all documents written one after the other; the last one is padded.
    Whatever an objective draws by chance depends on the seed, the epoch and the row alone.
    """

    what = "texts"

    def __init__(self, data: EncodedTexts, recipe: RowRecipe, objective: TextObjective) -> None:
        """Plan the batches; raises `DataError` for texts of less than two tokens, from which nothing can be learnt."""
        if len(data) < 2:
            raise DataError(f"texts of {len(data)} tokens are too short to predict one token from another")
        self.data, self.recipe, self.objective = data, recipe, objective
        asked = len(data) - 1 if objective.reads == "forwards" else len(data)
        rows, most = -(-asked // recipe.length), recipe.tokens // recipe.length
        self.task = objective.task(data.tokenizer, data.letters)
        super().__init__(np.arange(rows), np.array([*range(0, rows, most), rows], np.int64))

    def fingerprint(self) -> str:
        digest = hashlib.sha256((self.recipe.to_json() + self.objective.to_json()).encode())
        digest.update(self.data.starts.tobytes())
        digest.update(self.data.flat.tobytes())
        return digest.hexdigest()[:16]

    def shuffled(self) -> tuple[Ints, Ints]:
        """Return this epoch's order of the rows; the batches are cut out of it from left to right."""
        random = np.random.default_rng([self.recipe.seed, self.epoch])
        return random.permutation(len(self.items)), np.arange(len(self))

    def collate(self, chosen: Ints, epoch: int | None = None) -> TextBatch:
        """Put these rows into a batch."""
        data, length = self.data, self.recipe.length
        places = chosen[:, None] * length + np.arange(length + 1)
        real = places < len(data)
        ids = np.where(real, data.flat[np.minimum(places, len(data) - 1)], data.tokenizer.pad_id or 0).astype(np.int64)
        documents = np.searchsorted(data.starts, places, side="right") if self.recipe.documents == "apart" else None
        guesses = [Guess(self.recipe.seed, epoch, int(row)) for row in chosen]
        found = self.task.ask(Asked(ids, real, documents), guesses)
        given = real[:, :length]
        if self.objective.reads == "forwards":
            given = given & real[:, 1:]  # the last token of all has no successor to ask for, and is no input
        return TextBatch(
            torch.from_numpy(np.where(given, found.ids, data.tokenizer.pad_id or 0)),
            torch.from_numpy(found.labels),
            None if given.all() else torch.from_numpy(given),
            None if documents is None else torch.from_numpy(np.ascontiguousarray(documents[:, :length])),
            int((found.labels >= 0).sum()),
            chosen,
        )
