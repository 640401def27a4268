"""Tiny models in the reference library's layout, with a tokenizer and a chat template, and examples to tune them on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from polyformer import save
from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.families import Family
from polyformer.families.generation import Generation
from polyformer.families.llama import Llama
from polyformer.families.t5 import T5
from polyformer.loaded import Loaded
from polyformer.parts.model import TransformerPart
from polyformer.train.tuning import TuneRecipe
from tests.train.toy import NOUNS, VERBS

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """Write a byte-level vocabulary learnt from the toy's words, and its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [f"What does the {n} do?\nThe {n} {v}. user assistant system" for n in NOUNS for v in VERBS]
    tokenizer.train_from_iterator(lines, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def decoder(folder: Path, template: str | None = TEMPLATE, **sizes: Any) -> Path:
    """Save a random Llama of two blocks with its tokenizer."""
    write_tokenizer(folder / "words", template)
    keys = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "architecture": "LlamaForCausalLM",
    }
    return _saved(folder, Llama, {**keys, **sizes}, Generation())


def encoder_decoder(folder: Path) -> Path:
    """Save a random T5 of one block on each side with its tokenizer."""
    write_tokenizer(folder / "words", None)
    keys = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
    said = Generation(decoder_start_token_id=0, eos_token_id=2, pad_token_id=0)
    return _saved(folder, T5, {**keys, "eos_token_id": 2, "pad_token_id": 0}, said)


def _saved(folder: Path, family: type[Family], keys: dict[str, Any], said: Generation) -> Path:
    tokenizer = TextTokenizer.load(folder / "words")
    made = family.from_data({"vocab_size": tokenizer.vocabulary, **keys})
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = made.spec().build()
    assert isinstance(model, TransformerPart)
    save(Loaded(model.eval(), family=made, text_tokenizer=tokenizer, generation=said), folder / "model")
    return folder / "model"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one object to a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def conversations(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Return different conversations of one or two turns about who does what."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        messages = [{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []
        for _ in range(1 + number % 2):
            noun, verb = draw.choice(NOUNS), draw.choice(VERBS)
            messages += [
                {"role": "user", "content": f"What does the {noun} do to number {number}?"},
                {"role": "assistant", "content": f"The {noun} {verb} it. 🙂"},
            ]
        made.append({"messages": messages})
    return made


def tune_recipe(model: Path, examples: Path, train: dict[str, Any] | None = None, **changes: Any) -> TuneRecipe:
    """Return a recipe that tunes a tiny model in a second or two."""
    settings = {
        "budget": {"type": "Epochs", "count": 2},
        "schedule": {"type": "Cosine", "peak": 3e-3, "warmup": 2},
        "precision": "fp32",
        "evaluations": 2,
        "log_every": 2,
        **(train or {}),
    }
    return TuneRecipe.from_data(
        {
            "name": "toy-tuned",
            "base": str(model),
            "data": {"path": str(examples), "validation": 0.2},
            "batch": {"length": 64, "tokens": 128},
            "train": settings,
            "report": {"samples": 2, "sampling": {"limit": 6}},
            **changes,
        }
    )
