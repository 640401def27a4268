"""Byte-level BPE (Radford et al. 2019): `vocab.json` and `merges.txt` of GPT-2, RoBERTa, BART and Qwen2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyformer.data.files import decode_whole
from polyformer.data.vocabularies.format import Json, added, bpe, byte_level, description, sequence, split, table
from polyformer.errors import DataError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = rf"{_CASES[0]}|{_CASES[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
GPT4O = (
    rf"{_CASES[0]}{_CONTRACTIONS}?|{_CASES[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

_GPT2 = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
_ROBERTA = {
    "bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>",
}  # fmt: skip
_QWEN2 = {"eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"}
_KINDS = {
    **dict.fromkeys(("", "gpt2", "gptneo", "gptj", "gptneox", "opt"), _GPT2),
    **dict.fromkeys(("roberta", "bart", "longformer", "led"), _ROBERTA),
    **dict.fromkeys(("qwen2", "qwen3", "qwen2moe", "qwen3moe"), _QWEN2),
}


def read(
    files: Mapping[str, bytes], folder: str, kind: str, config: Json, said: Mapping[str, str]
) -> tuple[Json, dict[str, str]]:
    """Read `vocab.json` and `merges.txt`; returns the description of the tokenizer and its control tokens by role.

    Args:
        kind: whose tokenizer it is; "" for GPT-2's.
        config: `tokenizer_config.json`; `add_prefix_space` counts.
        said: control tokens that are not called as the kind calls them.
    Raises:
        DataError: a damaged file, a merge of tokens that the vocabulary lacks, or an unknown kind.
    """
    if kind not in _KINDS:
        known = ", ".join(sorted(filter(None, _KINDS)))
        raise DataError(
            f"{folder}: vocab.json and merges.txt of '{kind}' can't be read (known: {known}); save the folder with "
            "the reference library so that it gets a tokenizer.json"
        )
    ids = table(files["vocab.json"], f"{folder}/vocab.json")
    pairs = merges(files["merges.txt"], f"{folder}/merges.txt", ids)
    roles = {role: token for role, token in {**_KINDS[kind], **said}.items() if token in ids}
    prefix = bool(config.get("add_prefix_space", False))
    made = describe(ids, pairs, QWEN2 if _KINDS[kind] is _QWEN2 else None, prefix)
    if _KINDS[kind] is _QWEN2:
        made["normalizer"] = {"type": "NFC"}
    if _KINDS[kind] is _ROBERTA:
        if not {"sep", "cls"} <= roles.keys():
            raise DataError(f"{folder}/vocab.json lacks the token <s> or </s>")
        ends = {role: [roles[role], ids[roles[role]]] for role in ("sep", "cls")}
        made["post_processor"] = {"type": "RobertaProcessing", **ends, "trim_offsets": True, "add_prefix_space": prefix}
    made["added_tokens"] = [added(token, ids[token]) for token in sorted(set(roles.values()), key=ids.__getitem__)]
    return made, roles


def describe(ids: Mapping[str, int], pairs: Sequence[str], pattern: str | None = None, prefix: bool = False) -> Json:
    """Return the description of byte-level BPE; `pattern` cuts a text into words, GPT-2's own if None."""
    words = byte_level(prefix, regex=pattern is None)
    return description(
        bpe(ids, pairs, continuing_subword_prefix="", end_of_word_suffix=""),
        pre_tokenizer=words if pattern is None else sequence("pretokenizers", split(pattern), words),
        decoder=byte_level(),
    )


def merges(data: bytes, name: str, ids: Mapping[str, int]) -> list[str]:
    """Read `merges.txt`; raises `DataError` naming the line that is no pair, or whose tokens are unknown."""
    found = []
    for number, line in enumerate(decode_whole(data, name).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise DataError(f"{name}, line {number}: not two tokens with a space between them")
        unknown = next((token for token in (*pair, "".join(pair)) if token not in ids), None)
        if unknown is not None:
            raise DataError(f"{name}, line {number}: the vocabulary has no '{unknown[:80]}'")
        found.append(line)
    return found


def alphabet() -> dict[int, str]:
    """Return the letter that stands for each byte: itself where it prints, else the next free one from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
