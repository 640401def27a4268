"""Adapter folders written so that PEFT loads them: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.families import Family
from polyformer.families.config import Head
from polyformer.parts import IA3, Adapter, Affine, DoRA, Embed, LoRA, Prefix, Prompt, Transformer, Whole
from polyformer.parts.adapters import AdaptedPart
from polyformer.parts.model import TransformerPart
from polyformer.tune.attach import AdapterSet, adapter_of
from polyformer.tune.config import CONFIG, TENSORS, write_config
from polyformer.tune.matrices import Matrices, Matrix
from polyformer.tune.reading import PREFIX, base_of
from polyformer.tune.sample import NOTE, sample, written
from polyformer.tune.targets import standing
from polyformer.tune.virtual import noted, write_virtual
from polyformer.weights.files import write_tensors
from polyformer.weights.folders import staged_folder

T = TypeVar("T")

TASKS: Mapping[Head, str] = {
    "none": "FEATURE_EXTRACTION",
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "span": "QUESTION_ANS",
}
"""What PEFT calls the use of a model with a head; others are language models, or have no name there."""

WHOLE_HEADS: Mapping[Head, tuple[str, ...]] = {
    "sequence": ("classifier", "score"),
    "token": ("classifier", "score"),
    "span": ("qa_outputs",),
}
"""Modules that PEFT saves with each adapter of a model with such a head."""

Own = Mapping[str, tuple[Adapter, Mapping[str, Tensor]]]
"""The adapters beside the parts of one matrix, and their tensors, by the parts' paths."""


def write_adapter(
    folder: str | Path,
    model: TransformerPart,
    family: Family,
    name: str = "default",
    base: str = "",
    replace: bool = False,
) -> None:
    """Save one adapter of a model as PEFT does; `read_adapter` and PEFT load it.

    Args:
        folder: the new folder, which appears whole or not at all.
        family: the base's.
        base: what the base is called, for whoever loads the adapter: a folder, or a name.
        replace: replace a folder that was saved before.
    Raises:
        SpecError: an unknown name, or what PEFT's format can't hold: matrices that are no modules there, adapters of
            several methods or scales at once.
        WeightsError: the folder exists, or can't be written.
    """
    own = adapter_of(model, name)
    if any(isinstance(one.adapter, Prefix | Prompt) for one in own.parts.placed):
        config, tensors = write_virtual(model, own)
        matrices, note = Matrices(family), sample(model, noted(model))
        writer = _Writer(model, matrices)
        for matrix in _expected(family, matrices):
            writer.put_whole(matrix, name)
        config = {**_common(model, family, base), **config}
        tensors |= {f"base_model.{key}": tensor for key, tensor in writer.tensors.items()}
    else:
        config, tensors, note = _of_matrices(model, family, own, base)
    with staged_folder(Path(folder), replace) as stage:
        write_config(stage / CONFIG, config)
        write_tensors(stage / TENSORS, tensors, {} if note is None else {NOTE: written(note)})


def _of_matrices(
    model: TransformerPart, family: Family, own: AdapterSet, base: str
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """Return the configuration and tensors of adapters beside matrices, and a sample of these."""
    matrices = Matrices(family)
    grouped, heads = _by_matrix(own, matrices), _expected(family, matrices)
    writer, name = _Writer(model, matrices), own.parts.placed[0].adapter.name
    for matrix, some in grouped.items():
        if matrix not in heads:
            writer.put(matrix, some)
    for matrix in heads:
        writer.put_whole(matrix, name)
    kept = {matrix for matrix in grouped if matrix not in heads and matrix not in writer.whole}
    note = sample(model, [path for matrix in kept for path in matrix.paths])
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in writer.tensors.items()}
    return {**_common(model, family, base), **writer.config()}, tensors, note


def _by_matrix(own: AdapterSet, matrices: Matrices) -> dict[Matrix, dict[str, tuple[Adapter, dict[str, Tensor]]]]:
    """Group an adapter's parts by the matrices of the reference."""
    sharing = {f"{path}.{one.tensor}": f"{one.paths[0]}.{one.tensor}" for one in own.parts.shared for path in one.paths}
    found: dict[Matrix, dict[str, tuple[Adapter, dict[str, Tensor]]]] = {}
    for placed in own.parts.placed:
        matrix = matrices.by_path.get(placed.path)
        if matrix is None:
            raise SpecError(f"{placed.path} is no matrix of its own in the reference library, so PEFT can't adapt it")
        names = [key for key in own.tensors if key.startswith(f"{placed.path}.")]
        tensors = {key[len(placed.path) + 1 :]: own.tensors[sharing.get(key, key)].detach() for key in names}
        found.setdefault(matrix, {})[placed.path] = placed.adapter, tensors
    return found


