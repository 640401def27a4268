"""GGUF files: the configuration, weights and tokenizer of a decoder in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.families import Family, read_family
from polyformer.families.generation import Generation
from polyformer.families.gguf import gguf_config, gguf_names
from polyformer.loaded.model import Loaded, ready
from polyformer.loaded.tokenizers import refuse_foreign
from polyformer.native.kinds import Precision
from polyformer.weights.assemble import assemble
from polyformer.weights.gguf import GgufFile, read_gguf


def open_gguf(path: Path, native: Precision) -> Loaded:
    """Open a GGUF file whose model is to run natively: its weights stay in the file until then."""
    family, config, file = read_gguf_family(path)
    return _with_texts(
        Loaded(ready(family.spec().build("meta")), family=family, folder=path, native=native), config, file
    )


def load_gguf(path: Path, device: torch.device | str | None, dtype: torch.dtype | None) -> Loaded:
    """Load a GGUF file; quantised tensors become `dtype`, float32 if None."""
    family, config, file = read_gguf_family(path, dtype)
    tensors = family.names().to_ours(gguf_names(config).to_ours(file.tensors))
    loaded = Loaded(ready(assemble(family.spec(), tensors, device, dtype)), family=family, folder=path)
    return _with_texts(loaded, config, file)


def _with_texts(loaded: Loaded, config: Mapping[str, Any], file: GgufFile) -> Loaded:
    loaded.generation = Generation.read(config, {}, str(file.path))
    loaded.text_tokenizer = TextTokenizer.from_gguf(file.metadata)
    refuse_foreign(loaded)
    return loaded


def read_gguf_family(path: Path, dtype: torch.dtype | None = None) -> tuple[Family, Mapping[str, Any], GgufFile]:
    """Read what a GGUF file says of its model: the family, the `config.json` that it comes to, and the open file."""
    file = read_gguf(path, dtype)
    config = gguf_config(file)
    return read_family(config, str(path)), config, file
