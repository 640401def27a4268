"""A tokenizer whose control tokens nobody can type.

The `tokenizers` library looks for added tokens in every text before its model runs, whoever wrote the text; and models
other than BPE find control tokens in their vocabulary too. (Its switch `encode_special_tokens` holds back neither the
latter nor added tokens that are not "special".) So the control tokens get new names here, drawn at random, under which
the library knows them; their ids stay. A text is only ever compared with the names that it can't have, and where a
control token is meant, its new name is put in.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, models

from polyformer.data.vocabularies.format import Json
from polyformer.data.vocabulary import parse_tokenizer, reported
from polyformer.errors import DataError


def new_names(control: Iterable[str]) -> dict[str, str]:
    """Draw a new name for each control token: private characters around a random number."""
    drawn = secrets.token_hex(8)
    return {token: f"\ue000{drawn}{number:x}\ue001" for number, token in enumerate(sorted(control))}


def renamed(description: Json, names: Mapping[str, str]) -> Json:
    """Return a description whose tokens have other names, and neither truncates nor pads.

    Added tokens that the model lacks are entered into its vocabulary, so that each keeps the id that it is said to
    have; the library would number them anew.
    """
    model = dict(description["model"])
    tokens = [one | {"content": names.get(one["content"], one["content"])} for one in description["added_tokens"]]
    if isinstance(model["vocab"], dict):
        vocabulary = {names.get(token, token): i for token, i in model["vocab"].items()}
        model["vocab"] = vocabulary | {one["content"]: one["id"] for one in tokens if one["content"] not in vocabulary}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]
    return description | {"model": model, "added_tokens": tokens, "truncation": None, "padding": None}


def _touches(merge: str | Sequence[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


_OPTIONS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def _made(description: Json, name: str) -> Tokenizer:
    """Make what a description says. Merges are handed over as they are: as text they take longer and more memory."""
    model, tokens = description["model"], description["added_tokens"]
    odd = model.keys() - {"type", "vocab", "merges", *_OPTIONS}
    if model.get("type") != "BPE" or odd or any(not one.keys() >= set(_FLAGS) for one in tokens):
        return parse_tokenizer(json.dumps(description, check_circular=False), name)
    empty = description | {"model": model | {"vocab": {}, "merges": []}, "added_tokens": []}
    tokenizer = parse_tokenizer(json.dumps(empty), name)
    with reported(lambda error: f"{name} is no tokenizer: {error}"):
        merges = [tuple(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]]
        options = {key: model[key] for key in _OPTIONS if model.get(key) is not None}
        tokenizer.model = models.BPE(model["vocab"], merges, **options)
        for special, some in itertools.groupby(tokens, lambda one: bool(one.get("special"))):
            add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
            add([AddedToken(one["content"], **{flag: one[flag] for flag in _FLAGS}) for one in some])
    return tokenizer


def build(description: Json, name: str) -> Tokenizer:
    """Make the library's tokenizer.

    Raises:
        DataError: the description is none that the library takes, or gives a token an id that it can't have.
    """
    tokenizer = _made(description, name)
    for one in description["added_tokens"]:
        number = tokenizer.token_to_id(one["content"])
        if number != one["id"]:
            raise DataError(
                f"{name} gives the added token '{one['content'][:80]}' the id {one['id']}, where it can only be "
                f"{number}: the vocabulary has holes, or two tokens for one id"
            )
    return tokenizer
