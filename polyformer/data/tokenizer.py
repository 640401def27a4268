"""The tokenizer of a translation model: both sides, control tokens, and tags for the target language."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer, decoders

from polyformer.data.files import decode_whole, read_whole
from polyformer.data.pairs import Pair
from polyformer.data.text import normalise
from polyformer.data.vocabulary import (
    BOS,
    EOS,
    PAD,
    SPACE,
    SPECIAL,
    UNK,
    Kind,
    TokenizerRecipe,
    encode_each,
    learn,
    parse_tokenizer,
)
from polyformer.errors import DataError, SpecError
from polyformer.spec import Record

LONGEST_TEXT = 100_000  # characters; longer ones are refused before they cost minutes
_ABOUT = "pair.json"


class TextPairTokenizer(Protocol):
    """What training, search and evaluation ask of a tokenizer; the ids are the model's."""

    source_vocabulary: int
    target_vocabulary: int
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int

    def encode_source(self, text: str, target_language: str | None = None) -> list[int]: ...
    def encode_target(self, text: str) -> list[int]: ...
    def encode_sources(self, texts: Sequence[str], languages: Sequence[str | None]) -> list[list[int]]: ...
    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode_target(self, ids: Iterable[int]) -> str: ...
    def source_tokens(self, ids: Iterable[int]) -> list[str]: ...
    def target_tokens(self, ids: Iterable[int]) -> list[str]: ...
    def save(self, folder: str | Path) -> None: ...


class PairTokenizerFile(Record):
    """What a saved `PairTokenizer` says of itself, beside the files of the `tokenizers` library.

    Attributes:
        kind: as in `TokenizerRecipe`.
        joint: whether there is one vocabulary, `tokenizer.json`, or `source.json` and `target.json`.
        source_languages, target_languages: those it was trained on; several target languages have tags.
    """

    kind: Kind
    joint: bool
    source_languages: tuple[str, ...]
    target_languages: tuple[str, ...]

    def check(self) -> None:
        self.require(bool(self.source_languages and self.target_languages), "should name languages on both sides")

    @property
    def tags(self) -> tuple[str, ...]:
        """The tokens that say which language is wanted, first in the source (Johnson et al. 2017)."""
        several = len(self.target_languages) > 1
        return tuple(f"<2{language}>" for language in self.target_languages) if several else ()


