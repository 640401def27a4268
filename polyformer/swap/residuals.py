"""A change of residual connections: without them, for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from polyformer.errors import SpecError
from polyformer.parts import Chain, Residual, Transformer
from polyformer.spec import Record, Spec, rewrite, walk
from polyformer.swap.origins import Moves
from polyformer.swap.swap import Swap

SLOTS = ("pre", "op", "post", "after")


class SwapResiduals(Swap):
    """after(post(op(pre(x)))) in place of after(x + post(op(pre(x)))): a `Chain` of what stands in the slots.

    So nothing of what a sublayer reads is kept but by the sublayer itself. All tensors stay.
    """

    kind: Literal["none"] = "none"

    def rewritten(self, spec: Transformer) -> Transformer:
        if not any(isinstance(record, Residual) for _, record in walk(spec)):
            raise SpecError("this model has no residual connections that could be taken away")

        def change(path: str, record: Record) -> Record:
            return Chain(tuple(step for _, step in _steps(record))) if isinstance(record, Residual) else record

        return rewrite(spec, change)

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        found: dict[str, str | None] = {}
        now: dict[str, str] = {}
        for path, record in walk(old):
            known = path
            while known and known not in now:
                known = known.rpartition(".")[0]
            own = now[path] = now[known] + path[len(known) :] if known else path
            if isinstance(record, Residual):
                found[own] = None
                for i, (slot, _) in enumerate(_steps(record)):
                    now[f"{path}.{slot}"] = f"{own}.steps.{i}"
                    found[f"{own}.steps.{i}"] = f"{path}.{slot}"
        return found


def _steps(record: Residual) -> Iterator[tuple[str, Spec]]:
    """Yield the filled slots of a residual connection in the order in which a row goes through them."""
    for slot in SLOTS:
        step = getattr(record, slot)
        if step is not None:
            yield slot, step
