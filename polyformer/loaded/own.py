"""Folders of ours: a spec, weights under our names, a tokenizer, and a manifest."""

from __future__ import annotations

from pathlib import Path

import torch

from polyformer.errors import SpecError, WeightsError
from polyformer.families.generation import Generation
from polyformer.loaded.beside import read_beside, read_sentence, save_beside
from polyformer.loaded.layouts import GENERATION, LABELS, SPEC
from polyformer.loaded.model import Loaded, ready, write_json
from polyformer.loaded.tokenizers import TOKENIZER
from polyformer.parts.model import Transformer
from polyformer.shrink import Linear4 as Linear4  # a spec.json may name it
from polyformer.weights import strict_json
from polyformer.weights.assemble import assemble, disassemble
from polyformer.weights.files import SINGLE, read_tensors, write_tensors
from polyformer.weights.folders import check_manifest


def load_own(path: Path, device: torch.device | str | None, dtype: torch.dtype | None) -> Loaded:
    """Load a run folder, or another that `save_own` wrote."""
    if not (path / SINGLE).exists():
        raise WeightsError(f"{path} holds no finished model ({SINGLE}); let its training end, or go on with it")
    check_manifest(path)
    spec = read_own_spec(path / SPEC)
    loaded = Loaded(ready(assemble(spec, read_tensors(path / SINGLE), device, dtype)), folder=path)
    if (path / GENERATION).exists():
        loaded.generation = Generation.read({}, strict_json.read(path / GENERATION), str(path / GENERATION))
    if (path / LABELS).exists():
        loaded.labels = tuple(map(str, strict_json.read(path / LABELS).get("labels", ())))
    read_beside(loaded, path, read_sentence(path))
    return loaded


def read_own_spec(file: Path) -> Transformer:
    """Read a `spec.json`; raises `SpecError` for a file that is none."""
    try:
        return Transformer.from_json(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise SpecError(f"{file} is no {SPEC}: it is not UTF-8 at byte {error.start}") from None


def save_own(loaded: Loaded, stage: Path) -> None:
    """Write a folder of ours."""
    (stage / SPEC).write_text(loaded.spec.to_json(), encoding="utf-8")
    write_tensors(stage / SINGLE, disassemble(loaded.model))
    if loaded.generation != Generation():
        write_json(stage / GENERATION, loaded.generation.write())
    if loaded.labels:
        write_json(stage / LABELS, {"labels": list(loaded.labels)})
    save_beside(loaded, stage, stage / TOKENIZER)
