from __future__ import annotations

import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyformer.data import Pair, PairTokenizer, TokenizerRecipe, normalise
from polyformer.data.vocabulary import Kind, is_panic
from polyformer.errors import DataError, SpecError

from .makers import babble, english_chinese, english_german

KINDS: tuple[Kind, ...] = get_args(Kind)
SCRIPTS = [
    Pair("Open the file (all) – don't!", "Öffnen Sie die Übersicht „größer“ …", "en", "de"),
    Pair("Click the OK button 12.5 %", "点击「OK」按钮，打开文件。", "en", "zh"),
    Pair("A test of the parser", "パーサーのテストです。カタカナ", "en", "ja"),
    Pair("Save the file now", "احفظ الملف الآن", "en", "ar"),
    Pair("Family 👨‍👩‍👧 and flag 🇩🇪", "Семья и флаг 🙂", "en", "ru"),
    Pair("<pad> </s> <2de> ## ▁ #x", "हिन्दी में पाठ", "en", "hi"),
]


SIZE = 600


@cache
def trained(kind: Kind, joint: bool = True) -> PairTokenizer:
    """A tokenizer for many scripts; everything stands in its training texts twice."""
    pairs = [*babble(400), *english_german()[:300], *SCRIPTS]
    pairs += [pair._replace(source=pair.source + "!", target=pair.target + " 1") for pair in SCRIPTS]
    return PairTokenizer.train(pairs, TokenizerRecipe(kind, SIZE, joint))


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_script_comes_back(kind: Kind, joint: bool) -> None:
    tokens = trained(kind, joint)
    assert (tokens.source_vocabulary, tokens.target_vocabulary) == (SIZE, SIZE)
    for pair in SCRIPTS:
        if kind != "byte_bpe" and "▁" in pair.source:
            continue
        text = pair.target if not joint else pair.source
        ids = tokens.encode_target(text)
        assert ids[-1] == tokens.eos_id
        assert tokens.decode_target([tokens.bos_id, *ids, tokens.pad_id]) == normalise(text)


@given(st.text())
def test_bytes_write_every_text(text: str) -> None:
    tokens = trained("byte_bpe")
    assert tokens.decode_target(tokens.encode_target(text)) == normalise(text)
    assert tokens.unk_id not in tokens.encode_target(text)


KNOWN = st.text(
    st.sampled_from(sorted({*"Opn thefilÖrÜ„“點击打开パのテحفظ१हिन्दी👨\u200d👩🙂 .,!%#()<>/12"})), max_size=40
)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
@given(text=KNOWN)
def test_texts_of_known_characters_come_back(kind: Kind, text: str) -> None:
    tokens = trained(kind)
    ids = tokens.encode_target(text)
    if tokens.unk_id not in ids:
        assert tokens.decode_target(ids) == normalise(text)


@pytest.mark.parametrize("kind", KINDS)
def test_typed_control_tokens_stay_text(kind: Kind) -> None:
    tokens = trained(kind)
    typed = "<pad> <s> </s> <unk> <2de> <2zh>"
    control = 4 + len(tokens.about.tags)
    assert len(tokens.about.tags) == 6
    ids = tokens.encode_source(typed, "de")
    assert ids[0] == 4 + tokens.target_languages.index("de")
    assert all(i >= control or i == tokens.unk_id for i in ids[1:-1])
    assert tokens.encode_target(typed)[-1] == tokens.eos_id
    assert tokens.eos_id not in tokens.encode_target(typed)[:-1]
    if kind == "byte_bpe":
        assert tokens.decode_target(tokens.encode_target(typed)) == typed


@pytest.mark.parametrize("kind", KINDS)
def test_text_full_of_control_tokens_teaches_none(kind: Kind) -> None:
    pairs = [Pair(f"</s> {pair.source} <pad>", f"<unk> {pair.target} </s>", "en", "de") for pair in babble(300)]
    tokens = PairTokenizer.train(pairs, TokenizerRecipe(kind, 300))
    ids = tokens.encode_target("</s> <pad> <unk> <s>")
    assert min(ids[:-1]) >= 3
    assert tokens.unk_id not in ids[:-1] or kind != "byte_bpe"


def test_one_target_language_has_no_tag_and_several_need_one() -> None:
    one = PairTokenizer.train(english_german(), TokenizerRecipe("bpe", 120))
    assert (
        one.encode_source("Open the file")
        == one.encode_source("Open the file", "de")
        == one.encode_target("Open the file")
    )
    with pytest.raises(DataError, match="the target language 'fr' is not known: this tokenizer was trained for de"):
        one.encode_source("Open", "fr")
    many = PairTokenizer.train([*english_german(), *english_chinese()], TokenizerRecipe("bpe", 200))
    assert many.encode_source("Open", "zh")[0] == 5
    assert many.source_tokens(many.encode_source("Open", "zh"))[0] == "<2zh>"
    with pytest.raises(DataError, match="a target language must be named: this tokenizer was trained for de, zh"):
        many.encode_source("Open")


