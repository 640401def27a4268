"""Adapters as changes of a spec: which stand where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from polyformer.errors import SpecError, suggest
from polyformer.parts import (
    IA3,
    Adapted,
    Adapter,
    AfterPrefix,
    DoRA,
    Dropout,
    Embed,
    LoRA,
    Prefix,
    Tie,
    Transformer,
    Whole,
)
from polyformer.spec import Record, Spec, rewrite, walk
from polyformer.swap.origins import Moves, tied_groups, ties_of
from polyformer.swap.swap import Swap
from polyformer.tune.targets import ALL_LINEAR, bases, matching, nearest, standing, targets


class Placed(Record):
    """An adapter and the path of the part that it stands beside, as it is in the model without adapters."""

    path: str
    adapter: Adapter


class Shared(Record):
    """A tensor that the adapters beside several parts have in common, as those of one fused matrix do."""

    paths: tuple[str, ...]
    tensor: str


class AddAdapters(Swap):
    """Adapters beside parts, each with its own numbers; the general form of all other changes here."""

    placed: tuple[Placed, ...]
    shared: tuple[Shared, ...] = ()

    def apply(self, spec: Transformer) -> Transformer:
        new = super().apply(spec)
        copies = tuple(
            f"{place_of(new, one.path, one.adapter.name)}." for one in self.placed if isinstance(one.adapter, Whole)
        )
        ties = new.ties
        if copies:  # which are tied to nothing
            ties = ties_of([[name for name in group if not name.startswith(copies)] for group in tied_groups(ties)])
        return new.replace(ties=(*ties, *(tie for one in self.shared for tie in self._ties(new, one))))

    def rewritten(self, spec: Transformer) -> Transformer:
        places = standing(spec)
        missing = next((one.path for one in self.placed if one.path not in places), None)
        if missing is not None:
            raise SpecError(f"the adapter stands beside '{missing}', which this model lacks{nearest(missing, places)}")
        wanted, shifts = {places[one.path]: one.adapter for one in self.placed}, self._shifts()

        def change(path: str, record: Record) -> Record:
            if isinstance(record, Embed) and path in shifts and record.positions is not None:
                record = record.replace(positions=AfterPrefix(record.positions, *shifts[path]))
            if path not in wanted:
                return record
            assert isinstance(record, Spec)
            try:
                if isinstance(record, Adapted):
                    return record.replace(adapters=(*record.adapters, wanted[path]))
                return Adapted(record, (wanted[path],))
            except SpecError as error:
                raise SpecError(f"{path}: {error}") from None

        return rewrite(spec, change)

    def _shifts(self) -> dict[str, tuple[str, float, int]]:
        """Return which side's positions stand behind a prefix: by its path, the prefix's name, share and length."""
        sides = {"encoder": "source", "decoder": "target"}
        prefixes = [(one.path, one.adapter) for one in self.placed if isinstance(one.adapter, Prefix)]
        return {sides[path.partition(".")[0]]: (one.name, one.share, one.tokens) for path, one in prefixes}

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        were, now = dict(walk(old)), dict(walk(new))
        before, after = standing(old), standing(new)
        found: dict[str, str | None] = {}
        for side in self._shifts():
            if f"{side}.positions" in were:
                found[f"{side}.positions.base"] = f"{side}.positions"
        for one in self.placed:
            place, was = after[one.path], before[one.path]
            base = f"{was}.base" if isinstance(were[was], Adapted) else was
            found[f"{place}.base"] = base
            if isinstance(one.adapter, Whole):
                record = now[place]
                assert isinstance(record, Adapted)
                found[f"{place}.adapters.{record.adapters.index(one.adapter)}.part"] = base
        return found

    def _ties(self, new: Transformer, shared: Shared) -> list[Tie]:
        names = {one.path: one.adapter for one in self.placed}
        first, *others = (place_of(new, path, names[path].name) + f".{shared.tensor}" for path in shared.paths)
        return [Tie(other, first) for other in others]


def place_of(spec: Transformer, path: str, name: str) -> str:
    """Return the path of the adapter of a name beside a part, given the part's in the model without adapters."""
    place = standing(spec)[path]
    record = next(record for where, record in walk(spec) if where == place)
    assert isinstance(record, Adapted)
    return f"{place}.adapters.{[one.name for one in record.adapters].index(name)}"


