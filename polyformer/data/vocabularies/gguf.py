"""The vocabularies inside of GGUF files, which llama.cpp defines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from polyformer.data.vocabularies import bytes_bpe, sentencepiece, words
from polyformer.data.vocabularies.bytes_bpe import GPT4O, LLAMA3, QWEN2, TEKKEN
from polyformer.data.vocabularies.format import (
    SPACE,
    Json,
    Vocabulary,
    added,
    bos_and_eos,
    byte_level,
    description,
    metaspace,
    precompiled,
    replace,
    sequence,
    template,
    unigram,
)
from polyformer.data.vocabularies.protobuf import LONGEST_PIECE
from polyformer.errors import DataError, suggest

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_ROLES = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelled so in the format
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
_EXTRA = re.compile(r"\[PAD\d+\]")

# How a text is cut into words before byte-level BPE: a regular expression, or digits one by one and then as GPT-2 does.
_DIGITS = "digits"
_WORDS: dict[str, str | None] = {
    **dict.fromkeys(("", "default", "gpt-2", "gpt2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "dbrx-gpt2"), None),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
    "tekken": TEKKEN,
}
_STARTED = {"llama3", "llama-v3", "llama-bpe", "tekken"}  # those that begin with BOS where the file doesn't say


def read_gguf(metadata: Mapping[str, Any], name: str = "the GGUF file") -> Vocabulary:
    """Read the vocabulary among a GGUF file's metadata.

    Args:
        metadata: plain values by key; lists are tuples.
    Raises:
        DataError: there is none, its lists don't fit each other, or it is of a kind that isn't known.
    """
    read = _Reader(metadata, name)
    makers = {"gpt2": _bytes, "llama": _pieces, "t5": _unigram, "bert": _words}
    kind = read.text("model", "")
    if kind not in makers:
        raise DataError(f"{name} has a tokenizer of the kind '{kind[:80]}', which can't be read{suggest(kind, makers)}")
    tokens = read.strings("tokens")
    if len(set(tokens)) < len(tokens):
        ids = {token: i for i, token in enumerate(tokens)}
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise DataError(f"{name} has the token '{twice[:80]}' twice")
    roles = {role: tokens[i] for role, key in _ROLES.items() if (i := read.number(key, len(tokens))) is not None}
    made = makers[kind](read, tokens, roles)
    made["added_tokens"] = _added(read, list(made.pop("names", tokens)), set(roles.values()), kind)
    starts = kind == "llama" or (kind == "gpt2" and read.text("pre", "") in _STARTED)
    if kind in ("gpt2", "llama"):
        bos = roles.get("bos") if read.flag("add_bos_token", starts) else None
        made = bos_and_eos(made, bos, roles.get("eos") if read.flag("add_eos_token", False) else None)
    said = metadata.get("tokenizer.chat_template")
    return Vocabulary(made, roles, said if isinstance(said, str) else None, {}, name)


class _Reader:
    """Takes values out of the metadata, and refuses those of the wrong kind."""

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self.metadata, self.name = metadata, name

    def _of(self, key: str, kind: type, default: Any) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise DataError(f"{self.name}: tokenizer.ggml.{key} should be of the kind {kind.__name__}")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        return str(self._of(key, str, default))

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return bool(self._of(key, bool, default))

    def number(self, key: str, tokens: int) -> int | None:
        """The id of a token, if the file names it."""
        value: int | None = self._of(key, int, None)
        if value is not None and not 0 <= value < tokens:
            raise DataError(f"{self.name}: tokenizer.ggml.{key} is {value}, but there are only {tokens:,} tokens")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings, which must be there."""
        value = self._of(key, tuple, ())
        if not value or not all(isinstance(one, str) for one in value):
            raise DataError(f"{self.name} lacks tokenizer.ggml.{key}, a list of strings")
        return tuple(value)

    def numbers(self, key: str, tokens: int) -> tuple[float, ...]:
        """A list of numbers, one for each token, or none at all."""
        value = self._of(key, tuple, ())
        if value and (len(value) != tokens or not all(isinstance(one, (int, float)) for one in value)):
            raise DataError(f"{self.name}: tokenizer.ggml.{key} should have a number for each of the {tokens:,} tokens")
        return tuple(value)

    @property
    def architecture(self) -> str:
        """Whose weights the file holds."""
        return str(self.metadata.get("general.architecture", ""))


