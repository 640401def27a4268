"""How each clause of the invariance contract is measured: two layouts of the same work, and their largest difference.

All but one in double precision, where rounding can't hide a leak. Compared are the answers at real rows and, where
nothing is read from a cache, the gradients that they give the weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polyformer.parts import Memory, contract_of
from polyformer.parts.caches import SlidingCache
from polyformer.parts.contract import Clause, Refuses, Within
from polyformer.parts.flow import Cache, Flow, GrowingCache, StaticCache, start_flow
from polyformer.parts.inputs import Given, InputPart
from polyformer.parts.model import TransformerPart
from polyformer.parts.part import Part
from polyformer.parts.view import View
from tests.parts.subjects import Subject
from tests.spec.trees import WIDTH

GRID = (4, 6)
LENGTHS = (5, 1, 9, 4)
PIECES = ((5, 1, 1, 1, 1), (3, 4, 1, 1), (1,) * 9, (9,))


class NotPosedError(Exception):
    """The clause has no meaning for what the part reads: two pictures are not packed into one."""


@dataclass
class Sequence:
    """One sequence [S, ...], its ids [S], and the encoder's output that it looks at [T, D]."""

    x: Tensor
    ids: Tensor
    memory: Tensor


@dataclass
class Batch:
    """Sequences laid out for one pass.

    Attributes:
        x: what the part reads [B, S, ...].
        ids: token ids [B, S], which `flow.inputs` carries too.
        memory: an encoder's output [B, T, D].
        valid, documents: which places are real, and of which document [B, K], or None.
    """

    x: Tensor
    ids: Tensor
    memory: Memory
    valid: Tensor | None = None
    documents: Tensor | None = None


@dataclass
class Answer:
    """What a pass gives for each sequence: its real rows, or one vector."""

    each: list[Tensor]
    vectors: bool = False


# ---------------------------------------------------------------------------------------------------------------
# Layouts


def draw(subject: Subject, lengths: tuple[int, ...], memories: bool = True) -> list[Sequence]:
    """Draw sequences of what the subject reads; pictures and grids have one size whatever the lengths.

    Without `memories` of their own, all look at the same encoder's output.
    """
    chance = torch.Generator().manual_seed(len(lengths))
    encoded = [torch.randn(3 + i % 3, WIDTH, generator=chance, dtype=torch.float64) for i in range(len(lengths))]
    found = []
    for i, given in enumerate(lengths):
        length = GRID[0] * GRID[1] if subject.feed in ("grid", "pixels") else given + 6 * (subject.feed == "sound")
        shape = {"sound": (length,), "pixels": (3, 6, 6)}.get(subject.feed, (length, subject.width))
        ids = torch.randint(3, 11, (length,), generator=chance)
        ids[-1] = 2  # ends a text
        x = ids if subject.feed == "ids" else torch.randn(shape, generator=chance, dtype=torch.float64)
        found.append(Sequence(x, ids, encoded[i if memories else 0]))
    return found


def lay(rows: list[Sequence], side: str = "") -> Batch:
    """Lay sequences into one batch; on a `side`, with padding that holds ordinary values."""
    size = max(len(row.ids) for row in rows) + 2 * bool(side)
    ids, valid = torch.full((len(rows), size), 5), torch.zeros(len(rows), size, dtype=torch.bool)
    kind = rows[0].x
    x = torch.full((len(rows), size, *kind.shape[1:]), 7).to(kind.dtype)
    for i, row in enumerate(rows):
        place = slice(size - len(row.ids), size) if side == "left" else slice(0, len(row.ids))
        ids[i, place], valid[i, place] = row.ids, True
        if side:
            x[i, place] = row.x
    x = x if side else torch.stack([row.x for row in rows])
    longest = max(len(row.memory) for row in rows)
    hidden = torch.full((len(rows), longest, WIDTH), 3.0, dtype=torch.float64)
    seen = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        hidden[i, : len(row.memory)], seen[i, : len(row.memory)] = row.memory, True
    return Batch(x, ids, Memory(hidden, None if bool(seen.all()) else seen), valid if side else None)


def pack(rows: list[list[Sequence]]) -> Batch:
    """Lay several sequences behind each other in each row of one batch; rows must come to one length."""
    joined = [Sequence(torch.cat([s.x for s in row]), torch.cat([s.ids for s in row]), row[0].memory) for row in rows]
    documents = [torch.cat([torch.full((len(s.ids),), i) for i, s in enumerate(row)]) for row in rows]
    return replace(lay(joined), documents=torch.stack(documents))


# ---------------------------------------------------------------------------------------------------------------
# Passes


