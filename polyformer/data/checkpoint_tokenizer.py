"""The tokenizer that comes with a published checkpoint, whatever format it comes in."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Encoding, decoders

from polyformer.data.templates.origin import spans
from polyformer.data.vocabularies import ROLES, Vocabulary, build, new_names, read_folder, read_gguf, renamed
from polyformer.data.vocabularies.format import SPACE, all_ids
from polyformer.data.vocabulary import encode_each
from polyformer.errors import DataError

LONGEST_DOCUMENT = 1_000_000  # characters; a word of that many takes some seconds, and all a model can read is less


class EncodedPair(NamedTuple):
    """Two texts as one input: ids, and for each which of the two it belongs to (BERT's token types)."""

    input_ids: list[int]
    token_type_ids: list[int]


class Placed(NamedTuple):
    """A token and where it stands in its text, as (start, stop)."""

    id: int
    start: int
    stop: int


class TextTokenizer:
    """Turns texts into a checkpoint's ids and back, as its own tokenizer does.

    Control tokens that are typed in a text stay text, in contrast to the reference library. Control tokens are those
    that the files call special or give a role (start, end, mask …), and any other added token that the chat template
    writes, such as "</think>"; further added tokens, such as runs of spaces, are ordinary.

    Attributes:
        vocabulary: the number of ids, from 0 to the largest.
        control: the control tokens.
        chat_template: the source of the chat template, for `polyformer.data.chat`.
        bos_id, eos_id, pad_id, unk_id, mask_id, cls_id, sep_id: None where the checkpoint has no such token.
    """

    def __init__(self, read: Vocabulary) -> None:
        """Make it from what a file describes; raises `DataError` for a description that can't be."""
        ids = all_ids(read.description)
        template = read.template or ""
        tokens = read.description["added_tokens"]
        control = {one["content"] for one in tokens if one.get("special") or one["content"] in template}
        control |= set(read.roles.values())
        self._names = new_names(control)
        self._tokenizer = build(renamed(read.description, self._names), read.name)
        self._files = read.files
        self._roles = dict(read.roles)
        self._known = {new: old for old, new in self._names.items()}
        self._written = _any_of(self._names)
        self._drawn = _any_of(self._known)
        decoder = json.dumps(read.description.get("decoder"))
        self._bytes = '"ByteLevel"' in decoder
        self._unsettled = self._waiting(decoder)
        taken = set(ids.values())
        self.vocabulary = max(taken, default=-1) + 1
        self._taken: Container[int] = taken if len(taken) < self.vocabulary else range(self.vocabulary)
        self.control = tuple(sorted(control))
        self.chat_template = read.template
        self.bos_id, self.eos_id, self.unk_id, self.sep_id, self.pad_id, self.cls_id, self.mask_id = (
            ids.get(self._roles[role]) if role in self._roles else None for role in ROLES
        )

    @classmethod
    def load(cls, folder: str | Path) -> TextTokenizer:
        """Read the tokenizer of a Hugging Face folder.

        The first of these that is there counts: `tokenizer.json`; `vocab.txt` (WordPiece); a SentencePiece model
        (`sentencepiece.bpe.model`, `spiece.model`, `tokenizer.model`); `vocab.json` with `merges.txt` (byte-level
        BPE). Which control tokens there are, and how a text is cleaned, is said by `tokenizer_config.json`,
        `special_tokens_map.json` and `added_tokens.json`.

        Raises:
            DataError: there is none, a file is damaged or of a kind that isn't known; names it.
        """
        found = cls.find(folder)
        if found is None:
            raise DataError(f"{folder} has no tokenizer: neither tokenizer.json nor a vocabulary that can be read")
        return found

    @classmethod
    def find(cls, folder: str | Path) -> TextTokenizer | None:
        """Read the tokenizer of a folder as `load` does; None if it has none."""
        read = read_folder(folder)
        return None if read is None else cls(read)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> TextTokenizer:
        """Read the tokenizer inside of a GGUF file.

        Args:
            metadata: the file's keys and values; lists are tuples.
        Raises:
            DataError: there is none, or it is damaged or of a kind that isn't known.
        """
        return cls(read_gguf(metadata))

    @property
    def special_tokens(self) -> dict[str, str]:
        """The control tokens by role, as chat templates call them: `"bos_token"` and so on."""
        return {f"{role}_token": token for role, token in self._roles.items()}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with the control tokens that the checkpoint puts around one.

        Raises:
            DataError: a text longer than a million characters, with half of a surrogate pair, or on which the
                tokenizer fails.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode` does, for many texts at once."""
        return [list(one.ids) for one in self._encode(texts)]

    def encode_pair(self, first: str, second: str) -> EncodedPair:
        """Return the ids of two texts as one input, with the control tokens that the checkpoint puts around them."""
        (found,) = self._encode([(first, second)])
        return EncodedPair(list(found.ids), list(found.type_ids))

    def encode_markup(self, text: str) -> list[int]:
        """Return the ids of a text in which control tokens are meant as such, `"The [MASK] of France"`.

        One that the checkpoint puts at an end of every text is not doubled where it is written there already.
        """
        (found,) = self._encode([self._marked(text)])
        ids, added = list(found.ids), found.special_tokens_mask
        last = len(ids) - 1
        doubled = {0} if last > 0 and added[0] and not added[1] and ids[0] == ids[1] else set()
        doubled |= {last} if last > 0 and added[-1] and not added[-2] and ids[-1] == ids[-2] else set()
        return [one for i, one in enumerate(ids) if i not in doubled]

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of what a chat template wrote: its control tokens count as such, and none are added.

        Those that stand in parts of a message (`polyformer.data.templates.origin.Text`) stay text.
        """
        (found,) = self._encode([self._marked(text)], complete=False)
        return list(found.ids)

    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode_batch` does, with no control tokens around the texts."""
        return [list(one.ids) for one in self._encode(texts, complete=False)]

    def encode_places(self, text: str) -> list[Placed]:
        """Return what `encode` does, and where each token stands in the text; what is put around it stands nowhere."""
        (found,) = self._encode([text])
        added = found.special_tokens_mask
        places = [(0, 0) if own else place for own, place in zip(added, found.offsets, strict=True)]
        return [Placed(number, *place) for number, place in zip(found.ids, places, strict=True)]

    def encode_rendered_places(self, text: str) -> list[Placed]:
        """Return what `encode_rendered` does, and where each token stands in the text.

        Together the places are the whole text: one begins where the last one ended, so that a space that a tokenizer
        leaves out of its own account belongs to the token behind it.
        """
        (found,) = self._encode([self._marked(text)], complete=False)
        back = _back(self._marks(text))
        placed, end = list[Placed](), 0
        for number, (_, stop) in zip(found.ids, found.offsets, strict=True):
            stop = max(back(stop), end)
            placed.append(Placed(number, end, stop))
            end = stop
        return placed

    def decode(self, ids: Iterable[int], keep_control: bool = False) -> str:
        """Return the text of ids.

        Args:
            keep_control: whether special tokens are written too, by their names.
        Raises:
            DataError: an id that the vocabulary doesn't have.
        """
        listed = self._checked(ids)
        text: str = self._tokenizer.decode(listed, skip_special_tokens=not keep_control)
        return self._drawn.sub(lambda found: self._known[found[0]], text)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens of ids as a person can read them; "▁" is a space.

        Raises:
            DataError: an id that the vocabulary doesn't have.
        """
        found = [str(self._tokenizer.id_to_token(one)) for one in self._checked(ids)]
        return [self._known[token] if token in self._known else self._readable(token) for token in found]

    def settled(self, token: int) -> bool:
        """Tell whether the text up to a token stays as it is whatever follows, but for a character that is unfinished.

        Where characters may be spelled in bytes, a run of these is read as a whole, and a wrong one spoils all of it;
        and some tokenizers tidy up the spaces between tokens afterwards.
        """
        return self._unsettled is not None and token not in self._unsettled

    def _waiting(self, decoder: str) -> frozenset[int] | None:
        """Return the tokens whose text depends on what follows; None if that may be any."""
        if '"WordPiece"' in decoder or '"CTC"' in decoder:
            return None
        if '"ByteFallback"' not in decoder:
            return frozenset()
        found = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(one for one in found if one is not None)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary writes it, None if there is none."""
        number: int | None = self._tokenizer.token_to_id(self._names.get(token, token))
        return number

    def save(self, folder: str | Path) -> None:
        """Write the files that it was read from, unchanged; else those from which the reference library reads it."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name, data in (self._files or self._described()).items():
            (place / name).write_bytes(data)

    def _described(self) -> dict[str, bytes]:
        description = renamed(json.loads(self._tokenizer.to_str()), self._known)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        contents = {
            "tokenizer.json": description,
            "tokenizer_config.json": config | self.special_tokens,
            "special_tokens_map.json": self.special_tokens,
        }
        files = {name: json.dumps(said, ensure_ascii=False, indent=1).encode() for name, said in contents.items()}
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template.encode()
        return files

    def _marked(self, text: str) -> str:
        """Put new names in the place of the control tokens that weren't said in a message."""
        marked, at = list[str](), 0
        for start, end, name in self._marks(text):
            marked += (text[at:start], name)
            at = end
        return "".join((*marked, text[at:]))

    def _marks(self, text: str) -> list[tuple[int, int, str]]:
        """Return the places of the control tokens that weren't said in a message, and their new names."""
        starts, ends = [start for start, _ in spans(text)], [end for _, end in spans(text)]

        def was_said(start: int, end: int) -> bool:
            before = bisect.bisect_left(starts, end)
            return before > 0 and ends[before - 1] > start

        found = ((one.start(), one.end(), self._names[one[0]]) for one in self._written.finditer(text))
        return [mark for mark in found if not was_said(mark[0], mark[1])]

    def _encode(self, texts: Sequence[str | tuple[str, str]], complete: bool = True) -> list[Encoding]:
        for one in texts:
            for text in (one,) if isinstance(one, str) else one:
                _refuse_impossible(text)
        return encode_each(lambda some: self._tokenizer.encode_batch(some, add_special_tokens=complete), texts)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        listed = [int(one) for one in ids]
        wrong = next((one for one in listed if one not in self._taken), None)
        if wrong is not None:
            raise DataError(f"there is no token {wrong} in a vocabulary of {self.vocabulary:,}")
        return listed

    def _readable(self, token: str) -> str:
        if not self._bytes:
            return token
        text: str = decoders.ByteLevel().decode([token])
        return text.replace(" ", SPACE)


def _back(marks: Sequence[tuple[int, int, str]]) -> Callable[[int], int]:
    """Return what turns a place in a text with new names into that in the text without."""
    ends, shifts = [0], [0]
    for start, end, name in marks:
        ends.append(start + shifts[-1] + len(name))
        shifts.append(shifts[-1] + len(name) - (end - start))
    return lambda place: place - shifts[bisect.bisect_right(ends, place) - 1]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the first, and of those that begin there the longest, of some tokens."""
    listed = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, listed)) or "(?!)")


def _refuse_impossible(text: str) -> None:
    if len(text) > LONGEST_DOCUMENT:
        raise DataError(
            f"a text of {len(text):,} characters is longer than the {LONGEST_DOCUMENT:,} that are taken at once; "
            f"give it in parts: {text[:40]}…"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text has half of a surrogate pair at character {error.start + 1}, which no tokenizer can take; "
            f"decode it again: {text[:40]!r}"
        ) from None
