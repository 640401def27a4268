"""Changes of a model: chosen matrices into four bits, and back."""

from __future__ import annotations

from typing import Literal

from polyformer.errors import SpecError
from polyformer.parts import Adapted, Linear, Transformer
from polyformer.shrink.codes import Form
from polyformer.shrink.linear4 import Compute, Linear4
from polyformer.spec import Record, rewrite, walk
from polyformer.swap.swap import Swap
from polyformer.tune.targets import ALL_LINEAR, targets


class Quantise(Swap):
    """Matrices held in four bits an element, as QLoRA holds those that it doesn't train (`Linear4`).

    Args:
        form, block, scales, compute: see `Linear4`.
        targets: which, by what `tune.targets` understands: paths, their ends, patterns, or all in the stacks. A matrix
            that has adapters is meant by the path of both.
        spared: which of them stay as they are.
    """

    form: Form = "nf4"
    block: int = 64
    scales: Literal["nested", "float32"] = "nested"
    compute: Compute | None = None
    targets: tuple[str, ...] = (ALL_LINEAR,)
    spared: tuple[str, ...] = ()

    def check(self) -> None:
        Linear4(1, 1, form=self.form, block=self.block, scales=self.scales, compute=self.compute)

    def rewritten(self, spec: Transformer) -> Transformer:
        meant = set(targets(spec, self.targets)) - set(targets(spec, self.spared) if self.spared else ())
        records = dict(walk(spec))
        places = {f"{path}.base" if isinstance(records[path], Adapted) else path for path in meant}
        wanted = {path for path in places if type(records[path]) is Linear}
        if not wanted:
            raise SpecError("none of these matrices could be quantised: all are spared, or in four bits already")

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
