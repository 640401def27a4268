"""What the tests of the native runtime share: the checkpoints of families that write, and how a text is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.loaded import Loaded
from polyformer.native.given import from_tensors
from polyformer.native.kinds import Precision, kinds_for
from polyformer.native.library import library
from polyformer.native.lowering import lower
from polyformer.native.machine import Machine, NativeModel, NativeState
from tests.families.cases import CASES, Case
from tests.families.parity import load

WRITERS = [case for case in CASES if case.cached and case.given in ("text", "pairs")]
REFUSED = ("bert-lm", "roberta-lm", "electra-lm", "big_bird", "reformer")
LOWERED = [case for case in WRITERS if not case.name.startswith(REFUSED)]
ROOM = 32

lowered = pytest.mark.parametrize("case", LOWERED, ids=str)
compiled = pytest.mark.skipif(library() is None, reason="the native runtime was not compiled: pip install -e .")


def tensors_of(loaded: Loaded) -> dict[str, Tensor]:
    """Return all tensors of a model by path."""
    return dict(loaded.model.state_dict())


def native(loaded: Loaded, weights: Precision = "fp32", **machine: Any) -> NativeState:
    """Return a model on the native side."""
    program = lower(loaded.spec)
    given = from_tensors(program, tensors_of(loaded), ROOM)
    made = NativeModel(program, given, kinds_for(program, weights), ROOM)
    return NativeState(made, Machine(**{"room": ROOM, "threads": 2, **machine}))


def texts(case: Case) -> tuple[list[list[int]], list[list[int]]]:
    """Return what is read and what is written: three sequences each; nothing is read by decoders alone."""
    data = {name: tensor.tolist() for name, tensor in case.inputs().items()}
    if case.given == "text":
        return [], data["input_ids"]
    return data["input_ids"], data["decoder_input_ids"]


def answers(case: Case, loaded: Loaded, row: int) -> Tensor:
    """Return the model's own scores [S, V] of one sequence."""
    data: Mapping[str, Tensor] = {
        name: tensor[row : row + 1] for name, tensor in case.inputs().items() if "mask" not in name
    }
    with torch.no_grad():
        logits: Tensor = loaded.model(**data).logits
    return logits[0]


def run(machine: Any, case: Case, cuts: list[int], row: int = 0, slot: int = 0) -> Tensor:
    """Run one sequence in pieces; return the scores [S, V] of all rows."""
    reads, writes = texts(case)
    if reads:
        machine.read(reads[row], slot)
    found, start = [], machine.length(slot)
    for count in cuts:
        ids = writes[row][start : start + count]
        places = list(range(start, start + count))
        found.append(torch.as_tensor(machine.step(ids, [slot] * count, places, list(range(count)))))
        start += count
    return torch.cat(found)


def length_of(case: Case) -> int:
    """Return how many tokens each sequence has."""
    return len(texts(case)[1][0])


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, as a share of the largest score."""
    return float((found - wanted).abs().max() / wanted.abs().max())


__all__ = ["LOWERED", "REFUSED", "ROOM", "WRITERS", "answers", "apart", "compiled", "load", "lowered", "native", "run"]