class _LowRank(NamedTuple):
    """What stands beside a matrix as PEFT has it, where it is LoRA."""

    rank: int
    alpha: float
    root: bool
    dropout: float
    directed: bool

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)

    def alpha_for(self, root: bool) -> float:
        """Return the alpha that gives the same scale, by the root of the rank or by the rank itself."""
        if root == self.root:
            return self.alpha
        return self.scale * (math.sqrt(self.rank) if root else self.rank)


class _Writer:
    """Makes PEFT's tensors and configuration of ours, matrix by matrix."""

    def __init__(self, model: TransformerPart, matrices: Matrices) -> None:
        assert isinstance(model.spec, Transformer)
        self.model, self.matrices, self.places = model, matrices, standing(model.spec)
        self.tensors: dict[str, Tensor] = {}
        self.loras: dict[Matrix, _LowRank] = {}
        self.factors: dict[Matrix, IA3] = {}
        self.whole: list[Matrix] = []

    def put(self, matrix: Matrix, own: Own) -> None:
        """Take the adapters beside a matrix."""
        kinds = {type(adapter) for adapter, _ in own.values()}
        if len(kinds) > 1:
            raise SpecError(f"{matrix.name} is one matrix for PEFT, but its parts have adapters of several methods")
        (kind,) = kinds
        if issubclass(kind, LoRA):
            self._low_rank(matrix, own)
        elif kind is IA3:
            self._factors(matrix, own)
        else:
            assert kind is Whole
            self._whole(matrix, own)

    def config(self) -> dict[str, Any]:
        """Return what `adapter_config.json` says of all that was taken."""
        whole = dict.fromkeys(_module_of(one.name) for one in self.whole)
        told: dict[str, Any] = {"modules_to_save": list(whole) or None}
        told["fan_in_fan_out"] = all(one.turned for one in (*self.loras, *self.factors)) and bool(self.tensors)
        if self.loras and self.factors:
            raise SpecError("one folder of PEFT's holds one method: LoRA or IA³, not both")
        if self.factors:
            inner = [one.name for one, adapter in self.factors.items() if adapter.side == "inputs"]
            targets = self.matrices.endings(one.name for one in self.factors)
            lasts = [one for one in targets if any(name == one or name.endswith(f".{one}") for name in inner)]
            return {**told, "peft_type": "IA3", "target_modules": targets, "feedforward_modules": lasts}
        if not self.loras:
            raise SpecError("a part that is trained whole is no adapter for PEFT; save the whole model")
        return {**told, **self._lora_config()}

    def _lora_config(self) -> dict[str, Any]:
        every = self.loras.values()
        if len({one.directed for one in every}) > 1:
            raise SpecError("one folder of PEFT's holds LoRA or DoRA, not both")
        root = all(one.root for one in every)
        ranks = {matrix.name: one.rank for matrix, one in self.loras.items()}
        alphas = {matrix.name: _number(one.alpha_for(root)) for matrix, one in self.loras.items()}
        rank, alpha = _usual(ranks.values()), _usual(alphas.values())
        return {
            "peft_type": "LORA",
            "target_modules": self.matrices.endings(ranks),
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{key}": value for key, value in ranks.items() if value != rank},
            "alpha_pattern": {f"^{key}": value for key, value in alphas.items() if value != alpha},
            "use_rslora": root,
            "use_dora": any(one.directed for one in every),
            "lora_dropout": _usual(one.dropout for one in every),
            "bias": "none",
        }

    def _low_rank(self, matrix: Matrix, own: Own) -> None:
        """Take LoRA. Where a fused matrix's parts have an A each, these stand above each other, and B is in blocks."""
        adapters = [one for one, _ in own.values() if isinstance(one, LoRA)]
        first, alike = adapters[0], len({(one.rank, one.scale) for one in adapters}) == 1
        every = [tensors["a"] for _, tensors in own.values()]
        a, columns = _joined(own, alike and all(one.equal(every[0]) for one in every))
        rows = []
        for path in matrix.paths:
            b = a.new_zeros(self._outputs(path), len(a))
            if path in own:
                one, tensors = own[path]
                assert isinstance(one, LoRA)
                b[:, columns[path]] = tensors["b"] if alike else tensors["b"] * (one.scale / first.scale)
            rows.append(b)
        self.tensors |= {f"{matrix.name}.lora_A.weight": a, f"{matrix.name}.lora_B.weight": matrix.together(rows)}
        root, directed = first.scaling == "root", isinstance(first, DoRA)
        wider = first.scale * (math.sqrt(len(a)) if root else len(a))
        rate = 0.0 if first.dropout is None else first.dropout.rate
        alpha = first.alpha if len(a) == first.rank else wider
        self.loras[matrix] = _LowRank(len(a), alpha, root, rate, directed)
        if directed:
            lengths = [self._lengths(path, own[path][1]["longer"] if path in own else None) for path in matrix.paths]
            self.tensors[f"{matrix.name}.lora_magnitude_vector"] = matrix.together(lengths)

    def _part(self, path: str) -> nn.Module:
        return self.model.get_submodule(self.places[path])

    def _outputs(self, path: str) -> int:
        spec = base_of(self._part(path)).spec
        assert isinstance(spec, Affine)
        return spec.outputs

    def _lengths(self, path: str, longer: Tensor | None) -> Tensor:
        dtype = torch.float32 if longer is None else longer.dtype
        lengths: Tensor = torch.linalg.vector_norm(base_of(self._part(path)).matrix().detach(), dim=1, dtype=dtype)
        return lengths if longer is None else lengths + longer

    def _factors(self, matrix: Matrix, own: Own) -> None:
        first = next(iter(own.values()))[0]
        assert isinstance(first, IA3)
        self.factors[matrix] = first
        key = f"{matrix.name}.ia3_l"
        if first.side == "inputs":
            vectors = [tensors["factors"] for _, tensors in own.values()]
            if set(own) != set(matrix.paths) or not all(one.equal(vectors[0]) for one in vectors):
                raise SpecError(
                    f"{matrix.name} is one matrix for PEFT, but its parts have other factors for their inputs"
                )
            self.tensors[key] = vectors[0][None]
            return
        rows = []
        for path in matrix.paths:
            rows.append(own[path][1]["factors"] if path in own else torch.ones(self._outputs(path)))
        self.tensors[key] = matrix.together(rows)[:, None]

    def put_whole(self, matrix: Matrix, name: str) -> None:
        """Take a matrix as it is with the adapter of a name, changed or not."""
        merged: dict[str, dict[str, Tensor]] = {}
        for path in matrix.paths:
            part = self._part(path)
            weight, bias = base_of(part).matrix().detach(), base_of(part).bias
            if isinstance(part, AdaptedPart):
                weight, bias = part.merged({name: 1.0})
            merged[path] = {"part.weight": weight} | ({} if bias is None else {"part.bias": bias.detach()})
        self._take_whole(matrix, merged)

    def _whole(self, matrix: Matrix, own: Own) -> None:
        if set(own) != set(matrix.paths):
            raise SpecError(f"{matrix.name} is one matrix for PEFT, but only a part of it is trained whole")
        self._take_whole(matrix, {path: tensors for path, (_, tensors) in own.items()})

    def _take_whole(self, matrix: Matrix, own: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.whole.append(matrix)
        for word in own[matrix.paths[0]]:
            rows = matrix.together([own[path][word] for path in matrix.paths])
            key = f"{matrix.name}.{word.removeprefix('part.')}"
            self.tensors[key] = rows.mT if matrix.turned and rows.ndim > 1 else rows


def _expected(family: Family, matrices: Matrices) -> list[Matrix]:
    """Return the matrices that PEFT finds in the file of every adapter for such a model, trained or not."""
    if family.head not in WHOLE_HEADS:
        return []
    named = {one.name: one for one in matrices.by_path.values()}
    return [one for name, one in named.items() if name.partition(".")[0] in WHOLE_HEADS[family.head]]


def _joined(own: Own, shared: bool) -> tuple[Tensor, dict[str, slice]]:
    """Return A, and which columns of B belong to which part: the same for all, or apart where A is not shared."""
    if shared:
        return next(iter(own.values()))[1]["a"], dict.fromkeys(own, slice(None))
    columns, start = dict[str, slice](), 0
    for path, (_, tensors) in own.items():
        columns[path] = slice(start, start + len(tensors["a"]))
        start += len(tensors["a"])
    return torch.cat([tensors["a"] for _, tensors in own.values()]), columns


def _common(model: TransformerPart, family: Family, base: str) -> dict[str, Any]:
    spec = model.spec
    assert isinstance(spec, Transformer)
    task = TASKS.get(family.head)
    if family.head == "lm" and isinstance(spec.source or spec.target, Embed):  # PEFT's class passes on ids only
        task = "CAUSAL_LM" if spec.encoder is None else "SEQ_2_SEQ_LM"
    return {"base_model_name_or_path": base or None, "task_type": task, "inference_mode": True}


def _module_of(name: str) -> str:
    """Return what PEFT calls a matrix that is saved whole: a head by the name of all of it."""
    first = name.partition(".")[0]
    return first if any(first in heads for heads in WHOLE_HEADS.values()) else name


def _usual(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
