"""A family's matrices as the reference library's modules have them, and ours: which are which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from polyformer.families import Family
from polyformer.parts import Affine
from polyformer.spec import walk
from polyformer.weights.fused import SplitHeads
from polyformer.weights.names import Operation, Split, Transpose


@dataclass(frozen=True)
class Matrix:
    """One matrix of the reference's, and what it is made of here.

    Attributes:
        name: of its module in memory; `file` is what a checkpoint's file calls it.
        paths: ours, several where it is a fused one.
        operations: what is done to its rows, from the reference's order to ours.
        turned: it is held as [inputs, outputs].
    """

    name: str
    file: str
    paths: tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    turned: bool = False

    def apart(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return each of our parts' rows of something that has a row for each of the matrix's outputs."""
        tensors: tuple[Tensor, ...] = (whole,)
        for operation in self.operations:
            tensors = operation.to_ours(tensors)
        return tensors

    def together(self, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse."""
        found = tuple(tensors)
        for operation in reversed(self.operations):
            found = operation.to_disk(found)
        (whole,) = found
        return whole


class Matrices:
    """A family's matrices, by the reference's names and by ours."""

    def __init__(self, family: Family) -> None:
        spec = family.spec()
        affine = [path for path, record in walk(spec) if isinstance(record, Affine)]
        weights = {f"{path}.weight": path for path in affine}
        rows = family.names().sources(spec.build("meta").state_dict())
        self.by_path: dict[str, Matrix] = {}
        self.by_name: dict[str, Matrix] = {}
        for disk, (row, inputs) in rows.items():
            operations = [one for one in row.operations if not isinstance(one, Transpose)]
            known = all(isinstance(one, Split | SplitHeads) and getattr(one, "dim", 0) == 0 for one in operations)
            name = family.module(disk.removesuffix(".weight"))
            if not disk.endswith(".weight") or not known or name is None or any(one not in weights for one in inputs):
                continue
            turned = len(operations) < len(row.operations)
            paths = tuple(weights[one] for one in inputs)
            found = Matrix(name, disk.removesuffix(".weight"), paths, tuple(operations), turned)
            self.by_path |= dict.fromkeys(paths, found)
            self.by_name |= {found.file: found, name: found}

    def endings(self, chosen: Iterable[str]) -> list[str]:
        """Return the shortest ends of names that mean these modules and no others; else the whole names."""
        wanted = set(chosen)
        names = {one.name for one in self.by_path.values()}
        found = []
        for ending in sorted({name.rpartition(".")[2] for name in wanted}):
            meant = {name for name in names if name == ending or name.endswith(f".{ending}")}
            found += [ending] if meant <= wanted else sorted(meant & wanted)
        return found
