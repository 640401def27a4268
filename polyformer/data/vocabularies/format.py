"""The format of `tokenizer.json`, which every other format of vocabularies is translated to.

It describes a pipeline of the `tokenizers` library: a normalizer, a pre-tokenizer, a model, a post-processor that adds
control tokens, a decoder, and the tokens that are looked for before the model runs.
"""

from __future__ import annotations

import base64
import collections
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from polyformer.data.files import decode_whole
from polyformer.errors import DataError

SPACE = "▁"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

LARGEST_ID = 1 << 24

Json = dict[str, Any]


class Vocabulary(NamedTuple):
    """A tokenizer as some file describes it.

    Attributes:
        description: what `tokenizer.json` would say.
        roles: the control tokens by what they are for, as in `ROLES`.
        template: the chat template.
        files: what lay in the folder, to be written back as it was.
        name: what to call it in messages.
    """

    description: Json
    roles: Mapping[str, str]
    template: str | None
    files: Mapping[str, bytes]
    name: str


def parse(data: bytes, name: str) -> Json:
    """Read a JSON object; raises `DataError` for anything else, and for one that has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> Json:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
            raise DataError(f"{name} has the key '{twice[:100]}' twice; it is damaged or made to mislead")
        return found

    try:
        found = json.loads(decode_whole(data, name), object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is no usable JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{name} should hold a JSON object, not a {type(found).__name__}")
    return found


def table(data: bytes, name: str) -> dict[str, int]:
    """Read a JSON object of tokens and their ids; raises `DataError` if it is none, or two tokens have one id."""
    found = parse(data, name)
    if not found or not all(type(i) is int and i >= 0 for i in found.values()):
        raise DataError(f"{name} should be a table of tokens and their numbers")
    if len(set(found.values())) < len(found):
        i, _ = collections.Counter(found.values()).most_common(1)[0]
        raise DataError(f"{name} gives the number {i} to two tokens")
    return found


def checked(description: Json, name: str) -> Json:
    """Return a description that was read, with the parts that are worked with here of the right kinds.

    Raises:
        DataError: they aren't; the library checks the rest.
    """
    model, tokens = description.get("model"), description.setdefault("added_tokens", [])
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        sound = all(type(i) is int and 0 <= i < LARGEST_ID for i in vocabulary.values())
    else:
        sound = isinstance(vocabulary, list) and all(
            isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) for one in vocabulary
        )
    if not isinstance(model, dict) or not sound:
        raise DataError(f"{name} has no usable vocabulary: model.vocab should be a table of tokens and their numbers")
    if not isinstance(model.get("unk_token", ""), (str, type(None))):
        raise DataError(f"{name}: model.unk_token should be a token")
    for one in model.get("merges") or ():
        pair = one.split(" ") if isinstance(one, str) else one
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not str:
            raise DataError(f"{name}: {one!r:.80} in model.merges is no pair of tokens")
    for one in tokens if isinstance(tokens, list) else [None]:
        if not isinstance(one, dict) or not isinstance(one.get("content"), str) or type(one.get("id")) is not int:
            raise DataError(f"{name} has an added token without content or id")
        if not 0 <= one["id"] < LARGEST_ID:
            raise DataError(f"{name} gives the added token '{one['content'][:80]}' the impossible id {one['id']}")
    return description


def description(model: Json, **stages: Any) -> Json:
    """Put a `tokenizer.json` together; stages that aren't given do nothing."""
    made: Json = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    made |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return made | stages | {"model": model}


def added(token: str, number: int, special: bool = True, **flags: bool) -> Json:
    """Describe a token that is looked for before the model runs; `special` ones are for control."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": token, **plain, "special": special, **flags}


def ids_of(model: Json) -> dict[str, int]:
    """Return a model's tokens and their ids."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: i for i, (piece, *_) in enumerate(vocabulary)}


