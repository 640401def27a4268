"""Folders as published checkpoints have them, with small vocabularies that are trained here."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from .makers import babble, english_chinese, english_german

TEXTS = [
    "Open the file and copy the menu",
    "  leading and   inner  spaces ",
    "new\nlines\n\n\tand tabs\r\n",
    "Öffne die Übersicht: naïve café ÀÉ",
    "打开文件，复制菜单！",
    "12345 and 67.8% of 2024",
    "🙂 family 👨‍👩‍👧 ☃",
    "don't, we'll: I'M",
    "``quoted'' and ﬁle ①",
    "x=1;  y = {2}",
    "パーサーのテスト مرحبا",
    "a" * 60,
    "▁ _ ##x Ġ",
    "",
]


def corpus() -> list[str]:
    """Some hundred lines in English, German, Chinese and made-up words."""
    chance = random.Random(3)
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]
    made_up = [" ".join("".join(chance.choices(syllables, k=3)) for _ in range(6)) for _ in range(250)]
    pairs = [*babble(60), *english_german()[:60], *english_chinese()[:60]]
    return [*made_up, *TEXTS, *(text for pair in pairs for text in (pair.source, pair.target))] * 2


def sentencepiece_model(path: Path, **options: Any) -> Path:
    """Train a SentencePiece model with the package's own trainer."""
    import sentencepiece

    written = io.BytesIO()
    lines = iter(corpus())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=written, minloglevel=2, **options)
    path.write_bytes(written.getvalue())
    return path


UNIGRAM = {"model_type": "unigram", "vocab_size": 500, "character_coverage": 0.98}
MERGES = {
    "model_type": "bpe",
    "vocab_size": 900,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "character_coverage": 0.98,
}


def _pieces(kind: str, file: str, options: dict[str, Any], **config: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        sentencepiece_model(folder / file, **options)
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": f"{kind}Tokenizer", **config})

    return make


def _m2m100(folder: Path) -> None:
    import sentencepiece

    path = sentencepiece_model(folder / "sentencepiece.bpe.model", **UNIGRAM)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(3, len(model))]
    random.Random(0).shuffle(pieces)
    order = ["<s>", "<pad>", "</s>", "<unk>", *pieces]
    write_json(folder / "vocab.json", {piece: i for i, piece in enumerate(order)})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "M2M100Tokenizer", "src_lang": "de"})


def _words(kind: str, **config: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=config.get("do_lower_case", True))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        control = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer.train_from_iterator(
            corpus(), trainers.WordPieceTrainer(vocab_size=600, special_tokens=control, show_progress=False)
        )
        vocabulary = tokenizer.get_vocab()
        lines = "\n".join(sorted(vocabulary, key=vocabulary.__getitem__))
        (folder / "vocab.txt").write_text(lines + "\n", encoding="utf-8")
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": f"{kind}Tokenizer", **config})

    return make


def _bytes(kind: str, control: Iterable[str], **config: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=list(control),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(corpus(), trainer)
        tokenizer.model.save(str(folder))
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": f"{kind}Tokenizer", **config})

    return make


_ENDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
_CLS = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "bos_piece": "[CLS]", "eos_piece": "[SEP]"}
_MASK = {"control_symbols": ["[MASK]"]}
_XLNET = {"bos_id": 1, "eos_id": 2, "control_symbols": ["<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]}
_GEMMA = {
    "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>", "bos_piece": "<bos>",
    "control_symbols": ["<mask>"], "add_dummy_prefix": False,
}  # fmt: skip
_ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

FOLDERS: dict[str, Callable[[Path], None]] = {
    "bert": _words("Bert"),
    "bert, cased": _words("Bert", do_lower_case=False, tokenize_chinese_chars=False),
    "bert, accents": _words("Bert", strip_accents=False),
    "distilbert": _words("DistilBert"),
    "gpt2": _bytes("GPT2", ["<|endoftext|>"]),
    "gpt2, prefix": _bytes("GPT2", ["<|endoftext|>"], add_prefix_space=True),
    "gpt2, bos": _bytes("GPT2", ["<|endoftext|>"], add_bos_token=True),
    "roberta": _bytes("Roberta", _ROBERTA),
    "bart": _bytes("Bart", _ROBERTA),
    "qwen2": _bytes("Qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "t5": _pieces("T5", "spiece.model", UNIGRAM | _ENDS),
    "xlm-roberta": _pieces("XLMRoberta", "sentencepiece.bpe.model", UNIGRAM),
    "mbart": _pieces("MBart", "sentencepiece.bpe.model", UNIGRAM, src_lang="de_DE"),
    "mbart50": _pieces("MBart50", "sentencepiece.bpe.model", UNIGRAM, src_lang="fr_XX"),
    "m2m100": _m2m100,
    "pegasus": _pieces("Pegasus", "spiece.model", UNIGRAM | _ENDS | {"pad_id": -1, "bos_id": 0}),
    "albert": _pieces("Albert", "spiece.model", UNIGRAM | _CLS | _MASK),
    "albert, cased": _pieces(
        "Albert",
        "spiece.model",
        UNIGRAM | _CLS | _MASK,
        do_lower_case=False,
        keep_accents=True,
    ),
    "xlnet": _pieces("XLNet", "spiece.model", UNIGRAM | _XLNET),
    "llama": _pieces("Llama", "tokenizer.model", MERGES | {"user_defined_symbols": ["<tool>"]}, add_bos_token=True),
    "llama, legacy": _pieces("Llama", "tokenizer.model", MERGES, legacy=True, add_bos_token=True, add_eos_token=True),
    "gemma": _pieces("Gemma", "tokenizer.model", MERGES | _GEMMA, add_bos_token=True),
    "plain merges": _pieces("PreTrained", "tokenizer.model", MERGES),
}


def write_json(path: Path, data: Any) -> None:
    """Write JSON as published folders have it."""
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def made(root: Path, name: str) -> Path:
    """Return the folder of a kind, made if it isn't there yet."""
    folder = root / name.replace(", ", "_")
    if not folder.exists():
        folder.mkdir(parents=True)
        FOLDERS[name](folder)
    return folder
