"""Adapters from their folders onto loaded models, and merged into them."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import get_args

from polyformer.errors import RunError, SpecError
from polyformer.families import Family
from polyformer.loaded.heads import Answers, with_head
from polyformer.loaded.layouts import LABELS
from polyformer.loaded.model import Loaded
from polyformer.native.builder import LoweringError
from polyformer.native.kinds import Precision
from polyformer.native.library import required
from polyformer.native.lowering import lower
from polyformer.parts.model import Transformer, TransformerPart
from polyformer.swap import Drift
from polyformer.tune import attach, merge, prompt_ids, read_adapter, write_adapter
from polyformer.weights import strict_json


def with_adapter(loaded: Loaded, folder: str | Path) -> Loaded:
    """Return a model with the adapter of a folder, in PEFT's layout, attached.

    Where the adapter was trained with a head for labels that the base lacks, the model gets it, as the folder says.

    Raises:
        SpecError: an adapter for another base, a method that isn't understood, a model of no published family.
        WeightsError: no adapter there, or one whose tensors don't fit.
    """
    folder = Path(folder)
    drawn: tuple[str, ...] = ()
    if (folder / LABELS).is_file():
        said = strict_json.read(folder / LABELS)
        answers: Answers | None = next((one for one in get_args(Answers) if one == said.get("answers")), None)
        if answers is None:
            raise SpecError(f"{folder / LABELS} doesn't say what the labels are of")
        loaded, drawn = with_head(loaded, answers, tuple(map(str, said.get("labels", ()))))
    family = _family(loaded)
    own = read_adapter(folder, loaded.model, family, base="any" if drawn else "same")
    model = attach(loaded.model, own).eval()
    return dataclasses.replace(loaded, model=model, before=prompt_ids(own_spec(model)))


def own_spec(model: TransformerPart) -> Transformer:
    """Return a model's spec."""
    assert isinstance(model.spec, Transformer)
    return model.spec


def merged(loaded: Loaded) -> tuple[Loaded, Drift | None]:
    """Return a model whose adapters are merged into its matrices, and how far its answers are from those before."""
    found = merge(loaded.model)
    return dataclasses.replace(loaded, model=found.model.eval()), found.drift


def to_write(loaded: Loaded, weights: Precision | None = None) -> Loaded:
    """Return a model with an adapter as it writes fastest: merged, and run natively, where both can be.

    Args:
        weights: how matrices are held there; single precision if None.
    Raises:
        LoweringError, RunError: `weights` are named, but the model can't run natively.
    """
    try:
        loaded, _ = merged(loaded)
    except SpecError:  # a prefix is no matrix; the model runs with it in PyTorch
        return loaded
    try:
        required()
        lower(loaded.spec)
    except (LoweringError, RunError):
        if weights is not None:
            raise
        return loaded
    loaded.native = weights or "fp32"
    return loaded


def write_adapter_into(loaded: Loaded, folder: Path, base: str, answers: Answers | None) -> None:
    """Write a model's adapter into a folder that is there, in PEFT's layout; `answers` says what its labels are of."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter") as beside:
        write_adapter(Path(beside) / "one", loaded.model, _family(loaded), base=base)
        if answers is not None:
            told = {"answers": answers, "labels": list(loaded.labels)}
            (Path(beside) / "one" / LABELS).write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")
        for file in (Path(beside) / "one").iterdir():
            if file.name != "manifest.json":
                file.replace(folder / file.name)


def _family(loaded: Loaded) -> Family:
    if loaded.family is None:
        raise SpecError(
            f"{loaded.folder} is no model of a published family, so an adapter of it has no place in PEFT's layout; "
            "tune it with --method full"
        )
    return loaded.family