def run(
    subject: Subject, part: Part, batch: Batch, cache: Cache | None = None, call: Callable[..., Tensor] | None = None
) -> Answer:
    """Walk a batch through a part (or through `call`, which stands for it); a cache that is given is advanced."""
    torch.manual_seed(1)
    if isinstance(part, TransformerPart):
        memory = None if part.encoder is None else batch.memory
        out = (part.decode if call is None else call)(batch.x, batch.valid, memory, cache, batch.documents)
        return Answer(real_rows(out, None if batch.valid is None else batch.valid[:, -out.shape[1] :]))
    flow = begin(subject, part, batch, cache)
    out = (part if call is None else call)(batch.x, flow)
    if cache is not None:
        cache.length += batch.ids.shape[1]
    if out.shape[:2] == (len(batch.x), flow.view.queries):
        return Answer(real_rows(out, flow.rows_valid))
    return Answer(list(out), vectors=True)


def begin(subject: Subject, part: Part, batch: Batch, cache: Cache | None) -> Flow:
    """Return the flow that a batch travels with."""
    kinds = {"token_type_ids": batch.ids % 2}
    if isinstance(part, InputPart):
        read = {name: values for name, values in kinds.items() if name in part.reads}
        flow = part.begin(Given(batch.x, batch.valid, batch.documents, cache, read))
    else:
        flow = start_flow(batch.x, batch.valid, batch.documents, cache)
        flow.inputs = {"ids": batch.ids, **kinds}
        flow.grid = GRID if subject.feed == "grid" else None
    hidden = batch.memory.hidden
    flow.memory = hidden
    flow.memory_view = View(flow.view.queries, hidden.shape[1], batch.memory.valid, None, False, hidden.device)
    return flow


def real_rows(out: Tensor, real: Tensor | None) -> list[Tensor]:
    """Return each sequence's real rows."""
    return list(out) if real is None else [row[valid] for row, valid in zip(out, real, strict=True)]


def gap(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Return the largest difference as a share of the largest value that is wanted; infinite for other shapes."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, wanted, strict=True)]
    if any(a.shape != b.shape or not bool(a.isfinite().all()) for a, b in pairs):
        return float("inf")
    apart = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    size = max((float(b.abs().max()) for _, b in pairs if b.numel()), default=0.0)
    return apart / (size or 1.0)


def slopes(part: Part, answers: list[Tensor]) -> list[Tensor]:
    """Return the gradients that weights get when each element of the answers counts differently."""
    weights = [weight for weight in part.parameters() if weight.requires_grad]
    flat = torch.cat([answer.flatten() for answer in answers])
    if not weights or not flat.requires_grad:
        return []
    loss = (flat * torch.linspace(-1, 1, len(flat), dtype=flat.dtype)).sum()
    return list(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))