class RemoveAdapters(Swap):
    """A model without the adapters of some names."""

    names: tuple[str, ...]

    def rewritten(self, spec: Transformer) -> Transformer:
        refuse_unknown(self.names, spec)

        def change(path: str, record: Record) -> Record:
            if isinstance(record, AfterPrefix) and record.name in self.names:
                return record.base
            if not isinstance(record, Adapted):
                return record
            kept = tuple(one for one in record.adapters if one.name not in self.names)
            return record.replace(adapters=kept) if kept else record.base

        return rewrite(spec, change)

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        were, now, found = dict(walk(old)), dict(walk(new)), dict[str, str | None]()
        after = standing(new)
        for plain, path in standing(old).items():
            record, place = were[path], after[plain]
            if isinstance(record, AfterPrefix) and record.name in self.names:
                found[place] = f"{path}.base"
            if not isinstance(record, Adapted):
                continue
            left = now[place]
            kept = left.adapters if isinstance(left, Adapted) else ()
            found[f"{place}.base" if kept else place] = f"{path}.base"
            for i, one in enumerate(kept):
                found[f"{place}.adapters.{i}"] = f"{path}.adapters.{record.adapters.index(one)}"
        return found


class ShareOf(Record):
    """An adapter's name, and how much of it acts."""

    name: str
    share: float


class SetShares(Swap):
    """Which adapters act where nobody says otherwise; those that aren't named don't."""

    shares: tuple[ShareOf, ...]

    @classmethod
    def of(cls, mix: Mapping[str, float]) -> SetShares:
        """Return the change that makes a mix a model's own."""
        return cls(tuple(ShareOf(name, share) for name, share in mix.items()))

    def rewritten(self, spec: Transformer) -> Transformer:
        shares = {one.name: one.share for one in self.shares}
        refuse_unknown(list(shares), spec)

        def change(path: str, record: Record) -> Record:
            if isinstance(record, Adapter | AfterPrefix):
                return record.replace(share=shares.get(record.name, 0.0))
            return record

        return rewrite(spec, change)


class RankFor(Record):
    """Another rank, and perhaps another alpha, for the parts that a pattern means."""

    pattern: str
    rank: int
    alpha: float | None = None


class LoraChange(Swap):
    """LoRA beside the matrices that `targets` mean (Hu et al. 2022).

    Attributes:
        name: what the adapter is called.
        targets: patterns of paths, as `matching` reads them, or "all linear".
        rank, alpha: of each; `ranks` says otherwise for some, the first pattern that matches.
        scaling: "root" is rsLoRA's.
        dropout: of what A sees.
        whole: patterns of matrices that are trained whole beside it: a head that is new, say.
    """

    kind: ClassVar[type[LoRA]] = LoRA

    name: str = "default"
    targets: tuple[str, ...] = (ALL_LINEAR,)
    rank: int = 8
    alpha: float = 16.0
    scaling: Literal["rank", "root"] = "rank"
    dropout: float = 0.0
    ranks: tuple[RankFor, ...] = ()
    whole: tuple[str, ...] = ()

    def check(self) -> None:
        self.require(self.rank > 0, f"a rank of {self.rank} changes nothing; it must be at least 1")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    def placed(self, spec: Transformer) -> AddAdapters:
        """Return what it comes to for a model; raises `SpecError` for patterns that match nothing."""
        known, paths = bases(spec), targets(spec, self.targets)
        ranks = {path: one for one in reversed(self.ranks) for path in self._meant(one.pattern, paths)}
        found = []
        for path in paths:
            base, own = known[path], ranks.get(path, RankFor("", self.rank))
            alpha = self.alpha if own.alpha is None else own.alpha
            dropout = Dropout(self.dropout) if self.dropout else None
            least = min(base.inputs, base.outputs)
            if own.rank > least:
                whole = f"its matrix [{base.outputs}, {base.inputs}] has rank {least} at most"
                raise SpecError(f"{path}: a rank of {own.rank} is too much: {whole}")
            adapter = self.kind(self.name, 1.0, base.inputs, base.outputs, own.rank, alpha, self.scaling, dropout)
            found.append(Placed(path, adapter))
        return AddAdapters((*found, *_whole(spec, self.name, self.whole, paths)))

    def _meant(self, pattern: str, paths: Sequence[str]) -> list[str]:
        found = matching(pattern, paths)
        if not found:
            raise SpecError(f"'{pattern}', which is given a rank of its own, is no target{nearest(pattern, paths)}")
        return found

    def apply(self, spec: Transformer) -> Transformer:
        return self.placed(spec).apply(spec)

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        return self.placed(old).moves(old, new)