class PairTokenizer:
    """Turns sources and targets into ids and back.

    The ids of the control tokens are the same on both sides: pad 0, bos 1 (the decoder's first input), eos 2, unk 3;
    tags follow from 4. Text is normalised (`polyformer.data.text.normalise`) before it is encoded, and nothing that
    is typed in it becomes a control token.
    """

    pad_id, bos_id, eos_id, unk_id = PAD, BOS, EOS, UNK

    def __init__(self, about: PairTokenizerFile, source: Tokenizer, target: Tokenizer) -> None:
        self.about = about
        self.source_vocabulary: int = source.get_vocab_size()
        self.target_vocabulary: int = target.get_vocab_size()
        self._source, self._target = source, target

    @classmethod
    def train(cls, pairs: Sequence[Pair], recipe: TokenizerRecipe) -> PairTokenizer:
        """Learn the vocabulary of a recipe; more than one target language gives tags.

        Raises:
            DataError: no pairs, or they give fewer tokens than the recipe wants (says how many).
        """
        if not pairs:
            raise DataError("there are no pairs to learn a vocabulary from")
        about = PairTokenizerFile(
            recipe.kind,
            recipe.joint,
            tuple(sorted({pair.source_language for pair in pairs})),
            tuple(sorted({pair.target_language for pair in pairs})),
        )
        sources, targets = [pair.source for pair in pairs], [pair.target for pair in pairs]
        if recipe.joint:
            both = learn(sources + targets, recipe, SPECIAL + about.tags, "training pairs")
            return cls(about, both, both)
        source = learn(sources, recipe, SPECIAL + about.tags, "sources of the training pairs")
        return cls(about, source, learn(targets, recipe, SPECIAL, "targets of the training pairs"))

    @property
    def source_languages(self) -> tuple[str, ...]:
        """Those it was trained on."""
        return self.about.source_languages

    @property
    def target_languages(self) -> tuple[str, ...]:
        """Those it was trained on; where there are several, a source must say which is wanted."""
        return self.about.target_languages

    def encode_source(self, text: str, target_language: str | None = None) -> list[int]:
        """Return the ids of a source text: the tag of the target language where there are tags, the text, eos.

        Raises:
            DataError: a target language that is unknown, or not named where there are several; a text that the
                tokenizer can't take.
        """
        return self.encode_sources([text], [target_language])[0]

    def encode_target(self, text: str) -> list[int]:
        """Return the ids of a target text and eos; raises `DataError` for a text that the tokenizer can't take."""
        return self.encode_targets([text])[0]

    def encode_sources(self, texts: Sequence[str], languages: Sequence[str | None]) -> list[list[int]]:
        """Return what `encode_source` does, for many texts at once."""
        tags = {language: self._tag(language) for language in set(languages)}
        encoded = _encode(self._source, texts)
        return [[*tags[language], *ids, EOS] for language, ids in zip(languages, encoded, strict=True)]

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode_target` does, for many texts at once."""
        return [[*ids, EOS] for ids in _encode(self._target, texts)]

    def decode_target(self, ids: Iterable[int]) -> str:
        """Return the text of target ids; control tokens are left out."""
        first = len(SPECIAL) + (len(self.about.tags) if self.about.joint else 0)
        text: str = self._target.decode([i for i in ids if i >= first], skip_special_tokens=False)
        return text

    def source_tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens of source ids as a person can read them, for pictures; "▁" is a space."""
        return [self._token(self._source, i) for i in ids]

    def target_tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens of target ids as a person can read them, for pictures; "▁" is a space."""
        return [self._token(self._target, i) for i in ids]

    def save(self, folder: str | Path) -> None:
        """Write `pair.json` and the vocabularies into `folder`, which is made if it is not there."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name, tokenizer in zip(_names(self.about), (self._source, self._target), strict=False):
            (place / name).write_text(tokenizer.to_str(), encoding="utf-8")
        (place / _ABOUT).write_text(self.about.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> PairTokenizer:
        """Read what `save` wrote.

        Raises:
            DataError: a file is missing, damaged, or of another tokenizer; names it.
        """
        place = Path(folder)
        try:
            about = PairTokenizerFile.from_json(_read(place / _ABOUT), str(place / _ABOUT))
        except SpecError as error:
            raise DataError(str(error)) from None
        read = [parse_tokenizer(_read(place / name), str(place / name)) for name in _names(about)]
        for name, tokenizer, control in zip(_names(about), read, (SPECIAL + about.tags, SPECIAL), strict=False):
            if any(tokenizer.id_to_token(i) != token for i, token in enumerate(control)):
                raise DataError(f"{place / name} doesn't begin with the control tokens {' '.join(control)}")
        return cls(about, read[0], read[-1])

    def _tag(self, language: str | None) -> list[int]:
        known = self.about.target_languages
        if language is None and len(known) == 1:
            return []
        if language not in known:
            said = (
                "a target language must be named"
                if language is None
                else f"the target language '{language}' is not known"
            )
            raise DataError(f"{said}: this tokenizer was trained for {', '.join(known)}")
        return [len(SPECIAL) + known.index(language)] if len(known) > 1 else []

    def _token(self, tokenizer: Tokenizer, i: int) -> str:
        token: str | None = tokenizer.id_to_token(i)
        if token is None:
            raise DataError(f"there is no token {i} in a vocabulary of {tokenizer.get_vocab_size():,}")
        if self.about.kind != "byte_bpe" or i < len(SPECIAL) + len(self.about.tags):
            return token
        text: str = decoders.ByteLevel().decode([token])
        return text.replace(" ", SPACE)


def _names(about: PairTokenizerFile) -> tuple[str, ...]:
    return ("tokenizer.json",) if about.joint else ("source.json", "target.json")


def _read(path: Path) -> str:
    return decode_whole(read_whole(path), str(path))


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Normalise and encode texts, without control tokens."""
    ready = [normalise(text) for text in texts]
    longest = max(ready, key=len, default="")
    if len(longest) > LONGEST_TEXT:
        raise DataError(
            f"a text of {len(longest):,} characters is longer than the {LONGEST_TEXT:,} that are taken at once; "
            f"give it sentence by sentence: {longest[:40]}…"
        )
    distinct = list(dict.fromkeys(ready))
    encoded = encode_each(lambda some: tokenizer.encode_batch_fast(some, add_special_tokens=False), distinct)
    ids = {text: encoding.ids for text, encoding in zip(distinct, encoded, strict=True)}
    return [ids[text] for text in ready]
