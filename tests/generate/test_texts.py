"""Text that is given out piece by piece: the pieces are the whole, no character is cut, no stop string leaks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.generate import TextStream

WORDS = ("the", "▁the", "▁", "▁cat", "s", ".", "▁▁", "é", "日", "▁本", "</s>", "<unk>")


def folder(place: Path, description: dict[str, Any]) -> TextTokenizer:
    """Write a tokenizer.json and read it."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    return TextTokenizer.load(place)


def byte_level(place: Path) -> TextTokenizer:
    """A tokenizer of single bytes, and some pairs of them that cut characters anywhere."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges = [("ð", "Ł"), ("â", "Ĥ"), ("t", "h")]
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    one = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    one.pre_tokenizer, one.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return folder(place, json.loads(one.to_str()))


def byte_fallback(place: Path) -> TextTokenizer:
    """A tokenizer of words as SentencePiece has them, and bytes for what is no word."""
    vocabulary = {word: i for i, word in enumerate((*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))))}
    one = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    one.decoder = decoders.Sequence(steps)
    one.add_special_tokens(["</s>"])
    return folder(place, json.loads(one.to_str()))


def metaspace(place: Path) -> TextTokenizer:
    """A tokenizer of words whose decoder knows no bytes."""
    one = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[], unk_token="<unk>"))
    one.decoder = decoders.Metaspace()
    one.add_special_tokens(["</s>"])
    return folder(place, json.loads(one.to_str()))


def wordpiece(place: Path) -> TextTokenizer:
    """A tokenizer whose decoder tidies up spaces."""
    words = ("do", "n", "'", "t", "##s", ",", "[UNK]", "a", "!")
    one = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    one.decoder = decoders.WordPiece(cleanup=True)
    return folder(place, json.loads(one.to_str()))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[TextTokenizer]:
    place = tmp_path_factory.mktemp("tokenizers")
    return [make(place / make.__name__) for make in (byte_level, byte_fallback, metaspace, wordpiece)]


def streamed(stream: TextStream, ids: Sequence[int]) -> list[str]:
    """Return the pieces of a text; the last is what was held back until the end."""
    return [*(stream.push(one) for one in ids), stream.finish()]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_whole(tokenizers: list[TextTokenizer], data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(tokenizers))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary - 1), max_size=20))
    assert "".join(streamed(TextStream(tokenizer), ids)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="aé日🙂 \n", max_size=12))
def test_no_character_is_cut_and_none_is_late(tokenizers: list[TextTokenizer], text: str) -> None:
    """With a token to a byte, each character comes with its last byte."""
    tokenizer = tokenizers[0]
    given_out, ids = "", tokenizer.encode(text)
    stream = TextStream(tokenizer)
    for i, one in enumerate(ids):
        given_out += stream.push(one)
        whole = tokenizer.decode(ids[: i + 1]).rstrip("�")
        assert given_out == whole
    assert given_out + stream.finish() == text


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab🙂", max_size=20),
    stops=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_never_leak(tokenizers: list[TextTokenizer], text: str, stops: list[str]) -> None:
    tokenizer = tokenizers[0]
    stream = TextStream(tokenizer, stops)
    pieces = streamed(stream, tokenizer.encode(text))
    cut = min((place for one in stops if (place := text.find(one)) >= 0), default=None)
    # of several, the one that is whole first ends the text
    assert stream.stopped == (cut is not None)
    assert stream.text == "".join(pieces)
    assert text.startswith(stream.text)
    assert not any(one in stream.text for one in stops)
    if cut is None:
        assert stream.text == text
    elif len(stops) == 1:
        assert stream.text == text[:cut]


def test_a_stop_string_over_several_tokens(tokenizers: list[TextTokenizer]) -> None:
    tokenizer = tokenizers[0]
    assert streamed(TextStream(tokenizer, ["bcd"]), tokenizer.encode("abcabcde"))[:8] == [
        "a",
        "",
        "",
        "bca",
        "",
        "",
        "",
        "",
    ]


def test_text_in_runs_of_bytes_waits_for_their_end(tokenizers: list[TextTokenizer]) -> None:
    """A wrong byte spoils the whole run, so nothing of it is given out before it is known to be right."""
    tokenizer = tokenizers[1]
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") or 0 for byte in "日".encode()]
    cat = tokenizer.token_id("▁cat") or 0
    assert streamed(TextStream(tokenizer), [*ids, cat]) == ["", "", "", "日 cat", ""]
    assert "".join(streamed(TextStream(tokenizer), [*ids, ids[0], cat])) == tokenizer.decode([*ids, ids[0], cat])
