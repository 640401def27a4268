"""A sample of a base's numbers, by which an adapter that was made for another base is told."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import Transformer
from polyformer.parts.adapters import AdaptedPart
from polyformer.parts.linear import LinearPart
from polyformer.parts.model import TransformerPart
from polyformer.tune.targets import standing

NOTE = "polyformer_base"
"""Under what name the sample stands in an adapter's file."""

COUNT = 256
"""Numbers in a sample."""


def sample(model: TransformerPart, paths: Sequence[str]) -> Tensor | None:
    """Return some numbers of the matrices at these paths; None where they aren't held as plain ones."""
    assert isinstance(model.spec, Transformer)
    places = standing(model.spec)
    parts = [model.get_submodule(places[path]) for path in sorted(paths) if path in places]
    every = [one.base if isinstance(one, AdaptedPart) else one for one in parts]
    bases = [one for one in every if isinstance(one, LinearPart)]
    if not bases or len(bases) < len(every):
        return None
    chosen = bases[:: -(-len(bases) // COUNT)]
    each = -(-COUNT // len(chosen))
    found = []
    for one in chosen:
        flat = one.weight.detach().flatten()
        found.append(flat[torch.linspace(0, len(flat) - 1, each, device=flat.device).long()].float().cpu())
    return torch.cat(found)


def written(numbers: Tensor) -> str:
    """Return a sample as text."""
    return base64.b64encode(numbers.half().numpy().tobytes()).decode("ascii")


def refuse_other_base(said: str | None, model: TransformerPart, paths: Sequence[str]) -> None:
    """Raise `SpecError` where a sample isn't of this model; in half precision, the model may hold rounded numbers."""
    own = None if said is None else sample(model, paths)
    if said is None or own is None:
        return
    try:
        numbers = np.frombuffer(base64.b64decode(said, validate=True), np.float16)
    except ValueError:
        numbers = np.empty(0, np.float16)
    told = torch.from_numpy(numbers.astype(np.float32))
    half = next(one.dtype for one in model.parameters() if one.is_floating_point()) == torch.bfloat16
    exactness = 2.0**-7 if half else 2.0**-10
    if told.shape != own.shape or not torch.allclose(told, own, rtol=exactness, atol=1e-6):
        raise SpecError(
            "the adapter was trained on another base: its own sample of the base's numbers is not of this model"
        )