def _bytes(read: _Reader, tokens: Sequence[str], roles: Mapping[str, str]) -> Json:
    pre = read.text("pre", "")
    if pre not in _WORDS:
        raise DataError(f"{read.name} cuts texts by '{pre[:80]}', which isn't known here{suggest(pre, _WORDS)}")
    ids = {token: i for i, token in enumerate(tokens)}
    merges = read.strings("merges")
    for written in merges:
        left, _, right = written.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise DataError(f"{read.name}: '{written[:80]}' is no merge of two tokens to a third")
    pattern = _WORDS[pre]
    made = bytes_bpe.describe(ids, merges, None if pattern == _DIGITS else pattern)
    if pattern == _DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        made["pre_tokenizer"] = sequence("pretokenizers", digits, byte_level())
    if pattern == QWEN2:
        made["normalizer"] = {"type": "NFC"}
    made["model"]["ignore_merges"] = pattern == LLAMA3
    return made


def _pieces(read: _Reader, tokens: Sequence[str], roles: Mapping[str, str]) -> Json:
    gemma = read.architecture.startswith("gemma")
    # Gemma's tokens of several spaces are written with real ones, and its scores don't follow its merges.
    names = [SPACE * len(one) if gemma and len(one) > 1 and not one.strip(" ") else one for one in tokens]
    scores = read.numbers("scores", len(tokens))
    if not gemma and not scores:
        raise DataError(f"{read.name} lacks tokenizer.ggml.scores")
    longest = max(map(len, names))
    if longest > LONGEST_PIECE:
        raise DataError(f"{read.name} has a token of {longest:,} characters, where {LONGEST_PIECE} are the most")
    pairs = sentencepiece.merges(names, None if gemma else [-score for score in scores])
    ids = {token: i for i, token in enumerate(names)}
    prefix = read.flag("add_space_prefix", True)
    made = sentencepiece.describe_merging(
        ids, pairs, "gemma" if gemma else "llama", {"add_prefix_space": prefix}, roles.get("unk")
    )
    if read.architecture == "phi3":  # a space is put before a text that begins with one, too
        made |= {"normalizer": sequence("normalizers", {"type": "Prepend", "prepend": SPACE}, replace(" ", SPACE))}
        made["pre_tokenizer"] = None
    return made | {"names": names}


def _unigram(read: _Reader, tokens: Sequence[str], roles: Mapping[str, str]) -> Json:
    scores = read.numbers("scores", len(tokens))
    if not scores or not {"eos", "unk"} <= roles.keys():
        raise DataError(f"{read.name} lacks tokenizer.ggml.scores, eos_token_id or unknown_token_id")
    names, number = list(tokens), 100
    for i, token in enumerate(tokens):  # the blanks of T5 are only padding to llama.cpp
        if number and _EXTRA.fullmatch(token):
            number -= 1
            names[i] = f"<extra_id_{number}>"
    charsmap = read.numbers("precompiled_charsmap", len(read.metadata.get("tokenizer.ggml.precompiled_charsmap", ())))
    eos = roles["eos"]
    made = description(
        unigram(list(zip(names, scores, strict=True)), tokens.index(roles["unk"])),
        normalizer=precompiled(bytes(int(byte) & 255 for byte in charsmap)),
        pre_tokenizer=sequence("pretokenizers", {"type": "WhitespaceSplit"}, metaspace()),
        post_processor=template(f"$A {eos}", f"$A {eos} $B {eos}", {eos: tokens.index(eos)}),
        decoder=metaspace(),
    )
    return made | {"names": names}


def _words(read: _Reader, tokens: Sequence[str], roles: dict[str, str]) -> Json:
    """BERT's: llama.cpp marks the tokens that begin a word instead of those that continue one."""
    kinds = read.numbers("token_type", len(tokens)) or (_NORMAL,) * len(tokens)
    names = [
        one if kind == _CONTROL or one in roles.values() or re.fullmatch(r"\[.+\]", one)
        else one[1:] if one.startswith(SPACE) else f"##{one}"
        for one, kind in zip(tokens, kinds, strict=True)
    ]  # fmt: skip
    ids = {token: i for i, token in enumerate(names)}
    made, known = words.describe(ids, read.name, {}, {**words.ROLES, **roles})
    roles |= known
    return made | {"names": names}


def _added(read: _Reader, names: Sequence[str], control: set[str], kind: str) -> list[Json]:
    kinds = read.numbers("token_type", len(names))
    found = []
    for i, token in enumerate(names):
        sort = kinds[i] if kinds else _NORMAL
        special = sort == _CONTROL or token in control or (kind == "t5" and token.startswith("<extra_id_"))
        if token and (special or sort == _USER_DEFINED):
            found.append(added(token, i, special))
    return found
