"""From files and packages to clean sentence pairs or texts, tokens and batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyformer.exports import exports

if TYPE_CHECKING:
    from polyformer.data.batches import Batch, Batches, BatchRecipe, Encoded, encode_pairs
    from polyformer.data.corpus import Corpus
    from polyformer.data.documents import Document, JsonlTexts, TextDataRecipe, TextFiles, Texts, prepare_texts
    from polyformer.data.gettext import Gettext
    from polyformer.data.guess import corpus_of, texts_of
    from polyformer.data.libreoffice import LibreOfficeHelp
    from polyformer.data.marian import MarianTokenizer
    from polyformer.data.masking import MaskedTokens, NextToken, TextObjective
    from polyformer.data.pairs import Pair, read_pairs, split_direction, write_pairs
    from polyformer.data.reader import Reader, TrainingBatch
    from polyformer.data.recipe import DataRecipe, Filters, Report, Splits, prepare
    from polyformer.data.rows import RowRecipe, TextBatch, TextRows, encode_texts
    from polyformer.data.tables import Jsonl, Parallel, Tsv
    from polyformer.data.text import normalise
    from polyformer.data.text_tokenizer import learn_text_tokenizer
    from polyformer.data.tokenizer import PairTokenizer, TextPairTokenizer
    from polyformer.data.vocabulary import TextTokenizerRecipe, TokenizerRecipe

__all__ = [
    "Batch",
    "BatchRecipe",
    "Batches",
    "Corpus",
    "DataRecipe",
    "Document",
    "Encoded",
    "Filters",
    "Gettext",
    "Jsonl",
    "JsonlTexts",
    "LibreOfficeHelp",
    "MarianTokenizer",
    "MaskedTokens",
    "NextToken",
    "Pair",
    "PairTokenizer",
    "Parallel",
    "Reader",
    "Report",
    "RowRecipe",
    "Splits",
    "TextBatch",
    "TextDataRecipe",
    "TextFiles",
    "TextObjective",
    "TextPairTokenizer",
    "TextRows",
    "TextTokenizerRecipe",
    "Texts",
    "TokenizerRecipe",
    "TrainingBatch",
    "Tsv",
    "corpus_of",
    "encode_pairs",
    "encode_texts",
    "learn_text_tokenizer",
    "normalise",
    "prepare",
    "prepare_texts",
    "read_pairs",
    "split_direction",
    "texts_of",
    "write_pairs",
]

exports(
    __name__,
    {
        "batches": "Batch Batches BatchRecipe Encoded encode_pairs",
        "corpus": "Corpus",
        "documents": "Document JsonlTexts TextDataRecipe TextFiles Texts prepare_texts",
        "gettext": "Gettext",
        "guess": "corpus_of texts_of",
        "libreoffice": "LibreOfficeHelp",
        "marian": "MarianTokenizer",
        "masking": "MaskedTokens NextToken TextObjective",
        "pairs": "Pair read_pairs split_direction write_pairs",
        "reader": "Reader TrainingBatch",
        "recipe": "DataRecipe Filters Report Splits prepare",
        "rows": "RowRecipe TextBatch TextRows encode_texts",
        "tables": "Jsonl Parallel Tsv",
        "text": "normalise",
        "text_tokenizer": "learn_text_tokenizer",
        "tokenizer": "PairTokenizer TextPairTokenizer",
        "vocabulary": "TextTokenizerRecipe TokenizerRecipe",
    },
)
