"""PEFT's adapter folders read: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError, WeightsError
from polyformer.families import Family
from polyformer.parts import IA3, Adapter, DoRA, Dropout, LoRA, Transformer, Whole
from polyformer.parts.adapters import AdaptedPart
from polyformer.parts.linear import AffinePart
from polyformer.parts.model import TransformerPart
from polyformer.tune.attach import AdapterSet
from polyformer.tune.changes import AddAdapters, Placed, Shared
from polyformer.tune.config import CONFIG, TENSORS, PeftConfig, is_among, read_config
from polyformer.tune.matrices import Matrices, Matrix
from polyformer.tune.sample import NOTE, refuse_other_base
from polyformer.tune.targets import nearest, standing
from polyformer.tune.virtual import NAME, noted, read_virtual
from polyformer.weights.files import read_notes, read_tensors
from polyformer.weights.folders import member

PREFIX = "base_model.model."
ENDINGS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "ia3_l": "factors",
}
"""How tensors of adapters end, and what they are."""


def read_adapter(
    folder: str | Path,
    model: TransformerPart,
    family: Family,
    name: str = "default",
    base: Literal["same", "any"] = "same",
) -> AdapterSet:
    """Read an adapter that PEFT saved, or `write_adapter`, for a model of a published family.

    Args:
        model: which it shall be attached to; it is not changed.
        name: what it is called from now on.
        base: "any" takes an adapter, too, that says itself that it was trained on another base.
    Raises:
        WeightsError: files that are missing or damaged, tensors that belong to nothing or don't fit.
        SpecError: a method or setting that isn't understood; an adapter for another base.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder} holds no adapter: there is no {CONFIG}")
    config, file = read_config(folder / CONFIG), member(folder, TENSORS)
    tensors = {key: tensor for key, tensor in read_tensors(file).items()}
    reader = _Reader(config, name, model, Matrices(family))
    virtual = read_virtual(config, name, model, tensors.pop(NAME, None))
    for key, tensor in tensors.items():
        reader.take(key.removeprefix("base_model.").removeprefix("" if virtual else "model."), tensor)
    found = reader.found()
    own = [one.path for one in found.parts.placed if not isinstance(one.adapter, Whole)]
    if virtual is not None:
        parts = AddAdapters((*virtual.parts.placed, *found.parts.placed), (*virtual.parts.shared, *found.parts.shared))
        found, own = AdapterSet(parts, {**virtual.tensors, **found.tensors}), noted(model)
    if not found.parts.placed:
        raise WeightsError(f"{file} holds no tensors")
    if base == "same":
        refuse_other_base(read_notes(file).get(NOTE), model, own)
    return found


