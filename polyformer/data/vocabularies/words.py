"""WordPiece vocabularies: `vocab.txt`, a token on each line (BERT, DistilBERT, ELECTRA)."""

from __future__ import annotations

from collections.abc import Mapping

from polyformer.data.files import decode_whole
from polyformer.data.vocabularies.format import Json, added, description, template, wordpiece
from polyformer.errors import DataError

ROLES = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}


def read(data: bytes, name: str, config: Json, said: Mapping[str, str]) -> tuple[Json, dict[str, str]]:
    """Read `vocab.txt`; returns the description of the tokenizer and its control tokens by role.

    Args:
        config: `tokenizer_config.json`: `do_lower_case`, `strip_accents` and `tokenize_chinese_chars` count.
        said: control tokens that are not called as BERT calls them.
    Raises:
        DataError: a token stands there twice, or the tokens for unknown words, start and end are not among them.
    """
    lines = decode_whole(data, name).removesuffix("\n").split("\n")
    tokens = [line.removesuffix("\r") for line in lines]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        places = f"lines {tokens.index(twice) + 1} and {ids[twice] + 1}"
        raise DataError(f"{name} has the token '{twice[:80]}' twice, in {places}")
    return describe(ids, name, config, {**ROLES, **said})


def describe(ids: Mapping[str, int], name: str, config: Json, roles: Mapping[str, str]) -> tuple[Json, dict[str, str]]:
    """Return the description of BERT's tokenizer for a vocabulary, and its control tokens by role."""
    lacking = next((roles[role] for role in ("unk", "cls", "sep") if roles[role] not in ids), None)
    if lacking is not None:
        raise DataError(f"{name} lacks the token {lacking}")
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
        "strip_accents": config.get("strip_accents"),
        "lowercase": bool(config.get("do_lower_case", True)),
    }
    cls, sep = roles["cls"], roles["sep"]
    made = description(
        wordpiece(ids, roles["unk"]),
        normalizer=normalizer,
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=template(f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1", ids),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )
    known = {role: token for role, token in roles.items() if token in ids}
    made["added_tokens"] = [added(token, ids[token]) for token in sorted(set(known.values()), key=ids.__getitem__)]
    return made, known
