"""A small BERT with a WordPiece vocabulary, saved by the reference library, for the tests of what models are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "sat", "ran", "##s", "on", "mat", "a", "."]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


def bert(folder: Path, model: str, **changes: Any) -> Any:
    """Save a random BERT of one of the reference's classes, with its vocabulary, and return it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    made = getattr(transformers, model)(transformers.BertConfig(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    made.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return made
