"""The least that can be asked of a part: a sequence of nothing but padding, and sequences of no length."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import CLAUSES, Memory, Part, contract_of
from tests.parts.clauses import Answer, Batch, draw, gap, lay, run, slopes, trainable
from tests.parts.subjects import EVERY, Subject

READERS = [subject for subject in EVERY if subject.feed not in ("pixels", "grid", "sound")]
every = pytest.mark.parametrize("subject", READERS, ids=str)


def with_an_empty_row(batch: Batch) -> Batch:
    """Put a row that is padding alone behind the others."""
    assert batch.valid is not None
    valid = torch.cat((batch.valid, torch.zeros_like(batch.valid[:1])))
    hidden, seen = batch.memory.hidden, batch.memory.valid
    memory = Memory(torch.cat((hidden, hidden[:1])), None if seen is None else torch.cat((seen, seen[:1])))
    return Batch(torch.cat((batch.x, batch.x[:1])), torch.cat((batch.ids, batch.ids[:1])), memory, valid)


def answered(subject: Subject, part: Part, batch: Batch) -> Answer | str:
    """Return a part's answer, or the sentence by which it refuses."""
    try:
        with torch.set_grad_enabled(trainable(subject)):
            return run(subject, part, batch)
    except SpecError as error:
        return str(error)


@every
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_sequence_of_padding_harms_nobody(subject: Subject, side: str) -> None:
    part, batch = subject.build(), lay(draw(subject, (5, 3, 4)), side)
    found = answered(subject, part, with_an_empty_row(batch))
    if isinstance(found, str):
        assert f"{type(subject.spec).__name__} can't be padded" in found or "each sequence must hold" in found
        return
    if f"padded on the {side}" not in contract_of(subject.spec):
        with torch.set_grad_enabled(trainable(subject)):
            wanted = run(subject, part, batch).each
        assert gap(found.each[:3], wanted) <= CLAUSES["permuted"].tolerance
    gradients = slopes(part, found.each) if trainable(subject) else []
    assert all(one.isfinite().all() for one in (*found.each, *gradients))


@every
def test_sequences_of_no_length(subject: Subject) -> None:
    """Nothing comes of them, or a sentence; no error of PyTorch's."""
    part, batch = subject.build(), lay(draw(subject, (4, 4)))
    found = answered(subject, part, replace(batch, x=batch.x[:, :0], ids=batch.ids[:, :0]))
    if isinstance(found, str):
        assert "length 0" in found or "0 rows" in found
        return
    assert [len(one) for one in found.each] == [0, 0]
