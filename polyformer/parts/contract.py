"""The invariance contract: a part gives the same answer however its work is laid out.

A part that declares nothing holds every clause, to the tolerance in `CLAUSES`. What it can't hold it declares beside
its fields, in `Spec.breaks`, with the reason: an answer that `Differs` by nature, a request that it `Refuses`, or a
clause that it holds only `Within` a wider tolerance. A `Refuses` is no promise about behaviour written elsewhere: the
part's `agree` raises in just these words. Every buildable part is measured against its declaration by the tests, and
`docs/parts.md` shows the measured differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyformer.spec import Spec, children

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow

Clause = Literal[
    "padded on the right",
    "padded on the left",
    "batched",
    "permuted",
    "cached",
    "packed",
    "precision",
    "trained",
    "checkpointed",
    "compiled",
    "meta",
]


@dataclass(frozen=True)
class Promise:
    """What a clause means, and to what share of the answer's largest value both sides may differ."""

    meaning: str
    tolerance: float


CLAUSES: Mapping[Clause, Promise] = {
    "padded on the right": Promise("sequences of several lengths in a batch, padding behind them = each alone", 1e-12),
    "padded on the left": Promise("the same with padding before them", 1e-12),
    "batched": Promise("sequences of one length in a batch = each alone", 1e-12),
    "permuted": Promise("the sequences of a batch in another order = the answers in that order", 1e-12),
    "cached": Promise("a prompt in one or several pieces, then token by token, from a cache = all at once", 1e-12),
    "packed": Promise("several documents in one row = each alone", 1e-12),
    "precision": Promise("float32 = float64", 2e-5),
    "trained": Promise("gradients can be had, and are finite", 0.0),
    "checkpointed": Promise("activations made again in the backward pass = kept: answers, gradients, buffers", 1e-12),
    "compiled": Promise("torch.compile = eager", 1e-12),
    "meta": Promise("built on the meta device, then loaded = built in memory", 0.0),
}


@dataclass(frozen=True)
class Within:
    """The clause holds, but only to this share of the answer's largest value."""

    tolerance: float
    why: str


@dataclass(frozen=True)
class Differs:
    """The answer is another one, by the nature of the part."""

    why: str


@dataclass(frozen=True)
class Refuses:
    """The part raises `SpecError` rather than give another answer (see `Part.agree`)."""

    why: str


Term = Within | Differs | Refuses


@dataclass(frozen=True)
class Clash:
    """A clause that a tree doesn't hold: which part in it declares so, and how."""

    part: str
    term: Term

    @property
    def weight(self) -> tuple[int, float]:
        """What decides when several parts of a tree declare something of one clause."""
        kinds = (Within, Differs, Refuses)
        return kinds.index(type(self.term)), getattr(self.term, "tolerance", 0.0)


def contract_of(spec: Spec) -> dict[Clause, Clash]:
    """Return the clauses that a part, or anything it is made of, doesn't hold; all others hold."""
    found = {clause: Clash(type(spec).__name__, term) for clause, term in spec.breaks().items()}
    for name, child in children(spec):
        if isinstance(child, Spec):
            spared = spec.spared.get(name.partition(".")[0], ())
            for clause, clash in contract_of(child).items():
                if clause not in spared and (clause not in found or clash.weight > found[clause].weight):
                    found[clause] = clash
    return found


def asked(flow: Flow) -> Iterator[Clause]:
    """Yield the clauses that a pass relies on and a part may refuse."""
    if flow.continues:
        yield "cached"
    if flow.view.key_documents is not None:
        yield "packed"
    if flow.view.valid is not None:
        yield "padded on the right" if flow.view.right_padded else "padded on the left"
