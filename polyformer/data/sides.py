"""A checkpoint's one tokenizer as the two sides of a translation: source in, target out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.errors import DataError


class BothSides:
    """Gives a `TextTokenizer` the interface of `TextPairTokenizer`, for encoder–decoder models.

    Such models know what to do from the text ("translate English to German: …") or from how they were trained, so
    there is no target language to name.
    """

    def __init__(self, tokenizer: TextTokenizer, start: int | None) -> None:
        """Take a tokenizer and the token that the decoder starts with; raises `DataError` where either has no end."""
        eos, pad = tokenizer.eos_id, tokenizer.pad_id
        if eos is None or start is None:
            raise DataError("writing needs a start and an end token, and this model's files name none")
        self.tokenizer = tokenizer
        self.source_vocabulary = self.target_vocabulary = tokenizer.vocabulary
        self.bos_id, self.eos_id = start, eos
        self.pad_id = eos if pad is None else pad
        self.unk_id = eos if tokenizer.unk_id is None else tokenizer.unk_id

    def encode_source(self, text: str, target_language: str | None = None) -> list[int]:
        """Return the ids of a source text, as the checkpoint's tokenizer gives them."""
        return self.encode_sources([text], [target_language])[0]

    def encode_target(self, text: str) -> list[int]:
        """Return the ids of a target text and eos."""
        return self.encode_targets([text])[0]

    def encode_sources(self, texts: Sequence[str], languages: Sequence[str | None]) -> list[list[int]]:
        """Return what `encode_source` does, for many texts at once."""
        named = next((language for language in languages if language is not None), None)
        if named is not None:
            raise DataError(f"this model takes no target language, so '{named}' can't be asked for")
        return self.tokenizer.encode_batch(list(texts))

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode_target` does, for many texts at once."""
        control = {self.bos_id, self.tokenizer.bos_id}
        rows = [[one for one in ids if one not in control] for ids in self.tokenizer.encode_batch(list(texts))]
        return [ids if ids[-1:] == [self.eos_id] else [*ids, self.eos_id] for ids in rows]

    def decode_target(self, ids: Iterable[int]) -> str:
        """Return the text of target ids; control tokens are left out."""
        return self.tokenizer.decode(list(ids))

    def source_tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens of source ids, for pictures."""
        return self.tokenizer.tokens(list(ids))

    def target_tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens of target ids, for pictures."""
        return self.tokenizer.tokens(list(ids))

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint's tokenizer."""
        self.tokenizer.save(folder)