def test_separate_vocabularies_have_tags_on_the_source_only() -> None:
    pairs = [*babble(300), *english_chinese()]
    tokens = PairTokenizer.train(pairs, TokenizerRecipe("bpe", 200, joint=False))
    assert tokens.source_tokens([4, 5]) == ["<2de>", "<2zh>"]
    assert not set(tokens.target_tokens(range(200))) & {"<2de>", "<2zh>"}
    assert tokens.decode_target(tokens.encode_target("打开文件和菜单")) == "打开文件和菜单"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind: Kind, tmp_path: Path) -> None:
    for joint in (True, False):
        tokens = trained(kind, joint)
        tokens.save(tmp_path / str(joint))
        again = PairTokenizer.load(tmp_path / str(joint))
        assert again.about == tokens.about
        for pair in SCRIPTS:
            assert again.encode_source(*pair[::3]) == tokens.encode_source(*pair[::3])
            assert again.encode_target(pair.target) == tokens.encode_target(pair.target)


def test_a_damaged_folder_names_the_file(tmp_path: Path) -> None:
    trained("bpe").save(tmp_path)
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(files) == {"pair.json", "tokenizer.json"}
    for name, content, message in [
        ("tokenizer.json", files["tokenizer.json"][:100], r"tokenizer\.json is no tokenizer"),
        (
            "tokenizer.json",
            files["tokenizer.json"].replace('"</s>": 2', '"</t>": 2').replace('"</s>":2', '"</t>":2'),
            "begin",
        ),
        ("pair.json", files["pair.json"].replace("joint", "jont"), "unknown key 'jont'"),
        ("pair.json", "{", r"pair\.json is not JSON"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            PairTokenizer.load(tmp_path)
        (tmp_path / name).write_text(files[name])
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"there is no file .*tokenizer\.json"):
        PairTokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_larger_than_the_data_says_how_many_there_are(kind: Kind) -> None:
    with pytest.raises(DataError, match="more than the training pairs can give, which is ") as told:
        PairTokenizer.train(english_german(), TokenizerRecipe(kind, 5000))
    reached = int(str(told.value).split("set tokenizer.vocabulary to ")[1].split(" or less")[0].replace(",", ""))
    assert 60 < reached < 1000
    assert PairTokenizer.train(english_german(), TokenizerRecipe(kind, reached)).source_vocabulary == reached


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    with pytest.raises(SpecError, match="at least 260 for byte_bpe"):
        TokenizerRecipe("byte_bpe", 100)
    with pytest.raises(DataError, match="less than the training pairs need, which is 262"):
        PairTokenizer.train([*english_german(), *english_chinese()], TokenizerRecipe("byte_bpe", 260))
    with pytest.raises(DataError, match="no pairs"):
        PairTokenizer.train([], TokenizerRecipe())


def test_rare_characters_are_unknown() -> None:
    pairs = [*english_german(), Pair("Open the ☃", "Öffne ☃", "en", "de")]
    tokens = PairTokenizer.train(pairs, TokenizerRecipe("bpe", 120))
    assert tokens.unk_id not in tokens.encode_target("Open the file")
    rare = PairTokenizer.train([*english_german(), pairs[-1]._replace(target="Öffne")], TokenizerRecipe("bpe", 120))
    assert rare.unk_id in rare.encode_source("Open the ☃")


SCRIPT = """
import hashlib
from polyformer.data import PairTokenizer, TokenizerRecipe
from tests.data.makers import english_chinese, english_german
for kind in ("bpe", "byte_bpe", "wordpiece", "unigram"):
    tokens = PairTokenizer.train([*english_german(), *english_chinese()], TokenizerRecipe(kind, 300))
    print(kind, hashlib.sha256(tokens._source.to_str().encode()).hexdigest())
"""


def test_training_is_the_same_in_every_process() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert runs[0].count("\n") == 4
    assert runs[0] == runs[1] == runs[2]


def test_a_giant_text_is_refused_before_it_is_tokenised() -> None:
    for kind in KINDS:
        start = time.perf_counter()
        with pytest.raises(DataError, match="a text of 10,000,000 characters is longer than the 100,000"):
            trained(kind).encode_target("x" * 10_000_000)
        trained(kind).encode_target("x" * 100_000)
        assert time.perf_counter() - start < 20


class PanicException(BaseException):  # as the Rust library's, which can't be imported
    """A panic."""


class Panicking:
    """Panics at one text."""

    def __init__(self, real: object, error: type[BaseException]) -> None:
        self.real, self.error = real, error

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> object:
        if "boom" in texts:
            raise self.error("index out of bounds")
        return self.real.encode_batch_fast(texts, add_special_tokens=add_special_tokens)  # type: ignore[attr-defined]


def test_a_panic_is_reported_with_its_text_and_an_interrupt_is_not() -> None:
    tokens = PairTokenizer.train(english_german(), TokenizerRecipe("bpe", 120))
    tokens._target = Panicking(tokens._target, PanicException)  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"can't take the text 'boom' \(index out of bounds\)"):
        tokens.encode_targets(["Open", "boom", "file"])
    tokens._target = Panicking(tokens._source, KeyboardInterrupt)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        tokens.encode_targets(["boom"])
    assert is_panic(PanicException())


def test_tokens_can_be_read() -> None:
    tokens = trained("byte_bpe")
    ids = tokens.encode_source("Open the Öffne", "de")
    shown = tokens.source_tokens(ids)
    assert shown[:2] == ["<2de>", "▁Open"]
    assert "".join(shown[1:-1]) == "▁Open▁the▁Öffne"
    with pytest.raises(DataError, match="no token 600 in a vocabulary of 600"):
        tokens.target_tokens([SIZE])
