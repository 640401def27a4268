"""A model's tensors carried over into a model of another spec, with a report of each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.parts import (
    Affine,
    Attention,
    CrossAttention,
    Heads,
    Learned,
    Linear,
    Lookup,
    Norm,
    Position,
    RMSNorm,
    TokenEmbedding,
    Transformer,
)
from polyformer.parts.model import TransformerPart
from polyformer.parts.positions import Sinusoidal, Table
from polyformer.spec import Record, Spec, walk
from polyformer.swap.origins import Joins, Moves, origins, owner
from polyformer.swap.report import Entry, Fate, Report
from polyformer.swap.swap import Swap
from polyformer.weights.assemble import assemble

RESIZABLE = (Linear, Lookup, Norm, Position, TokenEmbedding)
"""Parts whose tensors mean the same row by row, so that some can be cut off or added at the end."""


def transplant(
    model: TransformerPart, to: Transformer | Swap, moves: Moves | None = None
) -> tuple[TransformerPart, Report]:
    """Build the model of another spec and carry the tensors of `model` over, as far as they have a place there.

    A tensor keeps its values if the part that it belongs to does: under the same path, or where `moves` or the swap
    says that the part came from. A matrix that is held in another form (`Affine`) is put into that. Where sizes differ,
    key/value heads are averaged over the new groups (Ainslie et al. 2023, section 2.1), or repeated for more groups,
    which changes no answer; tables, matrices and vectors are cut or filled up with initial values at their ends. What
    has no origin is initialised. The new model has tensors of its own, in the precision and place of the old ones;
    `model` is not touched.

    Args:
        to: the new spec, or the change that makes it.
        moves: paths of parts in the new spec to where they stood in the old one, or to None; see `origins`.
    Returns:
        The new model, in the old one's mode, and what became of each tensor.
    Raises:
        SpecError: a change that can't be made of this model, a spec that can't be built, an unknown path in `moves`.
    """
    old = model.spec
    assert isinstance(old, Transformer)
    new = to.apply(old) if isinstance(to, Swap) else to
    known = dict(to.moves(old, new)) if isinstance(to, Swap) else {}
    joins = to.joins(old, new) if isinstance(to, Swap) else {}
    carrier = _Carrier(model, new, origins(old, new, {**known, **(moves or {})}), joins)
    tensors, entries = {}, []
    try:
        shapes = new.build("meta")
    except (RuntimeError, TypeError) as error:  # what PyTorch raises for sizes beyond what a tensor can have
        raise SpecError(f"the new model can't be built: {str(error).splitlines()[0]}") from error
    for names, like in _distinct(shapes):
        tensors[names[0]], entry = carrier.carry(names, like)
        entries.append(entry)
    made = assemble(new, tensors)
    assert isinstance(made, TransformerPart)
    return made.train(model.training), Report(tuple(entries), carrier.left_out())


def _distinct(model: nn.Module) -> Iterable[tuple[tuple[str, ...], Tensor]]:
    """Return each parameter and saved buffer once, with all names that it has."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return [(tuple(names), tensor) for names, tensor in found.values()]


class _Made(NamedTuple):
    """A tensor for the new model, its fate, and what was done; None if it could not be made of an old one."""

    tensor: Tensor | None
    fate: Fate
    note: str = ""


class _Shared(NamedTuple):
    """The part of an attention that a tensor belongs to (q, k, v or o), and the heads now and before."""

    role: str
    heads: Heads
    were: Heads


