"""Tokenizers of language models that are trained here: learnt from documents, saved as published ones are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.data.documents import Document
from polyformer.data.vocabularies import Vocabulary
from polyformer.data.vocabularies.format import added
from polyformer.data.vocabulary import SPACE, SPECIAL, TextTokenizerRecipe, learn
from polyformer.errors import DataError

MASK = "<mask>"
PIECE, LONGEST = 10_000, 500_000  # characters that are encoded at once, and the longest line


def learn_text_tokenizer(documents: Sequence[Document], recipe: TextTokenizerRecipe, masks: bool) -> TextTokenizer:
    """Learn the vocabulary of a recipe from documents, line by line.

    The ids of the control tokens are pad 0, bos 1, eos 2, unk 3, and where the model `masks` 4.

    Raises:
        DataError: the documents give fewer tokens than the recipe wants (says how many).
    """
    control = (*SPECIAL, MASK) if masks else SPECIAL
    lines = [line for document in documents for line in document.text.splitlines(keepends=True)]
    learnt = learn(lines, recipe, control, "training texts", of="documents")
    description = json.loads(learnt.to_str())
    description["added_tokens"] = [added(token, number) for number, token in enumerate(control)]
    roles = dict(zip(("pad", "bos", "eos", "unk", "mask"), control, strict=False))
    return TextTokenizer(Vocabulary(description, roles, None, {}, "the new tokenizer"))


class Letters(NamedTuple):
    """Which tokens may be replaced, and which begin or end with a letter, so that a word can go on there.

    Attributes:
        plain: ids that are no control tokens.
        first, last: booleans by id.
    """

    plain: Sequence[int]
    first: Sequence[bool]
    last: Sequence[bool]


def letters_of(tokenizer: TextTokenizer) -> Letters:
    """Look at every token of a vocabulary."""
    tokens = tokenizer.tokens(range(tokenizer.vocabulary))
    control = set(tokenizer.control)
    bare = [token.removeprefix("##") if len(token) > 2 else token for token in tokens]
    plain = [i for i, token in enumerate(tokens) if token not in control]
    return Letters(plain, [_is_letter(token[:1]) for token in bare], [_is_letter(token[-1:]) for token in bare])


def encode_documents(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of documents, each between bos and eos, as far as the tokenizer has such.

    They may be of any length: they are encoded in pieces, which begin where lines do.

    Raises:
        DataError: a line that is far too long.
    """
    pieces = [list(_pieces(text)) for text in texts]
    encoded = iter(tokenizer.encode_batch([piece for own in pieces for piece in own]))
    before = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    return [[*before, *(one for _ in own for one in _bare(next(encoded), before, after)), *after] for own in pieces]


def _bare(ids: list[int], before: list[int], after: list[int]) -> list[int]:
    """Return the ids of a piece without the bos and eos that a checkpoint's own tokenizer puts around every text."""
    start = 1 if before and ids[:1] == before else 0
    return ids[start : len(ids) - (1 if after and ids[start:][-1:] == after else 0)]


def _pieces(text: str) -> Iterable[str]:
    """Cut a text at line ends, behind the last of several: vocabularies know no token that goes on from there."""
    start = 0
    while len(text) - start > PIECE:
        end = text.find("\n", start + PIECE) + 1 or len(text)
        while end < len(text) and text[end] == "\n":
            end += 1
        if end - start > LONGEST:
            told = f"a line of {end - start:,} characters is longer than the {LONGEST:,} that are taken at once"
            raise DataError(f"{told}: {text[start:][:40]}…")
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "\ufffd" if character != SPACE else False
