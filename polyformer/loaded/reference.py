"""Hugging Face folders: `config.json`, weights under the reference library's names, its tokenizer files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from polyformer.families import Family, read_family
from polyformer.families.config import write_config
from polyformer.families.generation import Generation
from polyformer.loaded.beside import read_beside, read_sentence, save_beside
from polyformer.loaded.layouts import CONFIG, GENERATION
from polyformer.loaded.model import Loaded, ready, write_json
from polyformer.weights import strict_json
from polyformer.weights.assemble import assemble, disassemble
from polyformer.weights.files import INDEX, SINGLE, TensorMap, read_tensors, write_tensors
from polyformer.weights.folders import member


def load_reference(
    path: Path, device: torch.device | str | None, dtype: torch.dtype | None, read: Callable[[Path], TensorMap]
) -> Loaded:
    """Load a Hugging Face folder; `read` opens its weights."""
    sentence = read_sentence(path)
    path = path if sentence is None else sentence.transformer
    config_file, generation_file = member(path, CONFIG), member(path, GENERATION)
    config = strict_json.read(config_file)
    family = read_family(config, str(config_file))
    tensors = read(path)
    family = family.seeing(tensors)
    said = strict_json.read(generation_file) if generation_file.exists() else {}
    generation = Generation.read(config, said, str(generation_file if said else config_file))
    model = ready(assemble(family.spec(), family.names().to_ours(tensors), device, dtype))
    loaded = Loaded(model, family=family, generation=generation, folder=path, labels=family.labels)
    read_beside(loaded, path, sentence)
    return loaded


def read_reference_family(path: Path) -> Family:
    """Read the configuration of a Hugging Face folder, and of its weights, where they can be opened, the names."""
    sentence = read_sentence(path)
    path = path if sentence is None else sentence.transformer
    file = member(path, CONFIG)
    family = read_family(strict_json.read(file), str(file))
    return family.seeing(read_tensors(path)) if (path / SINGLE).exists() or (path / INDEX).exists() else family


def save_reference(loaded: Loaded, family: Family, stage: Path) -> None:
    """Write a folder that the reference library loads too."""
    parameter = next(loaded.model.parameters())
    write_json(stage / CONFIG, write_config(family, parameter.dtype))
    write_json(stage / GENERATION, loaded.generation.write())
    write_tensors(stage / SINGLE, family.names().to_disk(disassemble(loaded.model)))
    save_beside(loaded, stage, stage)