class _Carrier:
    """Makes the tensors of a new model, one at a time, and keeps account of those of the old."""

    def __init__(self, model: TransformerPart, new: Transformer, came: Moves, joins: Joins) -> None:
        self.old = _distinct(model)
        self.tensors = {name: tensor.detach() for names, tensor in self.old for name in names}
        self.names = {name: names for names, _ in self.old for name in names}
        self.used: set[str] = set()
        self.were: dict[str, Record] = dict(walk(model.spec))
        self.records: dict[str, Record] = dict(walk(new))
        self.came, self.joins = came, joins
        self.formed: tuple[str, dict[str, Tensor]] = ("", {})  # the last matrix put into another form, by its part
        floating = [tensor for tensor in self.tensors.values() if tensor.is_floating_point()]
        self.kind: dict[str, Any] = {"device": floating[0].device, "dtype": floating[0].dtype} if floating else {}

    def carry(self, names: tuple[str, ...], like: Tensor) -> tuple[Tensor, Entry]:
        """Make the tensor of these names, which has the shape of `like`; say how."""
        if owner(names[0], self.records) in self.joins:
            return self._joined(names, like)
        formed = self._formed(names, like)
        if formed is not None:
            return formed
        sources = ((name, self._source(name)) for name in names)
        name, source = next(((name, source) for name, source in sources if source is not None), (names[0], None))
        if source is not None:  # of the names of a tied tensor, one that it had before and has now
            source = next((other for other in self.names[source] if other in names), source)
        made = self._written_out(name) if source is None else self._fitted(name, source, like)
        if made.tensor is None:
            return self._initial(name), Entry(names, "new", tuple(like.shape), None, made.note)
        if source is not None:
            self.used.add(source)
        fate = "mapped" if made.fate == "kept" and source not in names else made.fate
        return made.tensor.clone(), Entry(names, fate, tuple(like.shape), source, made.note)

    def _joined(self, names: tuple[str, ...], like: Tensor) -> tuple[Tensor, Entry]:
        """Put the rows of several tensors behind each other."""
        path = owner(names[0], self.records)
        sources = [f"{source}{names[0][len(path) :]}" for source in self.joins[path]]
        if not self.tensors.keys() >= set(sources):
            raise SpecError(f"{path}: matrices can't be fused and get another form at once; fuse them first")
        whole = torch.cat([self.tensors[source] for source in sources])
        self.used.update(sources)
        return whole, Entry(names, "joined", tuple(like.shape), sources[0], f"and behind it {', '.join(sources[1:])}")

    def left_out(self) -> tuple[Entry, ...]:
        """Return the tensors of the old model that were used for nothing."""
        return tuple(
            Entry(names, "left out", tuple(tensor.shape))
            for names, tensor in self.old
            if not self.used.intersection(names)
        )

    def _source(self, name: str) -> str | None:
        """Return the name of the old tensor that stood where this one stands."""
        path = owner(name, self.records)
        origin = self.came[path]
        source = None if origin is None else f"{origin}{name[len(path) :]}"
        return source if source in self.tensors else None

    def _formed(self, names: tuple[str, ...], like: Tensor) -> tuple[Tensor, Entry] | None:
        """Make what a matrix is held in of the form in which it was held before, if it was in another."""
        path, _, leaf = names[0].rpartition(".")
        origin = self.came.get(path)
        record, was = self.records.get(path), self.were.get(origin or "")
        if leaf == "bias" or not isinstance(record, Affine) or not isinstance(was, Affine) or record.holds_as(was):
            return None
        shapes = [[one.outputs, one.inputs] for one in (was, record)]
        if shapes[0] != shapes[1]:
            raise SpecError(f"{path}: a matrix can't get another size, {shapes[0]} to {shapes[1]}, and form at once")
        held = {name: one for name, one in self.tensors.items() if name.rpartition(".")[0] == origin}
        held.pop(f"{origin}.bias", None)
        if self.formed[0] != path:
            self.used.update(held)
            matrix = was.matrix({name.rpartition(".")[2]: one for name, one in held.items()})
            self.formed = path, record.held(matrix)
        tensor, source = self.formed[1][leaf], next(iter(held))
        tensor = tensor.to(self.kind["dtype"]) if tensor.is_floating_point() else tensor
        note = f"{type(was).__name__} to {type(record).__name__}"
        return tensor.clone(), Entry(names, "mapped", tuple(like.shape), source, note)

    def _fitted(self, name: str, source: str, like: Tensor) -> _Made:
        """Make the tensor of the old one that stood in its place."""
        tensor, notes = self.tensors[source], list[str]()
        fate: Fate = "kept"
        record, was = self.records[owner(name, self.records)], self.were[owner(source, self.were)]
        shared = self._shared(name)
        if tensor.ndim != like.ndim or tensor.is_floating_point() != like.is_floating_point():
            return _Made(None, "new", f"{source} is of another kind")
        if shared is not None and shared.heads.width != shared.were.width:
            return _Made(None, "new", f"heads {shared.heads.width} wide can't be made of some {shared.were.width} wide")
        if name.endswith(".weight") and _offset(was) != _offset(record):
            shift = _offset(was) - _offset(record)
            tensor, fate = tensor + shift, "mapped"
            notes.append(f"{shift:+g}: the gain is held as a difference from {_offset(record):g}")
        if _first(was) != _first(record):
            tensor, fate = self._aligned(name, tensor, _first(was) - _first(record)), "mapped"
            notes.append(f"the first position is row {_first(record)}, was {_first(was)}")
        if tensor.shape == like.shape:
            made = _Made(tensor, fate)
        elif shared is not None and _regroups(shared, tensor, like):
            made = _regrouped(tensor, shared)
        elif isinstance(record, RESIZABLE):
            made = self._resized(name, tensor, like)
        else:
            return _Made(None, "new", f"{source} has shape {list(tensor.shape)}")
        return made._replace(note="; ".join((*notes, *([made.note] if made.note else []))))

    def _shared(self, name: str) -> _Shared | None:
        """Say which attention's projection a tensor belongs to, if to any that was one before."""
        path = owner(name, self.records)
        while path:
            above, _, role = path.rpartition(".")
            record = self.records.get(above)
            if isinstance(record, Attention | CrossAttention):
                was = self.were.get(self.came[above] or "")
                if not isinstance(was, Attention | CrossAttention) or role not in ("q", "k", "v", "o"):
                    return None
                return _Shared(role, record.heads, was.heads)
            path = above
        return None

    def _written_out(self, name: str) -> _Made:
        """Make a table of positions of the sinusoids that stood in its place; nothing otherwise."""
        path = owner(name, self.records)
        record, was = self.records[path], self.were.get(self.came[path] or "")
        if not isinstance(record, Learned) or type(was) is not Sinusoidal:
            return _Made(None, "new")
        table = Table(record.width, record.length, was.offset, was.layout, was.base, was.spacing).build()
        places = table.state_dict()["weight"].to(**self.kind)
        return _Made(self._aligned(name, places, -record.offset), "mapped", "the sinusoids, written out")

    def _aligned(self, name: str, table: Tensor, start: int) -> Tensor:
        """Drop the first `start` rows of a table, or put as many before it if that is negative."""
        return table[start:] if start >= 0 else torch.cat((self._initial(name)[:-start], table))

    def _resized(self, name: str, tensor: Tensor, like: Tensor) -> _Made:
        """Cut off what is too much at the end of each dimension, and fill up what lacks with initial values."""
        corner = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, like.shape, strict=True))
        kept = tensor[corner]
        note = f"{list(tensor.shape)} to {list(like.shape)}"
        if kept.shape == like.shape:
            return _Made(kept, "cut", note)
        made = self._initial(name).clone()
        made[corner] = kept
        return _Made(made, "padded" if kept.shape == tensor.shape else "cut", note)

    def _initial(self, name: str) -> Tensor:
        """Return the values that a fresh model would begin with."""
        path = owner(name, self.records)
        record = self.records[path]
        assert isinstance(record, Spec)
        tensor: Tensor = record.build().state_dict()[name[len(path) :].lstrip(".")]
        return tensor.to(**self.kind) if tensor.is_floating_point() else tensor


