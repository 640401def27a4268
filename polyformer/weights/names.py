"""One table between our parameter names and names on disk serves loading and saving.

A row pairs names, with `{i}`, `{j}` for numbers and `{w}` for the last word (weight, bias, ...):

    Row("encoder.blocks.{i}.steps.0.op.q.{w}", "model.encoder.layers.{i}.self_attn.q_proj.{w}")

and, where the layouts differ, says what is done on the way from the disk; each operation carries its inverse:

    Row(("q.{w}", "k.{w}", "v.{w}"), "in_proj_{w}", Split(3))
    Row("up.weight", "c_fc.weight", Transpose())
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyformer.errors import WeightsError
from polyformer.weights.files import TensorMap, called

Tensors = tuple[Tensor, ...]
PLACEHOLDERS = {"i": "[0-9]+", "j": "[0-9]+", "w": "[A-Za-z_]+"}


class Operation:
    """Maps the tensors of a row from the disk's layout to ours, and back without loss."""

    def to_ours(self, tensors: Tensors) -> Tensors:
        """Disk to ours; raises `WeightsError` for shapes that it can't be meant for."""
        raise NotImplementedError

    def to_disk(self, tensors: Tensors) -> Tensors:
        """The inverse."""
        raise NotImplementedError


@dataclass(frozen=True)
class Split(Operation):
    """One tensor cut along `dim` into several, of the given sizes, or into so many equal ones."""

    sizes: int | tuple[int, ...]
    dim: int = 0

    def to_ours(self, tensors: Tensors) -> Tensors:
        (whole,) = tensors
        length = whole.shape[self.dim] if self.dim < whole.ndim else 0
        sizes = self.sizes if isinstance(self.sizes, tuple) else (length // self.sizes,) * self.sizes
        if sum(sizes) != length:
            raise WeightsError(f"a tensor of shape {list(whole.shape)} can't be cut into {self.sizes} along {self.dim}")
        return torch.split(whole, list(sizes), self.dim)

    def to_disk(self, tensors: Tensors) -> Tensors:
        return (torch.cat(tensors, self.dim),)


@dataclass(frozen=True)
class Permute(Operation):
    """Dimensions in another order: ours[k] is the disk's dims[k]."""

    dims: tuple[int, ...]

    def to_ours(self, tensors: Tensors) -> Tensors:
        return tuple(tensor.permute(self.dims) for tensor in tensors)

    def to_disk(self, tensors: Tensors) -> Tensors:
        inverse = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        return tuple(tensor.permute(inverse) for tensor in tensors)


@dataclass(frozen=True)
class Transpose(Operation):
    """The last two dimensions exchanged, as where a checkpoint holds [inputs, outputs]; a vector stays as it is."""

    def to_ours(self, tensors: Tensors) -> Tensors:
        return tuple(tensor.mT if tensor.ndim > 1 else tensor for tensor in tensors)

    to_disk = to_ours


@dataclass(frozen=True)
class Reshape(Operation):
    """The same numbers under another shape; -1 stands for what is left over."""

    disk: tuple[int, ...]
    ours: tuple[int, ...]

    def to_ours(self, tensors: Tensors) -> Tensors:
        return tuple(tensor.reshape(self.ours) for tensor in tensors)

    def to_disk(self, tensors: Tensors) -> Tensors:
        return tuple(tensor.reshape(self.disk) for tensor in tensors)


class Row:
    """Which of our tensors are which on disk.

    Several rows may give the same name of ours: the first is how it is saved, the others are further names under
    which it may be found, in addition or instead; tensors found twice must be equal.
    """

    def __init__(self, ours: str | Sequence[str], disk: str | Sequence[str], *operations: Operation) -> None:
        self.ours = (ours,) if isinstance(ours, str) else tuple(ours)
        self.disk = (disk,) if isinstance(disk, str) else tuple(disk)
        self.operations = operations

    def to_ours(self, tensors: Tensors) -> Tensors:
        """Apply the operations to the disk's tensors."""
        for operation in self.operations:
            tensors = operation.to_ours(tensors)
        return tensors

    def to_disk(self, tensors: Tensors) -> Tensors:
        """Undo them."""
        for operation in reversed(self.operations):
            tensors = operation.to_disk(tensors)
        return tensors


def rows_below(ours: str, disk: str, names: Mapping[str, str]) -> list[Row]:
    """Return rows for all tensors of modules below two prefixes: `names` pairs our module names with the disk's."""
    return [Row(f"{ours}.{mine}.{{w}}", f"{disk}.{theirs}.{{w}}") for mine, theirs in names.items()]


def below(prefix: str, rows: Iterable[Row]) -> list[Row]:
    """Return the rows with a prefix before their names on disk: a model inside of another."""
    return [Row(row.ours, [prefix + name for name in row.disk], *row.operations) for row in rows]


Check = Callable[[Tensor], bool]


class Names:
    """The table of a checkpoint's layout.

    Args:
        rows: all tensors that carry weights.
        computed: tensors that a file may hold although they follow from the configuration (position tables, masks),
            by their pattern on disk, each with a check that the file's tensor is what we compute. They are neither
            loaded nor saved.
        added: of these, the ones that are saved all the same, by their name on disk.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        computed: Mapping[str, Check] | None = None,
        added: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> None:
        self.rows, self.added = tuple(rows), added or {}
        self.computed = dict(computed or {})

    def checked(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the names of a checkpoint's tensors but for those that are computed.

        Raises:
            WeightsError: a computed tensor with other values than ours.
        """
        rest = []
        for name in tensors:
            check = next((check for pattern, check in self.computed.items() if _compile(pattern).fullmatch(name)), None)
            if check is None:
                rest.append(name)
            elif not check(tensors[name]):
                raise WeightsError(f"{called(tensors, name)} is not what is computed from the configuration")
        return rest

    def to_ours(self, tensors: Mapping[str, Tensor]) -> TensorMap:
        """Rename and convert a checkpoint's tensors, each when it is asked for.

        Raises:
            WeightsError: a tensor that no row knows, one that a row needs and the file lacks, a computed tensor with
                other values than ours; and later, when it is read, a shape that an operation can't take or two
                names of one tensor that differ.
        """
        plan = _plan(
            self.checked(tensors), [(row.disk, row.ours) for row in self.rows], functools.partial(called, tensors)
        )
        return _convert(tensors, plan, [row.to_ours for row in self.rows], self._called_on_disk)

    def to_disk(self, tensors: Mapping[str, Tensor]) -> TensorMap:
        """Rename and convert our tensors to a checkpoint's, each when it is asked for; the inverse of `to_ours`.

        Raises:
            WeightsError: a tensor that no row knows, or only a part of those that a row joins.
        """
        firsts = [(row.ours, row.disk) for row in self.rows]
        plan = _plan(tensors, firsts, functools.partial(called, tensors))
        made = _convert(tensors, plan, [row.to_disk for row in self.rows], repr)
        return TensorMap({name: functools.partial(made.__getitem__, name) for name in made} | dict(self.added))

    def sources(self, names: Iterable[str]) -> dict[str, tuple[Row, tuple[str, ...]]]:
        """Return for each tensor on disk the row that makes it, and which of our tensors that makes it of.

        Raises:
            WeightsError: as `to_disk` does.
        """
        plan = _plan(names, [(row.ours, row.disk) for row in self.rows], repr)
        return {name: (self.rows[uses[0].row], uses[0].inputs) for name, uses in plan.items()}

    def _called_on_disk(self, name: str) -> str:
        for row in self.rows:
            for mine in row.ours:
                match = _compile(mine).fullmatch(name)
                if match:
                    return " and ".join(repr(_fill(pattern, match.groupdict())) for pattern in row.disk)
        return repr(name)


@dataclass(frozen=True)
class _Use:
    """One row used for certain numbers: which tensors go in, and where in its result ours stands."""

    row: int
    inputs: tuple[str, ...]
    place: int


def _plan(
    names: Iterable[str], sides: Sequence[tuple[tuple[str, ...], tuple[str, ...]]], named: Callable[[str], str]
) -> dict[str, list[_Use]]:
    """Find for each resulting name the rows that give it; `sides` are the rows' patterns (from, to)."""
    present = set(names)
    patterns = [(row, _compile(one)) for row, (sources, _) in enumerate(sides) for one in sources]
    uses: dict[tuple[int, tuple[tuple[str, str], ...]], None] = {}
    for name in names:
        found = next(((row, match) for row, one in patterns if (match := one.fullmatch(name))), None)
        if found is None:
            raise WeightsError(f"{named(name)} belongs to no part of this model")
        row, match = found
        uses[row, tuple(sorted(match.groupdict().items()))] = None
    plan: dict[str, list[_Use]] = {}
    for row, chosen in sorted(uses, key=lambda use: use[0]):
        values = dict(chosen)
        inputs = tuple(_fill(pattern, values) for pattern in sides[row][0])
        missing = [name for name in inputs if name not in present]
        if missing:
            there = next(name for name in inputs if name in present)
            raise WeightsError(f"{named(missing[0])} is missing; it belongs together with {named(there)}")
        for place, pattern in enumerate(sides[row][1]):
            plan.setdefault(_fill(pattern, values), []).append(_Use(row, inputs, place))
    return plan


def _convert(
    tensors: Mapping[str, Tensor],
    plan: Mapping[str, Sequence[_Use]],
    steps: Sequence[Callable[[Tensors], Tensors]],
    named: Callable[[str], str],
) -> TensorMap:
    def read(name: str) -> Tensor:
        found: Tensor | None = None
        for use in plan[name]:
            try:
                one = steps[use.row](tuple(tensors[source] for source in use.inputs))[use.place]
            except (WeightsError, RuntimeError) as error:
                raise WeightsError(f"{called(tensors, use.inputs[0])}: {error}") from error
            if found is not None and not found.equal(one):
                sources = [called(tensors, use.inputs[0]) for use in plan[name]]
                raise WeightsError(f"{' and '.join(sources)} should be equal, but they differ")
            found = one if found is None else found
        assert found is not None
        return found

    return TensorMap({name: functools.partial(read, name) for name in plan}, named)


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        letter = match[1]
        if letter in seen:
            return f"(?P={letter})"
        seen.add(letter)
        return f"(?P<{letter}>{PLACEHOLDERS[letter]})"

    return re.compile(re.sub(r"\\\{([ijw])\\\}", group, re.escape(pattern)))


def _fill(pattern: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{([ijw])\}", lambda match: values[match[1]], pattern)
