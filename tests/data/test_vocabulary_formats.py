"""Every format of vocabularies against the reference library: the same ids from the same folder."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.data.vocabularies.protobuf import read_model
from polyformer.data.vocabularies.sentencepiece import merges
from polyformer.errors import DataError

from .published import FOLDERS, MERGES, TEXTS, UNIGRAM, made, sentencepiece_model, write_json

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
pytest.importorskip("sentencepiece")

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.mark.parametrize("name", FOLDERS)
def test_it_gives_the_ids_of_the_reference_library(root: Path, name: str) -> None:
    folder = made(root, name)
    tokens, reference = TextTokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    assert tokens.encode_batch(TEXTS) == [reference(text).input_ids for text in TEXTS]
    for first, second in [("Open the file", "copy 2"), ("打开文件", "Öffne")]:
        pair, told = tokens.encode_pair(first, second), reference(first, second)
        assert pair.input_ids == told.input_ids
        assert pair.token_type_ids == told.get("token_type_ids", pair.token_type_ids)
    roles = {role: getattr(reference, f"{role}_token_id") for role in ROLES}
    # A token that the vocabulary lacks is added to it by the reference library; a model would have no row for it.
    known = {role: i for role, i in roles.items() if i is None or i < tokens.vocabulary}
    assert {role: getattr(tokens, f"{role}_id") for role in known} == known


@pytest.mark.parametrize("name", sorted(FOLDERS.keys() - {"m2m100"}))  # there the reference library skips less
def test_it_decodes_as_the_reference_library(root: Path, name: str) -> None:
    folder = made(root, name)
    tokens, reference = TextTokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        ids = tokens.encode(text)
        assert tokens.decode(ids, keep_control=True) == reference.decode(ids)
        assert tokens.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_the_reference_library_saved_is_read_to_the_same_ids(root: Path, name: str, tmp_path: Path) -> None:
    folder = made(root, name)
    reference = transformers.AutoTokenizer.from_pretrained(str(folder))
    reference.save_pretrained(str(tmp_path))
    tokens, again = TextTokenizer.load(folder), TextTokenizer.load(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() or name == "m2m100"
    assert again.encode_batch(TEXTS) == tokens.encode_batch(TEXTS)
    for role in ROLES:
        number = getattr(tokens, f"{role}_id")
        assert getattr(again, f"{role}_id") == number or number is None


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_it_is_as_it_was(root: Path, name: str, tmp_path: Path) -> None:
    folder = made(root, name)
    TextTokenizer.load(folder).save(tmp_path / "copy")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == files


# -- GGUF files: the vocabularies above as llama.cpp's converter writes them


def metadata(kind: str, tokens: list[str], **more: Any) -> dict[str, Any]:
    """The keys of a GGUF file that concern its tokenizer."""
    keys = {"model": kind, "tokens": tuple(tokens), **more}
    return {"general.architecture": "llama", **{f"tokenizer.ggml.{key}": value for key, value in keys.items()}}


def of_model(path: Path, kind: str, **more: Any) -> dict[str, Any]:
    """The keys for a SentencePiece model."""
    model = read_model(path.read_bytes(), str(path))
    ids = {"bos_token_id": model.bos, "eos_token_id": model.eos, "unknown_token_id": model.unk}
    ids = {key: i for key, i in ids.items() if i >= 0}
    scores, kinds = tuple(model.scores), tuple(model.kinds)
    return metadata(kind, model.pieces, scores=scores, token_type=kinds, **ids, **more)


def same_ids(tokens: TextTokenizer, folder: Path) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert tokens.encode_batch(TEXTS) == [reference(text).input_ids for text in TEXTS]


def test_sentencepiece_merges_inside_a_gguf_file(root: Path) -> None:
    folder = made(root, "llama")
    tokens = TextTokenizer.from_gguf(of_model(folder / "tokenizer.model", "llama"))
    same_ids(tokens, folder)
    assert tokens.encode("Open")[0] == tokens.bos_id
    plain = TextTokenizer.from_gguf(of_model(folder / "tokenizer.model", "llama", add_bos_token=False))
    assert plain.encode("Open") == tokens.encode("Open")[1:]
    ends = TextTokenizer.from_gguf(of_model(folder / "tokenizer.model", "llama", add_eos_token=True))
    assert ends.encode("Open") == [*tokens.encode("Open"), tokens.eos_id]
    bare = TextTokenizer.from_gguf(of_model(folder / "tokenizer.model", "llama", add_space_prefix=False))
    assert bare.encode("Open") != tokens.encode("Open")


def test_gemmas_merges_inside_a_gguf_file_follow_the_ids(root: Path) -> None:
    folder = made(root, "gemma")
    keys = of_model(folder / "tokenizer.model", "llama") | {"general.architecture": "gemma2"}
    keys["tokenizer.ggml.scores"] = tuple(0.0 for _ in keys["tokenizer.ggml.scores"])
    spaces = ["▁▁", "▁▁▁"]
    keys["tokenizer.ggml.tokens"] = tuple(
        piece.replace("▁", " ") if piece in spaces else piece for piece in keys["tokenizer.ggml.tokens"]
    )
    same_ids(TextTokenizer.from_gguf(keys), folder)


def test_a_unigram_model_inside_a_gguf_file(root: Path) -> None:
    folder = made(root, "t5")
    model = read_model((folder / "spiece.model").read_bytes(), "")
    keys = of_model(folder / "spiece.model", "t5", precompiled_charsmap=tuple(model.charsmap))
    padded = [f"[PAD{i}]" for i in range(500, 630)]
    keys["tokenizer.ggml.tokens"] += tuple(padded)
    keys["tokenizer.ggml.scores"] += (-1000.0,) * len(padded)
    keys["tokenizer.ggml.token_type"] += (5,) * len(padded)
    tokens = TextTokenizer.from_gguf(keys)
    same_ids(tokens, folder)
    assert tokens.token_id("<extra_id_0>") == 599
    assert tokens.encode_markup("Open <extra_id_99>")[-2:] == [500, tokens.eos_id]


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_byte_level_merges_inside_a_gguf_file(root: Path, pre: str) -> None:
    folder = made(root, "qwen2" if pre == "qwen2" else "gpt2")
    table = json.loads((folder / "vocab.json").read_text())
    pairs = [line for line in (folder / "merges.txt").read_text().split("\n")[1:] if line]
    keys = metadata("gpt2", sorted(table, key=table.__getitem__), pre=pre, merges=tuple(pairs), bos_token_id=0)
    tokens = TextTokenizer.from_gguf(keys | {"tokenizer.ggml.add_bos_token": False})
    if pre in ("default", "gpt-2", "qwen2"):
        same_ids(tokens, folder)
    digits = tokens.tokens(tokens.encode("2024"))
    assert digits == list("2024") or pre not in ("smollm", "qwen2")
    assert all(tokens.decode(tokens.encode(text)) == text for text in TEXTS if pre != "qwen2")
    assert (TextTokenizer.from_gguf(keys).encode("Open")[0] == 0) == (pre == "llama-bpe")


def test_wordpiece_inside_a_gguf_file(root: Path) -> None:
    folder = made(root, "bert")
    lines = (folder / "vocab.txt").read_text().splitlines()
    marked = [
        one
        if one[0] == "[" and one[-1] == "]" and len(one) > 2
        else one[2:]
        if one.startswith("##") and len(one) > 2
        else f"▁{one}"
        for one in lines
    ]
    ids = {"unknown_token_id": 1, "cls_token_id": 2, "seperator_token_id": 3, "padding_token_id": 0, "mask_token_id": 4}
    same_ids(TextTokenizer.from_gguf(metadata("bert", marked, **ids)), folder)


def test_a_gguf_vocabulary_is_saved_for_the_reference_library(root: Path, tmp_path: Path) -> None:
    for name, kind in (("llama", "llama"), ("t5", "t5")):
        model = made(root, name) / ("tokenizer.model" if name == "llama" else "spiece.model")
        keys = of_model(model, kind) | {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
        tokens = TextTokenizer.from_gguf(keys)
        tokens.save(tmp_path / name)
        names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
        assert {path.name for path in (tmp_path / name).iterdir()} == names
        same_ids(tokens, tmp_path / name)
        again = TextTokenizer.load(tmp_path / name)
        assert again.encode_batch(TEXTS) == tokens.encode_batch(TEXTS)
        assert again.control == tokens.control
        assert again.special_tokens == tokens.special_tokens
        assert again.chat_template == tokens.chat_template
        assert "\ue000" not in (tmp_path / name / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "rwkv"}, "a tokenizer of the kind 'rwkv', which can't be read"),
        ({"tokens": ()}, r"lacks tokenizer\.ggml\.tokens"),
        ({"tokens": ("a", "b", "a")}, "has the token 'a' twice"),
        ({"tokens": ("a", 3)}, r"lacks tokenizer\.ggml\.tokens, a list of strings"),
        ({"bos_token_id": 3}, r"tokenizer\.ggml\.bos_token_id is 3, but there are only 3 tokens"),
        ({"bos_token_id": -1}, r"bos_token_id is -1"),
        ({"bos_token_id": "a"}, r"bos_token_id should be of the kind int"),
        ({"token_type": (1,)}, r"token_type should have a number for each of the 3 tokens"),
        ({"merges": ("a b", "a")}, "'a' is no merge of two tokens to a third"),
        ({"merges": ("a c",)}, "'a c' is no merge"),
        ({"pre": "gpt-3"}, r"cuts texts by 'gpt-3', which isn't known here \(did you mean 'gpt-2'\?\)"),
        ({"add_bos_token": 1}, "add_bos_token should be of the kind bool"),
        ({"model": "llama"}, r"lacks tokenizer\.ggml\.scores"),
        ({"model": "llama", "tokens": ("a" * 999,), "scores": (0.0,)}, "a token of 999 characters, where 256 are"),
        ({"model": "t5"}, r"lacks tokenizer\.ggml\.scores"),
        ({"model": "bert"}, r"lacks the token \[UNK\]"),
    ],
)
def test_a_damaged_gguf_vocabulary_is_refused(change: dict[str, Any], message: str) -> None:
    keys = metadata("gpt2", ["a", "b", "ab"], merges=("a b",))
    TextTokenizer.from_gguf(keys)
    with pytest.raises(DataError, match=message):
        TextTokenizer.from_gguf(keys | {f"tokenizer.ggml.{key}": value for key, value in change.items()})


# -- the parts


def test_a_sentencepiece_model_is_read_as_its_package_reads_it(tmp_path: Path) -> None:
    import sentencepiece

    for options in (UNIGRAM, MERGES | {"user_defined_symbols": ["<tool>"], "bos_id": -1}):
        path = sentencepiece_model(tmp_path / "tokenizer.model", **options)
        ours = read_model(path.read_bytes(), str(path))
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids = range(len(theirs))
        assert ours.pieces == [theirs.id_to_piece(i) for i in ids]
        assert ours.scores == [theirs.get_score(i) for i in ids]
        assert [kind == 3 for kind in ours.kinds] == [theirs.is_control(i) for i in ids]
        assert [kind == 6 for kind in ours.kinds] == [theirs.is_byte(i) for i in ids]
        assert (ours.unk, ours.bos, ours.eos) == (theirs.unk_id(), theirs.bos_id(), theirs.eos_id())


def test_unigram_and_bpe_give_the_pieces_of_the_sentencepiece_package(root: Path) -> None:
    import sentencepiece

    for name, file in (("t5", "spiece.model"), ("llama", "tokenizer.model")):
        folder = made(root, name)
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / file))
        tokens = TextTokenizer.load(folder)
        for text in TEXTS:
            ours = [i for i in tokens.encode(text) if i not in (tokens.bos_id, tokens.eos_id)]
            if not text.startswith((" ", "▁")):  # where the reference library puts no further space
                assert ours == theirs.encode(text), text


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    parts = []
    for key, value in fields:
        if isinstance(value, int):
            parts.append(varint(key << 3) + varint(value))
        else:
            parts.append(varint(key << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


def piece(token: str, score: float = 0.0, kind: int = 1) -> tuple[int, bytes]:
    return 1, message((1, token.encode())) + varint(2 << 3 | 5) + struct.pack("<f", score) + message((3, kind))


def test_a_damaged_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    whole = message(piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3), piece("▁a", -1.5))
    assert read_model(whole, "x").scores == [0, 0, 0, -1.5]
    for data, told in [
        (whole[:-3], "ends behind the file"),
        (whole + b"\x80", "doesn't end"),
        (whole + b"\x80" * 20, "doesn't end"),
        (whole + b"\x0b", "unknown sort 3"),
        (message((1, 5)), "a number where text should be"),
        (message((1, b"\x0a\x01\xff")), "utf-8"),
        (message((2, b"")), "it has no pieces"),
        (whole + message(piece("a" * 1000)), "a piece of 1,000 characters"),
        (b"\0" * (33 << 20), "larger than 33,554,432 bytes"),
        (b"PK\x03\x04 not a model", "unknown sort"),
        (whole + message((2, message((3, 4)))), "words or characters"),
        (whole + message((2, message((40, 9)))), "names the control token 9 of only 4"),
        (varint(1 << 3 | 2) + varint(1 << 60), "ends behind the file"),
    ]:
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(DataError, match=r"tokenizer\.model.*" + told):
            TextTokenizer.load(tmp_path)


def test_merges_are_worked_out_from_pieces() -> None:
    assert merges(["a", "b", "c", "ab", "abc", "bc"]) == ["a b", "a bc", "ab c", "b c"]
    ranks = [0.0, 0.0, 0.0, -1.0, -2.0, -3.0]
    assert merges(["a", "b", "c", "ab", "abc", "bc"], ranks) == ["b c", "ab c", "a bc", "a b"]


# -- damaged and unknown folders


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "vit"})
    assert TextTokenizer.find(tmp_path) is None
    with pytest.raises(DataError, match="has no tokenizer"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "told"),
    [
        ("bert", "vocab.txt", "[UNK]\n[CLS]\na\na\n[SEP]\n", "the token 'a' twice, in lines 3 and 4"),
        ("bert", "vocab.txt", "[UNK]\n[CLS]\na\n", r"lacks the token \[SEP\]"),
        ("bert", "vocab.txt", "", "is empty"),
        ("bert", "tokenizer_config.json", "{", "no usable JSON"),
        ("bert", "tokenizer_config.json", "[]", "should hold a JSON object, not a list"),
        ("bert", "tokenizer_config.json", '{"a": 1, "a": 2}', "has the key 'a' twice"),
        ("bert", "tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "unusable entry 'x'"),
        ("bert", "added_tokens.json", '{"a": "b"}', "a table of tokens and their numbers"),
        ("gpt2", "vocab.json", '{"a": 0, "b": 0}', "gives the number 0 to two tokens"),
        ("gpt2", "vocab.json", '{"a": -1}', "a table of tokens and their numbers"),
        ("gpt2", "vocab.json", '{"a": 0}', r"merges\.txt, line 2: the vocabulary has no"),
        ("gpt2", "merges.txt", "a b c\n", r"merges\.txt, line 1: not two tokens"),
        ("gpt2", "merges.txt", "#version: 0.2\na b\na qqqq\n", r"merges\.txt, line 3: the vocabulary has no"),
        ("gpt2", "tokenizer_config.json", '{"tokenizer_class": "CLIPTokenizer"}', r"of 'clip' can't be read \(known: "),
        (
            "t5",
            "tokenizer_config.json",
            '{"tokenizer_class": "AlbertTokenizer"}',
            r"lacks the token \[CLS\] of a 'albert'",
        ),
        ("llama", "tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}', "is a BPE model, where 't5' needs"),
        ("t5", "tokenizer_config.json", '{"tokenizer_class": "M2M100Tokenizer"}', "vocab.json"),
    ],
)
def test_what_is_wrong_is_named(root: Path, tmp_path: Path, name: str, file: str, content: str, told: str) -> None:
    folder = made(root, name)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=told):
        TextTokenizer.load(tmp_path)