def _offset(record: Record) -> float:
    """What is added to a norm's gain."""
    return record.offset if isinstance(record, RMSNorm) else 0.0


def _first(record: Record) -> int:
    """The row of the first position in a table of positions."""
    return record.offset if isinstance(record, Learned) else 0


def _regroups(shared: _Shared, tensor: Tensor, like: Tensor) -> bool:
    """Tell whether a tensor holds key/value heads one after the other, and is needed with another number of them."""
    width = shared.heads.width
    before, now = tensor.shape[0] == shared.were.groups * width, like.shape[0] == shared.heads.groups * width
    return shared.role in ("k", "v") and before and now and tensor.shape[1:] == like.shape[1:]


def _regrouped(tensor: Tensor, shared: _Shared) -> _Made:
    """Average the heads that are to be one; repeat those that are to be several."""
    before, now = shared.were.groups, shared.heads.groups
    least = math.lcm(before, now)
    heads = tensor.reshape(before, -1, *tensor.shape[1:]).repeat_interleave(least // before, 0)
    note = f"{before} heads to {now}"
    if least == now:
        return _Made(heads.flatten(0, 1), "mapped", f"{note}, each repeated")
    exact = heads.to(torch.promote_types(tensor.dtype, torch.float32))
    mean = exact.view(now, least // now, *heads.shape[1:]).mean(1)
    return _Made(mean.flatten(0, 1).to(tensor.dtype), "averaged", note)