def compare(part: Part, found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the gap between answers or, if that is larger, between their gradients."""
    return max(gap(found, wanted), gap(slopes(part, found), slopes(part, wanted)))


def alone(subject: Subject, part: Part, rows: list[Sequence]) -> list[Tensor]:
    """Return the answer to each sequence by itself, without a mask."""
    return [run(subject, part, lay([row])).each[0] for row in rows]


def posed(subject: Subject, *feeds: str) -> None:
    """Raise `NotPosedError` for a subject that reads one of these."""
    if subject.feed in feeds:
        raise NotPosedError


# ---------------------------------------------------------------------------------------------------------------
# Clauses


def padded(subject: Subject, side: str) -> float:
    """Pad a batch of several lengths."""
    posed(subject, "pixels")
    part, rows = subject.build(), draw(subject, LENGTHS)
    return compare(part, run(subject, part, lay(rows, side)).each, alone(subject, part, rows))


def batched(subject: Subject) -> float:
    """Batch sequences of one length."""
    part, rows = subject.build(), draw(subject, (6, 6, 6))
    return compare(part, run(subject, part, lay(rows)).each, alone(subject, part, rows))


def permuted(subject: Subject) -> float:
    """Turn a batch round."""
    part, rows = subject.build(), draw(subject, (6, 6, 6))
    found, wanted = run(subject, part, lay(rows[::-1])), run(subject, part, lay(rows))
    return compare(part, found.each[::-1], wanted.each)


@torch.no_grad()
def cached(subject: Subject) -> float:
    """Read piece by piece, from each cache; and where padding is no matter, a padded batch too."""
    posed(subject, "pixels")
    part, worst = subject.build(), 0.0
    rows = draw(subject, (9, 9))
    for pieces in PIECES:
        for cache in (GrowingCache(), StaticCache(room=40), SlidingCache(room=40)):
            worst = max(worst, gap(_piecewise(subject, part, lay(rows), pieces, cache), alone(subject, part, rows)))
    rows, clashes = draw(subject, (9, 4, 6)), contract_of(subject.spec)
    for side in ("right", "left"):
        batch = lay(rows, side)
        if f"padded on the {side}" not in clashes and not run(subject, part, batch).vectors:
            pieces = (3, 5, 1, 1, 1)
            for cache in (GrowingCache(), SlidingCache(room=40)):
                found = _piecewise(subject, part, batch, pieces, cache)
                worst = max(worst, gap(found, alone(subject, part, rows)))
    return worst


def _piecewise(subject: Subject, part: Part, batch: Batch, pieces: tuple[int, ...], cache: Cache) -> list[Tensor]:
    if subject.feed in ("sound", "grid"):
        pieces = (batch.x.shape[1] - 1, 1)
    done, answers = 0, []
    for size in pieces:
        here, done = slice(done, done + size), done + size
        valid = None if batch.valid is None else batch.valid[:, :done]
        answers.append(run(subject, part, Batch(batch.x[:, here], batch.ids[:, here], batch.memory, valid), cache))
    if answers[-1].vectors:
        return answers[-1].each
    return [torch.cat(one) for one in zip(*(answer.each for answer in answers), strict=True)]


def packed(subject: Subject) -> float:
    """Pack documents into rows; the batch of one row, too."""
    posed(subject, "pixels")
    part, rows = subject.build(), draw(subject, (5, 1, 9, 4, 9), memories=False)
    worst = 0.0
    for layout in ([[0, 2], [1, 3, 4]], [[0, 1, 2, 3, 4]]):
        layout = [[0, 1]] if subject.feed in ("sound", "grid") else layout
        out = run(subject, part, pack([[rows[i] for i in row] for row in layout])).each
        found: dict[int, Tensor] = {}
        for row, places in zip(out, layout, strict=True):
            found |= dict(zip(places, row.split([len(rows[i].ids) for i in places]), strict=True))
        worst = max(worst, compare(part, [found[i] for i in sorted(found)], alone(subject, part, rows)))
    return worst


@torch.no_grad()
def precision(subject: Subject) -> float:
    """Compute in float32."""
    part, batch = subject.build(), lay(draw(subject, (6, 6, 6)))
    memory = Memory(batch.memory.hidden.float(), batch.memory.valid)
    x = batch.x.float() if batch.x.is_floating_point() else batch.x
    single = run(subject, copy.deepcopy(part).float(), replace(batch, x=x, memory=memory))
    return gap(single.each, run(subject, part, batch).each)


def trained(subject: Subject) -> float:
    """Take gradients, which differ from themselves only if they are not finite."""
    part, batch = subject.build(), lay(draw(subject, (6, 6, 6)))
    found = slopes(part, run(subject, part, batch).each)
    return gap(found, found)


def checkpointed(subject: Subject) -> float:
    """Train, with dropout and moving statistics, on activations that are made again."""
    batch = lay(draw(subject, (6, 6, 6)))
    found = []
    for again in (False, True):
        part = subject.build().train()
        work = partial(run, subject, part, batch)
        made = checkpoint(lambda work=work: work().each, use_reentrant=False) if again else work().each
        found.append([*made, *slopes(part, made), *(buffer for buffer in part.buffers())])
    return gap(*found)


@torch.no_grad()
def compiled(subject: Subject) -> float:
    """Compile: captured by Dynamo and lowered to the same operators, without code generation, which takes minutes."""
    part, batch = subject.build(), lay(draw(subject, (6, 6, 6)))
    wanted = run(subject, part, batch).each
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = torch.compile(part.decode if isinstance(part, TransformerPart) else part, backend="aot_eager")
        return gap(run(subject, part, batch, call=call).each, wanted)


@torch.no_grad()
def from_meta(subject: Subject) -> float:
    """Build shapes only, then put the weights in."""
    part, batch = subject.build(), lay(draw(subject, (6, 6, 6)))
    empty = subject.whole.build("meta", torch.float64)
    empty.load_state_dict(part.state_dict(), assign=True)
    if isinstance(empty, TransformerPart):
        empty.tie()
    return gap(run(subject, empty.eval(), batch).each, run(subject, part, batch).each)


MEASURES: Mapping[Clause, Callable[[Subject], float]] = {
    "padded on the right": partial(padded, side="right"),
    "padded on the left": partial(padded, side="left"),
    "batched": batched,
    "permuted": permuted,
    "cached": cached,
    "packed": packed,
    "precision": precision,
    "trained": trained,
    "checkpointed": checkpointed,
    "compiled": compiled,
    "meta": from_meta,
}


def trainable(subject: Subject) -> bool:
    """Tell whether gradients can be had of a subject."""
    clash = contract_of(subject.spec).get("trained")
    return clash is None or not isinstance(clash.term, Refuses)


def measure(subject: Subject, clause: Clause) -> float:
    """Measure a clause; of what refuses gradients, without them, but where they are the question."""
    with torch.set_grad_enabled(clause == "trained" or trainable(subject)):
        return MEASURES[clause](subject)


def allowed(subject: Subject, clause: Clause, plain: float) -> float:
    """Return the tolerance that holds for a subject: the clause's own, or the one that it declares."""
    clash = contract_of(subject.spec).get(clause)
    return clash.term.tolerance if clash is not None and isinstance(clash.term, Within) else plain
