"""The tokenizer of Marian checkpoints in the Hugging Face layout: two SentencePiece models and a table of ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from polyformer.data.files import decode_whole, read_whole
from polyformer.data.text import normalise
from polyformer.errors import DataError, suggest

_FILES = ("source.spm", "target.spm", "vocab.json")
_OPTIONAL = ("target_vocab.json", "tokenizer_config.json")
_TAG = re.compile(r">>(.+)<<")


class MarianTokenizer:
    """Encodes like `MarianTokenizer` of transformers, with the interface of `PairTokenizer`.

    A Marian decoder starts with the padding token, so `bos_id` is `pad_id`. Where the vocabulary has tags such as
    ">>de<<" for the target language, `encode_source` puts in the one that is asked for; in contrast to transformers,
    a tag that is typed in the text is plain text. Punctuation is left as it is, as transformers does where the package
    sacremoses is not installed.
    """

    def __init__(self, files: dict[str, bytes], folder: str = "") -> None:
        """Make it from the contents of `source.spm`, `target.spm`, `vocab.json` and, where there, the optional files.

        Raises:
            DataError: the `sentencepiece` package or a control token is missing, or a file is damaged.
        """
        self._files = files
        self._pieces = {side: _pieces(files[f"{side}.spm"], f"{folder}/{side}.spm") for side in ("source", "target")}
        self._source_ids = _table(files["vocab.json"], f"{folder}/vocab.json")
        separate = "target_vocab.json" in files
        self._target_ids = (
            _table(files["target_vocab.json"], f"{folder}/target_vocab.json") if separate else self._source_ids
        )
        self._source_names = {i: token for token, i in self._source_ids.items()}
        self._target_names = {i: token for token, i in self._target_ids.items()}
        self.source_vocabulary = max(self._source_names) + 1
        self.target_vocabulary = max(self._target_names) + 1
        try:
            self.pad_id, self.eos_id, self.unk_id = (self._source_ids[token] for token in ("<pad>", "</s>", "<unk>"))
        except KeyError as error:
            raise DataError(f"{folder}/vocab.json lacks the token {error}") from None
        self.bos_id = self.pad_id
        self._tags = {found[1]: i for token, i in self._source_ids.items() if (found := _TAG.fullmatch(token))}
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        self._only_target: str | None = config.get("target_lang")

    @property
    def target_languages(self) -> tuple[str, ...]:
        """The languages that have tags, else the one that the folder names, else none."""
        return tuple(sorted(self._tags)) or ((self._only_target,) if self._only_target else ())

    @classmethod
    def load(cls, folder: str | Path) -> MarianTokenizer:
        """Read a folder; raises `DataError` if a file is missing or damaged."""
        place = Path(folder)
        files = {name: read_whole(place / name) for name in _FILES}
        files |= {name: read_whole(place / name) for name in _OPTIONAL if (place / name).exists()}
        return cls(files, str(place))

    def save(self, folder: str | Path) -> None:
        """Write the files that it was loaded from, unchanged."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            (place / name).write_bytes(data)

    def encode_source(self, text: str, target_language: str | None = None) -> list[int]:
        """Return the ids of a source text with eos, after the tag of the target language if one is asked for."""
        return self.encode_sources([text], [target_language])[0]

    def encode_target(self, text: str) -> list[int]:
        """Return the ids of a target text with eos."""
        return self.encode_targets([text])[0]

    def encode_sources(self, texts: Sequence[str], languages: Sequence[str | None]) -> list[list[int]]:
        """Return what `encode_source` does, for many texts at once."""
        tags = {language: self._tag(language) for language in set(languages)}
        encoded = self._encode("source", self._source_ids, texts)
        return [[*tags[language], *ids, self.eos_id] for language, ids in zip(languages, encoded, strict=True)]

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode_target` does, for many texts at once."""
        return [[*ids, self.eos_id] for ids in self._encode("target", self._target_ids, texts)]

    def decode_target(self, ids: Iterable[int]) -> str:
        """Return the text of target ids; control tokens are left out."""
        control = {self.pad_id, self.eos_id, self.unk_id}
        pieces = [self._target_names[i] for i in ids if i not in control and i in self._target_names]
        text: str = self._pieces["target"].decode_pieces([piece for piece in pieces if not _TAG.fullmatch(piece)])
        return text.strip()

    def source_tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens of source ids, for pictures."""
        return [self._source_names.get(i, "<unk>") for i in ids]

    def target_tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens of target ids, for pictures."""
        return [self._target_names.get(i, "<unk>") for i in ids]

    def _encode(self, side: str, table: dict[str, int], texts: Sequence[str]) -> list[list[int]]:
        pieces = self._pieces[side].encode([normalise(text) for text in texts], out_type=str)
        return [[table.get(piece, self.unk_id) for piece in one] for one in pieces]

    def _tag(self, language: str | None) -> list[int]:
        if language is None or (not self._tags and language == self._only_target):
            return []
        if language not in self._tags:
            near = suggest(language, self.target_languages)
            raise DataError(f"this model has no tag for the target language '{language}'{near}")
        return [self._tags[language]]


def _pieces(data: bytes, name: str) -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise DataError(f"{name} needs the package sentencepiece: pip install sentencepiece") from None
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise DataError(f"{name} is no SentencePiece model ({error})") from None


def _table(data: bytes, name: str) -> dict[str, int]:
    try:
        table = json.loads(decode_whole(data, name))
    except ValueError as error:
        raise DataError(f"{name} is no valid JSON ({error})") from None
    if not isinstance(table, dict) or not table or not all(type(i) is int and i >= 0 for i in table.values()):
        raise DataError(f"{name} should be a table of tokens and their numbers")
    return table
