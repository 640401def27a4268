"""sentence-transformers folders: how texts are pooled, kept with the model and written back as it was read."""

from __future__ import annotations

from pathlib import Path

from polyformer.families.sentence import MODULES, SentenceModules, read_sentence_modules
from polyformer.loaded.model import Loaded, Pooling, keep
from polyformer.weights.assemble import assemble


def read_sentence(path: Path) -> SentenceModules | None:
    """Read how a folder pools its model's rows; None where it says nothing of that."""
    return read_sentence_modules(path) if (path / MODULES).exists() else None


def give_pooling(loaded: Loaded, sentence: SentenceModules, path: Path) -> None:
    """Build the pooling of a folder and keep its files, to be written back as they are."""
    loaded.pooling = Pooling(assemble(sentence.pooler, sentence.tensors).eval(), sentence.length)
    steps = [place for place in path.iterdir() if place.is_dir() and place.name[:1].isdigit()]
    files = [*path.glob("*sentence*.json"), path / MODULES]
    files += [file for step in steps for file in (*step.glob("*.json"), *step.glob("*.safetensors"))]
    for file in files:
        keep(loaded, path, file.relative_to(path).as_posix())