def sequence(what: str, *stages: Json | None) -> Json | None:
    """Run stages one after another; `what` is how the format calls a list of them."""
    there = [stage for stage in stages if stage is not None]
    if len(there) > 1:
        return {"type": "Sequence", what: there}
    return there[0] if there else None


def replace(old: str, new: str) -> Json:
    """A normalizer or decoder that replaces text."""
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def split(pattern: str, behavior: str = "Isolated") -> Json:
    """A pre-tokenizer that cuts at a regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def byte_level(prefix: bool = False, regex: bool = True) -> Json:
    """A pre-tokenizer or decoder between bytes and the letters that stand for them (GPT-2)."""
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


def metaspace(scheme: str = "always", cuts: bool = True) -> Json:
    """A pre-tokenizer or decoder between spaces and "▁"; `scheme` says when one is put before a text."""
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": cuts}


def precompiled(charsmap: bytes) -> Json | None:
    """The normalizer of a SentencePiece model."""
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()} if charsmap else None


def byte_fallback(strip: bool) -> Json:
    """The decoder of SentencePiece models that write unknown characters as bytes."""
    found = sequence(
        "decoders",
        replace(SPACE, " "),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0} if strip else None,
    )
    assert found is not None
    return found


def bpe(vocabulary: Mapping[str, int], merges: Sequence[str], **options: Any) -> Json:
    """A model of byte-pair encoding (Sennrich et al. 2016); `merges` are pairs of tokens, a space between them."""
    plain: Json = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return plain | options | {"vocab": dict(vocabulary), "merges": list(merges)}


def unigram(pieces: Sequence[tuple[str, float]], unk: int, fallback: bool = False) -> Json:
    """A unigram language model (Kudo 2018)."""
    return {"type": "Unigram", "unk_id": unk, "vocab": [list(one) for one in pieces], "byte_fallback": fallback}


def wordpiece(vocabulary: Mapping[str, int], unk: str) -> Json:
    """A WordPiece model (Schuster and Nakajima 2012; Devlin et al. 2019)."""
    prefix = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return {"type": "WordPiece", "unk_token": unk, **prefix, "vocab": dict(vocabulary)}


_PART = re.compile(r"(?P<token>.+?)(?::(?P<type>\d))?")


def template(single: str, pair: str, ids: Mapping[str, int]) -> Json:
    """A post-processor that puts control tokens around a text, `"[CLS] $A [SEP]"`, or two.

    Args:
        single, pair: tokens and the texts "$A" and "$B", between spaces; ":1" after one gives it that type.
        ids: the number of each token.
    """

    def part(written: str) -> Json:
        found = _PART.fullmatch(written)
        assert found is not None
        token, number = found["token"], int(found["type"] or 0)
        if token in ("$A", "$B"):
            return {"Sequence": {"id": token[1], "type_id": number}}
        return {"SpecialToken": {"id": token, "type_id": number}}

    parts = {"single": [part(one) for one in single.split()], "pair": [part(one) for one in pair.split()]}
    used = {one["SpecialToken"]["id"] for side in parts.values() for one in side if "SpecialToken" in one}
    tokens = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in sorted(used)}
    return {"type": "TemplateProcessing", **parts, "special_tokens": tokens}


def bos_and_eos(description: Json, bos: str | None, eos: str | None) -> Json:
    """Return the description with a post-processor that puts `bos` before a text and `eos` after it, where given."""
    ids = all_ids(description)
    bos, eos = (token if token in ids else None for token in (bos, eos))
    single = " ".join(one for one in (bos, "$A", eos) if one)
    second = " ".join(f"{one}:1" for one in (bos, "$B", eos) if one)
    return description | {"post_processor": template(single, f"{single} {second}", ids)}


def all_ids(description: Json) -> dict[str, int]:
    """Return the ids of a description's tokens, the added ones included."""
    return ids_of(description["model"]) | {one["content"]: one["id"] for one in description["added_tokens"]}
