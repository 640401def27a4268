"""What lies beside a model and belongs to it: read with it and written back with it, in whichever layout."""

from __future__ import annotations

import json
from pathlib import Path

from polyformer.families.sentence import SentenceModules, read_sentence_modules
from polyformer.loaded.layouts import MODULES
from polyformer.loaded.model import Loaded, Pooling
from polyformer.loaded.tokenizers import read_tokenizers
from polyformer.weights import strict_json
from polyformer.weights.assemble import assemble
from polyformer.weights.folders import member

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
SMALL = 64 * 2**20


def read_sentence(path: Path) -> SentenceModules | None:
    """Read how a folder pools its model's rows (sentence-transformers); None where it says nothing of that."""
    return read_sentence_modules(path) if (path / MODULES).exists() else None


def read_beside(loaded: Loaded, path: Path, sentence: SentenceModules | None) -> None:
    """Give a model its tokenizer, its pooling, and the files that say how images or sound are prepared for it.

    Args:
        path: the folder that holds the model itself.
        sentence: how the folder above, or the same one, pools its rows.
    Raises:
        SpecError: a tokenizer that belongs to another model.
        DataError, WeightsError: damaged files, or links out of the folder.
    """
    read_tokenizers(loaded, path)
    for name in PREPROCESSORS:
        _keep(loaded, path, name)
    if sentence is None:
        return
    loaded.pooling = Pooling(assemble(sentence.pooler, sentence.tensors).eval(), sentence.length)
    folder = sentence.folder
    steps = [place for place in folder.iterdir() if place.is_dir() and place.name[:1].isdigit() and place != path]
    for base, files in (
        (path, path.glob("*sentence*.json")),
        (folder, [*folder.glob("*sentence*.json"), *(file for step in steps for file in step.glob("*"))]),
    ):
        for file in files:
            _keep(loaded, base, file.relative_to(base).as_posix())
    loaded.files[MODULES] = _beside_the_model(folder)


def save_beside(loaded: Loaded, stage: Path, tokenizers: Path) -> None:
    """Write what `read_beside` reads into the folder `stage`, and the tokenizer into the folder `tokenizers`."""
    for name, data in loaded.files.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(data)
    for tokenizer in (loaded.tokenizer, loaded.text_tokenizer):
        if tokenizer is not None:
            tokenizer.save(tokenizers)


def _keep(loaded: Loaded, folder: Path, name: str) -> None:
    """Keep a small file of a folder with the model, if it is there, so that it is not lost when that is saved."""
    file = member(folder, name)
    if file.is_file() and file.stat().st_size <= SMALL:
        loaded.files[name] = file.read_bytes()


def _beside_the_model(folder: Path) -> bytes:
    """Return `modules.json` for a folder in which the model lies at the top; as it is where it does so already."""
    steps = strict_json.read_list(member(folder, MODULES))
    if not steps[0].get("path"):
        return (folder / MODULES).read_bytes()
    return (json.dumps([{**steps[0], "path": ""}, *steps[1:]], indent=2) + "\n").encode()
