from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from polyformer.data import MarianTokenizer
from polyformer.errors import DataError

from .makers import babble

TEXTS = ["Open the file", "  Delete the   menu and unknown ☃ words", "Copy", "", "the </s> and <pad> typed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Marian checkpoints have, with models trained here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    place = tmp_path_factory.mktemp("marian")
    sides = {
        "source": [pair.source for pair in babble(300)],
        "target": [pair.target + " Öffne Datei und Menü" for pair in babble(300)],
    }
    pieces: dict[str, None] = {"</s>": None, "<unk>": None}
    for side, texts in sides.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(place / side), vocab_size=120, minloglevel=2
        )
        (place / f"{side}.model").rename(place / f"{side}.spm")
        model = sentencepiece.SentencePieceProcessor(model_file=str(place / f"{side}.spm"))
        pieces |= {model.id_to_piece(i): None for i in range(3, len(model))}
    pieces |= {">>de<<": None, ">>nl<<": None, "<pad>": None}
    (place / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    (place / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    return place


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_it_gives_the_ids_and_texts_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.MarianTokenizer.from_pretrained(str(folder))
    reference.current_spm = reference.spm_source
    tokens = MarianTokenizer.load(folder)
    assert (tokens.pad_id, tokens.eos_id, tokens.unk_id) == (
        reference.pad_token_id, reference.eos_token_id, reference.unk_token_id
    )  # fmt: skip
    assert tokens.bos_id == tokens.pad_id
    assert tokens.source_vocabulary == len(reference.get_vocab())
    for text in ["Open the file", "Delete the menu and unknown words", "Copy"]:
        assert tokens.encode_source(text) == reference(text).input_ids
        assert tokens.encode_source(text, "nl") == reference(f">>nl<< {text}").input_ids
        german = reference(text_target="Öffne Datei und Menü").input_ids
        assert tokens.encode_target("Öffne Datei und Menü") == german
        ids = [tokens.pad_id, *german, tokens.pad_id]
        assert tokens.decode_target(ids) == reference.decode(ids, skip_special_tokens=True) == "Öffne Datei und Menü"


def test_typed_control_tokens_and_tags_stay_text(folder: Path) -> None:
    tokens = MarianTokenizer.load(folder)
    typed = tokens.encode_source("Open </s> <pad> >>de<< the file")
    control = {tokens.pad_id, tokens.eos_id, *tokens.encode_source("", "de")[:1], *tokens.encode_source("", "nl")[:1]}
    assert not control & set(typed[:-1])
    assert tokens.encode_source("Open", "de")[0] == tokens.encode_source("", "de")[0]
    assert tokens.target_languages == ("de", "nl")
    with pytest.raises(DataError, match=r"no tag for the target language 'deu' \(did you mean 'de'\?\)"):
        tokens.encode_source("Open", "deu")


def test_saved_it_is_the_same_and_tokens_can_be_read(folder: Path, tmp_path: Path) -> None:
    tokens = MarianTokenizer.load(folder)
    tokens.save(tmp_path / "copy")
    again = MarianTokenizer.load(tmp_path / "copy")
    assert [again.encode_source(text) for text in TEXTS] == [tokens.encode_source(text) for text in TEXTS]
    assert (
        again.source_tokens(again.encode_source("Open the", "de"))[::3] == [">>de<<", "</s>"]
        or len(again.encode_source("Open the", "de")) > 4
    )
    assert again.target_tokens([tokens.eos_id, 9999]) == ["</s>", "<unk>"]


def test_without_tags_only_the_named_language_is_taken(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "one")
    table = json.loads((folder / "vocab.json").read_text())
    plain = {token: i for token, i in table.items() if not token.startswith(">>")}
    (tmp_path / "one" / "vocab.json").write_text(json.dumps(plain))
    tokens = MarianTokenizer.load(tmp_path / "one")
    assert tokens.encode_source("Open", "de") == tokens.encode_source("Open")
    assert tokens.target_languages == ("de",)
    with pytest.raises(DataError, match="no tag for the target language 'fr'"):
        tokens.encode_source("Open", "fr")


def test_separate_vocabularies(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "two")
    table = json.loads((folder / "vocab.json").read_text())
    (tmp_path / "two" / "target_vocab.json").write_text(json.dumps({**table, "extra": len(table)}))
    tokens = MarianTokenizer.load(tmp_path / "two")
    assert (tokens.source_vocabulary, tokens.target_vocabulary) == (len(table), len(table) + 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("source.spm", b"nonsense", r"source\.spm is no SentencePiece model"),
        ("vocab.json", b"{", r"vocab\.json is no valid JSON"),
        ("vocab.json", b'{"a": "b"}', r"vocab\.json should be a table of tokens"),
        ("vocab.json", b'{"</s>": 0, "<unk>": 1}', r"vocab\.json lacks the token '<pad>'"),
        ("target.spm", None, r"there is no file .*target\.spm"),
    ],
)
def test_a_damaged_folder_names_the_file(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / name).unlink()
    if content is not None:
        (tmp_path / "bad" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        MarianTokenizer.load(tmp_path / "bad")
