"""Matrices that read the same rows, made one: fewer and larger products for PyTorch."""

from __future__ import annotations

from typing import NamedTuple

from polyformer.errors import SpecError
from polyformer.parts import Attention, Chain, FeedForward, Identity, Linear, Transformer
from polyformer.spec import Record, Spec, rewrite, walk
from polyformer.swap.origins import Joins
from polyformer.swap.swap import Swap


class _Fusion(NamedTuple):
    """The field that a fused matrix has, and those whose matrices it is made of, in the order of its rows."""

    whole: str
    parts: tuple[str, ...]


FUSIONS: dict[type[Record], _Fusion] = {
    Attention: _Fusion("qkv", ("q", "k", "v")),
    FeedForward: _Fusion("gate_up", ("gate", "up")),
}


class FuseProjections(Swap):
    """One matrix for queries, keys and values, and one for gate and up, in every block where plain matrices make them.

    Answers stay, to the rounding of sums. What stands behind a matrix (QK-norm) stays behind its share. Left apart are
    matrices that are tied to others, and those of which some have a bias and some have none.
    """

    def rewritten(self, spec: Transformer) -> Transformer:
        tied = [name for tie in spec.ties for name in (tie.tied, tie.to)]

        def change(path: str, record: Record) -> Record:
            fusion = FUSIONS.get(type(record))
            if fusion is None or getattr(record, fusion.whole) is not None:
                return record
            own = tuple(f"{path}.{name}." for name in fusion.parts)
            cut = [_cut(getattr(record, name)) for name in fusion.parts]
            matrices = [first for first, _ in cut if first is not None]
            if (
                len(matrices) < len(cut)
                or len({one.bias for one in matrices}) > 1
                or any(n.startswith(own) for n in tied)
            ):
                return record
            whole = Linear(matrices[0].inputs, sum(one.outputs for one in matrices), matrices[0].bias)
            rest = dict(zip(fusion.parts, (rest for _, rest in cut), strict=True))
            return record.replace(**rest, **{fusion.whole: whole})

        new = rewrite(spec, change)
        if not any(_whole(record) for _, record in walk(new)):
            raise SpecError(
                "nothing can be fused here: no plain matrices make queries, keys and values, or gate and up"
            )
        return new

    def joins(self, old: Transformer, new: Transformer) -> Joins:
        were, found = dict(walk(old)), {}
        for path, record in walk(new):
            fusion = _whole(record)
            if fusion is not None and not _whole(were[path]):
                matrices = [getattr(were[path], name) for name in fusion.parts]
                first = ["" if isinstance(one, Linear) else ".steps.0" for one in matrices]
                found[f"{path}.{fusion.whole}"] = tuple(
                    f"{path}.{name}{step}" for name, step in zip(fusion.parts, first, strict=True)
                )
        return found


def _whole(record: Record) -> _Fusion | None:
    """Return what is fused in a record."""
    fusion = FUSIONS.get(type(record))
    return fusion if fusion is not None and getattr(record, fusion.whole) is not None else None


def _cut(projection: Spec | None) -> tuple[Linear | None, Spec]:
    """Return the matrix that a projection begins with, and what follows."""
    if isinstance(projection, Linear):
        return projection, Identity()
    if isinstance(projection, Chain):
        first, rest = projection.steps[0], projection.steps[1:]
        if isinstance(first, Linear):
            return first, rest[0] if len(rest) == 1 else Chain(rest) if rest else Identity()
    return None, Identity()
