"""From files and packages to clean sentence pairs, tokens and batches."""

from polyformer.data.batches import Batch, Batches, BatchRecipe, Encoded, encode_pairs
from polyformer.data.corpus import Corpus
from polyformer.data.gettext import Gettext
from polyformer.data.guess import corpus_of
from polyformer.data.libreoffice import LibreOfficeHelp
from polyformer.data.marian import MarianTokenizer
from polyformer.data.pairs import Pair, read_pairs, split_direction, write_pairs
from polyformer.data.recipe import DataRecipe, Filters, Report, Splits, prepare
from polyformer.data.tables import Jsonl, Parallel, Tsv
from polyformer.data.text import normalise
from polyformer.data.tokenizer import PairTokenizer, TextPairTokenizer
from polyformer.data.vocabulary import TokenizerRecipe

__all__ = [
    "Batch",
    "BatchRecipe",
    "Batches",
    "Corpus",
    "DataRecipe",
    "Encoded",
    "Filters",
    "Gettext",
    "Jsonl",
    "LibreOfficeHelp",
    "MarianTokenizer",
    "Pair",
    "PairTokenizer",
    "Parallel",
    "Report",
    "Splits",
    "TextPairTokenizer",
    "TokenizerRecipe",
    "Tsv",
    "corpus_of",
    "encode_pairs",
    "normalise",
    "prepare",
    "read_pairs",
    "split_direction",
    "write_pairs",
]
