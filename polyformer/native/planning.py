"""Makes plans: a spec is lowered, and each weight found among the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from polyformer.native.given import LinesOf
from polyformer.native.lowering import lower
from polyformer.native.plan import Origin, Plan, Store, Witness, digest
from polyformer.parts.model import Transformer
from polyformer.spec import Spec
from polyformer.weights.names import Names


def plan_of(spec: Spec, store: Store, tensors: Mapping[str, Tensor], tables: Sequence[Names] = ()) -> Plan | None:
    """Return the plan of a decoder, or None where a plan can't say it all: its program must hold every tensor, and
    every weight be made of whole rows, or columns, of one tensor.

    Args:
        tensors: those of the store, each read when it is asked for.
        tables: how they become ours; none where they are.
    Raises:
        LoweringError: the model has a part that no program can be made of.
        WeightsError: a tensor that belongs to no part of the model, or is missing.
    """
    if isinstance(spec, Transformer) and spec.encoder is not None:
        return None
    program = lower(spec)
    if any(one.made is not None for one in program.weights):
        return None
    lines = LinesOf(store, tensors, tables)
    if lines.ours != {one.path for one in program.weights}:
        return None
    origins: list[Origin] = []
    orders: dict[tuple[int, ...], int] = {}
    for one in program.weights:
        found = lines.of(one.path, one.shape)
        if found is None:
            return None
        number = None if found.order is None else orders.setdefault(tuple(found.order.tolist()), len(orders))
        origins.append(Origin(found.tensor, number, found.by))
    witnesses = tuple(Witness(name, digest(store.stored[name])) for name in lines.others)
    return Plan(program, tuple(origins), tuple(orders), witnesses)
