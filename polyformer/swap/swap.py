"""What all ready changes of a model are."""

from __future__ import annotations

from polyformer.parts import Transformer
from polyformer.spec import Record, walk
from polyformer.swap.origins import Joins, Moves, carried_ties, origins


class Swap(Record, abstract=True):
    """A change of a model's spec, as data: a recipe can name it, and a report can say what was done."""

    def apply(self, spec: Transformer) -> Transformer:
        """Return the changed spec; what is so already stays.

        Raises:
            SpecError: the change can't be made of this model.
        """
        new = self.rewritten(spec)
        return new.replace(ties=carried_ties(spec, new, origins(spec, new, self.moves(spec, new))))

    def rewritten(self, spec: Transformer) -> Transformer:
        """Return the changed spec, whose ties may still name what is gone."""
        raise NotImplementedError

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        """Say which parts of `new`, that `old` became, came from another place; see `origins`."""
        return {}

    def joins(self, old: Transformer, new: Transformer) -> Joins:
        """Say which parts of `new` are several of `old`, row by row behind each other."""
        return {}


class Swaps(Swap):
    """Several changes, one after the other."""

    steps: tuple[Swap, ...]

    def apply(self, spec: Transformer) -> Transformer:
        for step in self.steps:
            spec = step.apply(spec)
        return spec

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        came: dict[str, str | None] = {path: path for path, _ in walk(old)}
        for step in self.steps:
            changed = step.apply(old)
            last = origins(old, changed, step.moves(old, changed))
            came = {path: None if origin is None else came[origin] for path, origin in last.items()}
            old = changed
        return came

    def joins(self, old: Transformer, new: Transformer) -> Joins:
        first, found = old, dict[str, tuple[str, ...]]()
        for i, step in enumerate(self.steps):
            changed = step.apply(old)
            came = origins(old, changed, step.moves(old, changed))
            found = {path: found[origin] for path, origin in came.items() if origin in found}
            before = Swaps(self.steps[:i]).moves(first, old)
            for path, sources in step.joins(old, changed).items():
                known = [before[source] for source in sources]
                if None not in known:
                    found[path] = tuple(source for source in known if source is not None)
            old = changed
        return found
