"""Several sequences behind each other in one pass, each with a cache of its own, against each alone: every part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import Attention, Causal
from polyformer.parts.contract import CLAUSES, contract_of
from polyformer.parts.flow import Flow, GrowingCache, Separate, start_flow
from polyformer.parts.model import TransformerPart
from tests.parts.clauses import allowed, alone, begin, draw, gap, lay
from tests.parts.subjects import Subject, subjects

ROUNDS = ((3, 4, 1), (5, 0, 4), (1, 0, 1))
"""How many rows of each sequence are read in each pass."""


def is_measured(subject: Subject) -> bool:
    """Tell whether rows come out for rows, one by one, and a cache can be used."""
    spec = subject.spec
    return (
        subject.feed in ("rows", "ids") and "cached" not in contract_of(spec) and type(spec).__name__ != "Transformer"
    )


@pytest.mark.parametrize("subject", [one for one in subjects() if is_measured(one)], ids=str)
@torch.no_grad()
def test_joined(subject: Subject) -> None:
    part, rows = subject.build(), draw(subject, (9, 4, 6))
    assert not isinstance(part, TransformerPart)
    wanted = alone(subject, part, rows)
    if any(len(answer) != len(row.ids) for answer, row in zip(wanted, rows, strict=True)):
        pytest.skip("it makes other rows than it is given")
    caches, found = [GrowingCache() for _ in rows], list[list[Tensor]]([[], [], []])
    for sizes in ROUNDS:
        asked, flows, given = [], [], []
        for i, size in enumerate(sizes):
            if size:
                batch = lay([rows[i]])
                here = slice(caches[i].length, caches[i].length + size)
                batch.x, batch.ids = batch.x[:, here], batch.ids[:, here]
                flows.append(begin(subject, part, batch, caches[i]))
                given.append(batch.x)
                asked.append(i)
        out = part(torch.cat(given, 1), Flow.joined(flows))
        for i, rows_of_it in zip(asked, out[0].split([sizes[i] for i in asked]), strict=True):
            found[i].append(rows_of_it)
            caches[i].length += sizes[i]
    joined = [torch.cat(one) for one in found]
    assert gap(joined, wanted) <= allowed(subject, "batched", CLAUSES["batched"].tolerance)


def test_what_mixes_sequences_is_refused() -> None:
    """A part that looks at other rows without asking which are of its sequence can't get at a cache."""
    with pytest.raises(SpecError, match="would mix their keys"):
        Separate().extend("decoder.0.op", torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    with pytest.raises(SpecError, match="would mix their sources"):
        Separate().memory("decoder.0.op", lambda: (torch.zeros(1), torch.zeros(1)))


def test_a_pass_over_one_is_the_plain_pass() -> None:
    torch.manual_seed(0)
    part = Attention.of_width(8, 2, Causal()).build()
    x = torch.randn(1, 5, 8)
    flows = [start_flow(x[:, :2]), start_flow(x[:, 2:])]
    together = part(x, Flow.joined(flows))
    assert torch.equal(together[:, :2], part(x[:, :2], start_flow(x[:, :2])))