class DoraChange(LoraChange):
    """DoRA beside the matrices that `targets` mean (Liu et al. 2024); the fields are those of LoRA."""

    kind: ClassVar[type[LoRA]] = DoRA


class Ia3Change(Swap):
    """IA³: factors for outputs, as a rule of keys and values, and for inputs, as of a feed-forward network's last
    matrix (Liu et al. 2022, section 3.3).

    Attributes:
        name: what the adapter is called.
        outputs, inputs: patterns of paths, as `matching` reads them.
        whole: patterns of matrices that are trained whole beside it.
    """

    name: str = "default"
    outputs: tuple[str, ...] = ("k", "v")
    inputs: tuple[str, ...] = ("down",)
    whole: tuple[str, ...] = ()

    def placed(self, spec: Transformer) -> AddAdapters:
        """Return what it comes to for a model; raises `SpecError` for patterns that match nothing."""
        known, found = bases(spec), dict[str, Placed]()
        sides: tuple[tuple[Literal["outputs", "inputs"], tuple[str, ...]], ...]
        sides = ("outputs", self.outputs), ("inputs", self.inputs)
        for side, patterns in sides:
            for path in targets(spec, patterns) if patterns else ():
                if path in found:
                    raise SpecError(f"{path} can have factors for its inputs or its outputs, not for both")
                width = getattr(known[path], side)
                found[path] = Placed(
                    path, IA3.from_data({"name": self.name, "share": 1.0, "width": width, "side": side})
                )
        if not found:
            raise SpecError("no targets are named, neither for inputs nor for outputs")
        return AddAdapters((*found.values(), *_whole(spec, self.name, self.whole, list(found))))

    def apply(self, spec: Transformer) -> Transformer:
        return self.placed(spec).apply(spec)

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        return self.placed(old).moves(old, new)


def _whole(spec: Transformer, name: str, patterns: Sequence[str], taken: Sequence[str]) -> list[Placed]:
    if not patterns:
        return []
    known, paths = bases(spec), targets(spec, patterns)
    twice = next((path for path in paths if path in taken), None)
    if twice is not None:
        raise SpecError(f"{twice} can't be trained whole and have an adapter besides")
    return [Placed(path, Whole(name, 1.0, known[path])) for path in paths]


def adapters_of(spec: Spec) -> list[str]:
    """Return the names of a model's adapters, in their order."""
    return list(dict.fromkeys(record.name for _, record in walk(spec) if isinstance(record, Adapter)))


def refuse_unknown(names: Sequence[str], spec: Spec) -> None:
    """Raise `SpecError` for a name that no adapter of the model has."""
    known = adapters_of(spec)
    for name in names:
        if name not in known:
            near = suggest(name, known) or " (it has none)"
            raise SpecError(f"the model has no adapter called '{name}'{near}")
