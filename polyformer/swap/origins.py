"""Which record of an old model each record of a new one came from.

A tensor is named by the path of its record, so whoever knows where records came from knows where tensors did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher

from polyformer.errors import SpecError, suggest
from polyformer.parts import Affine, Embed, Norm, Position, Tie, Transformer
from polyformer.spec import Record, Spec, children, field_types, walk

Moves = Mapping[str, str | None]
"""Paths of records in a new model to where they stood in the old one; None for one that came from nowhere."""

Joins = Mapping[str, tuple[str, ...]]
"""Paths of parts in a new model whose tensors are those of several parts of the old one, one behind the other."""

INTERCHANGEABLE = (Affine, Norm, Position, Embed)
"""Kinds whose tensors mean the same in every record of the kind: a norm's gain, a table of positions, an embedding; or
that say what matrix their tensors are."""


def origins(old: Transformer, new: Transformer, moves: Moves | None = None) -> dict[str, str | None]:
    """Return for every record of `new` the path of the record of `old` that it continues, or None.

    A record continues the one that stood in its field, if they are of one kind; in tuples the elements are aligned
    as a text comparison aligns lines. A part that was wrapped into another, or unwrapped, is found within it.

    Args:
        moves: where what moved came from; what stands below follows.
    Raises:
        SpecError: `moves` names a path that is in neither model.
    """
    moves, were, found = moves or {}, dict(walk(old)), dict[str, str | None]()
    _refuse_unknown(moves, dict(walk(new)), were)

    def trace(path: str, record: Record, origin: str | None) -> None:
        origin = moves.get(path, origin)
        was = None if origin is None else were.get(origin)
        if was is not None and not alike(record, was):
            wrapped = _only_child_like(record, was)
            if wrapped is not None:
                found[path] = None
                for name, child in children(record):
                    trace(_below(path, name), child, origin if name == wrapped else None)
                return
            unwrapped = _only_child_like(was, record)
            origin = None if unwrapped is None else _below(str(origin), unwrapped)
            was = None if origin is None else were[origin]
        found[path] = origin if was is not None else None
        matched = {} if was is None else dict(_matched(record, was))
        for name, child in children(record):
            trace(_below(path, name), child, _below(str(origin), matched[name]) if name in matched else None)

    trace("", new, "")
    return found


def alike(one: Record, other: Record) -> bool:
    """Tell whether the tensors of two records mean the same."""
    if type(one) is type(other):
        return True
    return any(isinstance(one, kind) and isinstance(other, kind) for kind in INTERCHANGEABLE)


def owner(name: str, records: Mapping[str, Record]) -> str:
    """Return the path of the record that a tensor belongs to: the longest that its name begins with."""
    path = name.rpartition(".")[0]
    while path not in records:
        path = path.rpartition(".")[0]
    return path


def carried_ties(old: Transformer, new: Transformer, came: Moves) -> tuple[Tie, ...]:
    """Return the ties of `old` as they are in `new`: under new names, and without what is no longer there.

    Where the parameter is gone that others were tied to, the first that is left takes its place.
    """
    records = dict(walk(old))
    went: dict[str, list[str]] = {}
    for path, record in walk(new):
        origin = came[path]
        if origin is not None and type(records[origin]) is type(record):
            went.setdefault(origin, []).append(path)
    found, same = [], True
    for group in tied_groups(old.ties):
        members = []
        for name in group:
            place = owner(name, records)
            names = [path + name[len(place) :] for path in went.get(place, [])]
            same &= names == [name]
            members += names
        found.append(members)
    return old.ties if same else ties_of(found)


def tied_groups(ties: Sequence[Tie]) -> list[list[str]]:
    """Return the sets of parameters that are one; each begins with the one that the others are tied to."""
    groups: list[list[str]] = []
    for tie in ties:
        touched = [group for group in groups if tie.to in group or tie.tied in group]
        names = [name for group in touched for name in group]
        groups = [group for group in groups if group not in touched]
        groups.append(list(dict.fromkeys((*names, tie.to, tie.tied) if names else (tie.to, tie.tied))))
    return groups


def ties_of(groups: Sequence[Sequence[str]]) -> tuple[Tie, ...]:
    """Return the ties that make each group's parameters one."""
    return tuple(Tie(tied, group[0]) for group in groups for tied in group[1:])


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _refuse_unknown(moves: Moves, new: Mapping[str, Record], old: Mapping[str, Record]) -> None:
    for path, origin in moves.items():
        if path not in new:
            raise SpecError(f"the new model has no part '{path}'{_near(path, new)}")
        if origin is not None and origin not in old:
            raise SpecError(f"the old model has no part '{origin}'{_near(origin, old)}")


def _near(path: str, known: Mapping[str, Record]) -> str:
    said = suggest(path, known)
    return said if "did you" in said else ""


def _only_child_like(outer: Record, inner: Record) -> str | None:
    """Name the only child of `outer` that equals `inner`, or else the only one that is like it."""
    equal = [name for name, child in children(outer) if child == inner]
    like = [name for name, child in children(outer) if alike(child, inner)]
    return next((names[0] for names in (equal, like) if len(names) == 1), None)


def _matched(new: Record, old: Record) -> Iterator[tuple[str, str]]:
    """Yield which child of `new` stands where which child of `old` stood."""
    for name in field_types(type(new)):
        value, was = getattr(new, name), getattr(old, name, None)
        if isinstance(value, Record) and isinstance(was, Record):
            yield name, name
        elif isinstance(value, tuple) and isinstance(was, tuple):
            lines = SequenceMatcher(None, [*map(_kind, was)], [*map(_kind, value)], autojunk=False)
            for _, i, i_end, j, j_end in lines.get_opcodes():
                if i_end - i == j_end - j:
                    yield from ((f"{name}.{j + k}", f"{name}.{i + k}") for k in range(i_end - i))


def _kind(item: object) -> tuple[str, ...]:
    """Say in short what an element of a tuple is: its type, and that of the first part in it."""
    if not isinstance(item, Record):
        return (repr(item),)
    inner = [child for _, child in children(item) if isinstance(child, Spec)]
    return tuple(
        next((kind.__name__ for kind in INTERCHANGEABLE if isinstance(one, kind)), type(one).__name__)
        for one in (item, *inner[:1])
    )