@dataclass
class _Reader:
    """Puts the tensors of a file together, module by module."""

    config: PeftConfig
    name: str
    model: TransformerPart
    matrices: Matrices
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    places: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        assert isinstance(self.model.spec, Transformer)
        self.places = standing(self.model.spec)

    def take(self, key: str, tensor: Tensor) -> None:
        """Note a tensor of the file."""
        ending = next((one for one in ENDINGS if key.endswith(f".{one}")), None)
        module, what = (key[: -len(ending) - 1], ENDINGS[ending]) if ending else (key.rpartition(".")[0], "")
        what = what or f"whole {key.rpartition('.')[2]}"
        module = module.removesuffix(".modules_to_save")
        if module not in self.matrices.by_name or what not in (*ENDINGS.values(), "whole weight", "whole bias"):
            near = nearest(module, self.matrices.by_name) if module not in self.matrices.by_name else ""
            raise WeightsError(f"'{key}' of the adapter belongs to no matrix of this model{near}")
        self.modules.setdefault(module, {})[what] = tensor

    def found(self) -> AdapterSet:
        """Return the adapter."""
        placed, shared, tensors = list[Placed](), list[Shared](), dict[str, Tensor]()
        for module, given in self.modules.items():
            matrix = self.matrices.by_name[module]
            try:
                adapters, own, common = self._parts(matrix, given)
            except SpecError as error:
                raise WeightsError(f"the adapter's tensors for {module} don't fit: {error}") from None
            placed += [Placed(path, one) for path, one in zip(matrix.paths, adapters, strict=True)]
            for path, some in zip(matrix.paths, own, strict=True):
                tensors |= {f"{path}.{key}": tensor for key, tensor in some.items()}
            if common and len(matrix.paths) > 1:
                shared.append(Shared(matrix.paths, common))
        return AdapterSet(AddAdapters(tuple(placed), tuple(shared)), tensors)

    def _parts(self, matrix: Matrix, given: Mapping[str, Tensor]) -> tuple[list[Adapter], list[dict[str, Tensor]], str]:
        """Return the adapters beside each of a matrix's parts, their tensors, and the name of one that all share."""
        if "whole weight" in given and given.keys() <= {"whole weight", "whole bias"}:
            return self._whole(matrix, given)
        kinds = {"LORA": {"A", "B"} | ({"magnitude"} if self.config.directed else set()), "IA3": {"factors"}}
        needed = kinds.get(self.config.kind, {"weight"})
        if given.keys() != needed:
            lacks = ", ".join(sorted(needed - given.keys()) or sorted(given.keys() - needed))
            raise WeightsError(f"the adapter's tensors for {matrix.name} are not complete, or too many: {lacks}")
        return self._low_rank(matrix, given) if self.config.kind == "LORA" else self._factors(matrix, given)

    def _low_rank(
        self, matrix: Matrix, given: Mapping[str, Tensor]
    ) -> tuple[list[Adapter], list[dict[str, Tensor]], str]:
        a, b, rank = given["A"], given["B"], self.config.rank_of(matrix.name)
        if a.ndim != 2 or b.ndim != 2 or {len(a), b.shape[1]} != {rank}:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            raise WeightsError(
                f"the adapter's tensors for {matrix.name} have shapes {shapes}, not those of rank {rank}"
            )
        dropout = Dropout(self.config.dropout) if self.config.dropout else None
        scaling: Literal["root", "rank"] = "root" if self.config.root else "rank"
        kind = DoRA if self.config.directed else LoRA
        rows = matrix.apart(b)
        adapters: list[Adapter] = [
            kind(self.name, 1.0, a.shape[1], len(one), rank, self.config.alpha_of(matrix.name), scaling, dropout)
            for one in rows
        ]
        own = [{"a": a, "b": one} for one in rows]
        if self.config.directed:
            for path, some, lengths in zip(matrix.paths, own, matrix.apart(given["magnitude"].flatten()), strict=True):
                weight = base_of(self._part(path)).matrix().detach()
                were: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=lengths.dtype)
                some["longer"] = lengths - were.cpu()
        return adapters, own, "a"

    def _part(self, path: str) -> nn.Module:
        if path not in self.places:
            raise SpecError(f"it would stand beside '{path}', which this model lacks{nearest(path, self.places)}")
        return self.model.get_submodule(self.places[path])

    def _factors(
        self, matrix: Matrix, given: Mapping[str, Tensor]
    ) -> tuple[list[Adapter], list[dict[str, Tensor]], str]:
        factors = given["factors"]
        if is_among(matrix.name, self.config.inputs):
            one: Adapter = IA3(self.name, 1.0, factors.numel(), "inputs")
            return [one] * len(matrix.paths), [{"factors": factors.flatten()}] * len(matrix.paths), "factors"
        rows = matrix.apart(factors.flatten())
        return [IA3(self.name, 1.0, len(row)) for row in rows], [{"factors": row} for row in rows], ""

    def _whole(self, matrix: Matrix, given: Mapping[str, Tensor]) -> tuple[list[Adapter], list[dict[str, Tensor]], str]:
        bases = [base_of(self._part(path)).spec for path in matrix.paths]
        own = [dict[str, Tensor]() for _ in matrix.paths]
        for what, tensor in given.items():
            word = what.removeprefix("whole ")
            turned = tensor.mT if matrix.turned and tensor.ndim > 1 else tensor
            for some, rows in zip(own, matrix.apart(turned), strict=True):
                some[f"part.{word}"] = rows
        return [Whole(self.name, 1.0, one) for one in bases], own, ""


def base_of(part: nn.Module) -> AffinePart:
    """Return the matrix itself of one that may have adapters."""
    base = part.base if isinstance(part, AdaptedPart) else part
    assert isinstance(base, AffinePart)
    return base
