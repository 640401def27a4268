"""Changes of a model: chosen matrices into four bits, and back."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from polyformer.errors import SpecError
from polyformer.parts import Linear, Transformer
from polyformer.shrink.codes import Form
from polyformer.shrink.linear4 import Compute, Linear4
from polyformer.spec import Record, rewrite, walk
from polyformer.swap.swap import Swap

STACKS = ("encoder.*", "decoder.*", "bridge.*")
"""Where matrices are quantised unless it is said otherwise: not in embeddings, heads and poolers."""


class Quantise(Swap):
    """Matrices held in four bits an element, as QLoRA holds those that it doesn't train (`Linear4`).

    Args:
        form, block, scales, compute: see `Linear4`.
        targets: which, by patterns of their paths (`*` and `?` as in a shell): those in the stacks if none is given. A
            pattern without a dot is a last name, so that "q" is every part `q`.
        spared: which of them stay as they are.
    """

    form: Form = "nf4"
    block: int = 64
    scales: Literal["nested", "float32"] = "nested"
    compute: Compute | None = None
    targets: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()

    def check(self) -> None:
        Linear4(1, 1, form=self.form, block=self.block, scales=self.scales, compute=self.compute)

    def rewritten(self, spec: Transformer) -> Transformer:
        linears = [path for path, record in walk(spec) if type(record) is Linear]
        for pattern in (*self.targets, *self.spared):
            if not any(_fits(pattern, path) for path in linears):
                known = ", ".join(sorted({path.rpartition(".")[2] for path in linears}))
                raise SpecError(f"'{pattern}' fits no matrix of this model; the last names of its matrices are {known}")
        wanted = {path for path in linears if any(_fits(one, path) for one in self.targets or STACKS)}
        wanted -= {path for path in wanted if any(_fits(one, path) for one in self.spared)}
        if not wanted:
            raise SpecError("this model has no matrix that could be quantised")

        def change(path: str, record: Record) -> Record:
            if path not in wanted or not isinstance(record, Linear):
                return record
            sizes = record.inputs, record.outputs, record.bias
            return Linear4(*sizes, self.form, self.block, self.scales, self.compute)

        return rewrite(spec, change)


class Dequantise(Swap):
    """Every matrix in four bits as an ordinary one of the same values."""

    def rewritten(self, spec: Transformer) -> Transformer:
        def change(path: str, record: Record) -> Record:
            return Linear(record.inputs, record.outputs, record.bias) if isinstance(record, Linear4) else record

        return rewrite(spec, change)


def _fits(pattern: str, path: str) -> bool:
    return fnmatchcase(path if "." in pattern else path.rpartition(".")[2], pattern)
