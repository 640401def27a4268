"""Changes of norms: of what kind they are, and where they stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from polyformer.errors import SpecError
from polyformer.families.blocks import Placement
from polyformer.parts import (
    Attention,
    BatchNorm,
    Chain,
    CrossAttention,
    LayerNorm,
    Norm,
    PowerNorm,
    Residual,
    RMSNorm,
    Stack,
    Transformer,
)
from polyformer.spec import Record, Spec, field_types, rewrite, walk
from polyformer.swap.origins import Moves
from polyformer.swap.swap import Swap

NormKind = Literal["layer", "rms", "batch", "power"]
KINDS: dict[str, type[Norm]] = {"layer": LayerNorm, "rms": RMSNorm, "batch": BatchNorm, "power": PowerNorm}
SLOTS = ("pre", "post", "after")


class SwapNorms(Swap):
    """Another kind of norm in the embeddings and the stacks; width, eps and whether there is a gain stay.

    Norms within an attention (QK-norm) and in heads are left alone: there, the rows that "batch" and "power" take
    their statistics of are not those of the sequence.
    """

    kind: NormKind

    def rewritten(self, spec: Transformer) -> Transformer:
        wanted, were = KINDS[self.kind], dict(walk(spec))

        def change(path: str, record: Record) -> Record:
            if isinstance(record, Attention | CrossAttention):
                return were[path]
            if not isinstance(record, Norm) or path.split(".")[0] in ("head", "pooler") or type(record) is wanted:
                return record
            kept = field_types(wanted).keys() & {"width", "eps", "gain"} & field_types(type(record)).keys()
            return wanted(**{name: getattr(record, name) for name in kept})

        return rewrite(spec, change)


class PlaceNorms(Swap):
    """Norms at another place of the residual connections: after the sum (post), before the sublayer (pre), before and
    behind it (sandwich), or behind it only (output); and at the end of a stack, unless they are post.

    A norm goes where it normalises what the same sublayer reads: the one after a sum is the one before the next
    sublayer, and after the last sum that at the end of the stack.
    """

    placement: Placement

    def rewritten(self, spec: Transformer) -> Transformer:
        records, last = dict(walk(spec)), {path: residuals[-1] for path, residuals in _stacks(spec)}
        if not last:
            raise SpecError("this model has no residual connections, so its norms can't be placed in them")

        def change(path: str, record: Record) -> Record:
            if isinstance(record, Residual):
                return self._placed(path, record)
            if isinstance(record, Stack) and path in last:
                own = record.norm or _norm_of(last[path], records[last[path]])
                return record.replace(norm=None if self.placement == "post" else own)
            return record

        return rewrite(spec, change)

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        found: dict[str, str | None] = {}
        for (path, residuals), (_, others) in zip(_stacks(old), _stacks(new), strict=True):
            here, there = _reading(new, path, others), _reading(old, path, residuals)
            found |= {to: origin for to, origin in zip(here, there, strict=True) if to is not None}
        return found

    def _placed(self, path: str, record: Residual) -> Residual:
        norm = _norm_of(path, record)
        filled = {"post": ("after",), "pre": ("pre",), "sandwich": ("pre", "post"), "output": ("post",)}
        return record.replace(
            **{slot: _with(norm if slot in filled[self.placement] else None, getattr(record, slot)) for slot in SLOTS}
        )


def _stacks(spec: Transformer) -> Iterator[tuple[str, list[str]]]:
    """Yield the path of each stack that has residual connections, and theirs in order."""
    for path, record in walk(spec):
        if isinstance(record, Stack):
            residuals = [inner for inner, below in walk(record, path) if isinstance(below, Residual)]
            if residuals:
                yield path, residuals


def _norm_of(path: str, record: Record) -> Norm:
    """Return the norm that stands in a residual's slots."""
    for slot in SLOTS:
        for _, norm in _norms_in(getattr(record, slot), slot):
            return norm
    raise SpecError(f"{path} has no norm in its slots, so there is none to place; give it one, or another model")


def _norms_in(slot: Spec | None, path: str) -> Iterator[tuple[str, Norm]]:
    if isinstance(slot, Norm):
        yield path, slot
    elif isinstance(slot, Chain):
        yield from ((f"{path}.steps.{i}", step) for i, step in enumerate(slot.steps) if isinstance(step, Norm))


def _with(norm: Norm | None, slot: Spec | None) -> Spec | None:
    """Return a slot with this norm in place of its own, and what else stands in it."""
    steps = slot.steps if isinstance(slot, Chain) else () if slot is None else (slot,)
    kept = ((norm,) if norm is not None else ()) + tuple(step for step in steps if not isinstance(step, Norm))
    return (kept[0] if len(kept) == 1 else Chain(kept)) if kept else None


def _reading(spec: Transformer, stack: str, residuals: list[str]) -> list[str | None]:
    """Return the paths of the norms through which each sublayer reads, and at last the stack's reader; or None."""
    records = dict(walk(spec))

    def at(path: str, slot: str) -> str | None:
        return next((found for found, _ in _norms_in(getattr(records[path], slot), f"{path}.{slot}")), None)

    after = [None, *(at(path, "after") for path in residuals)]
    before = [*(at(path, "pre") for path in residuals), f"{stack}.norm" if f"{stack}.norm" in records else None]
    return [own or earlier for own, earlier in zip(before, after, strict=True)]
