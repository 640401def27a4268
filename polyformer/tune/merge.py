"""Adapters merged into the matrices that they stand beside, and taken out again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.generate.search import positions_of
from polyformer.parts import IA3, Adapted, Affine, DoRA, Embed, LastOf, Linear, LoRA, TokenEmbedding, Transformer
from polyformer.parts.adapters import AdaptedPart, Before, IA3Part, LoRAPart, mixed
from polyformer.parts.flow import Mix
from polyformer.parts.linear import LinearPart
from polyformer.parts.model import TransformerPart
from polyformer.spec import Record, rewrite, walk
from polyformer.swap.drift import Drift, Inputs, drift
from polyformer.swap.origins import Moves, tied_groups, ties_of
from polyformer.swap.swap import Swap
from polyformer.tune.attach import AdapterSet, attach, rebuilt
from polyformer.tune.changes import Placed, adapters_of, refuse_unknown
from polyformer.tune.targets import standing

PROBED = 32
"""Tokens of a sequence on which a merged model is compared."""


class MergeChange(Swap):
    """Plain matrices of floating-point numbers where adapters stood."""

    def rewritten(self, spec: Transformer) -> Transformer:
        def change(path: str, record: Record) -> Record:
            if not isinstance(record, Adapted):
                return record
            if not isinstance(record.base, Affine):
                raise SpecError(f"{path}: what stands beside {type(record.base).__name__} can't be merged: no matrix")
            return Linear(record.base.inputs, record.base.outputs, record.base.bias)

        return rewrite(spec, change)

    def apply(self, spec: Transformer) -> Transformer:
        """Return the changed spec; a matrix that was tied to another is then one of its own."""
        new = super().apply(spec)
        places = [path for path, one in walk(spec) if isinstance(one, Adapted)]
        merged = {f"{path}.{name}" for path in places for name in ("weight", "bias")}
        groups = [[name for name in group if name not in merged] for group in tied_groups(new.ties)]
        return new.replace(ties=ties_of(groups))

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        return {path: f"{path}.base" for path, one in walk(old) if isinstance(one, Adapted)}


@dataclass(frozen=True)
class Merged:
    """A model without adapters that answers as one with them did, and how far from it.

    Attributes:
        drift: on the inputs that were given, or on random tokens; None where the model reads none of them.
    """

    model: TransformerPart
    drift: Drift | None


def merge(model: TransformerPart, mix: Mix | None = None, inputs: Iterable[Inputs] | None = None) -> Merged:
    """Merge adapters into their base's matrices.

    What is not merged is shared with `model`, which stays as it is. A matrix is worked out in single precision at
    least, and rounded to the base's own; of a quantised base it becomes plain numbers.

    Args:
        mix: the adapters' shares; those that the model is set to if None.
        inputs: what both models are compared on; random tokens if None.
    Raises:
        SpecError: an unknown adapter, one that is no change of matrices (a prefix), or nothing to merge.
    """
    spec = model.spec
    assert isinstance(spec, Transformer)
    if not adapters_of(spec):
        raise SpecError("the model has no adapter that could be merged")
    refuse_unknown(list(mix or ()), spec)
    change, tensors = MergeChange(), dict[str, Tensor]()
    change.apply(spec)
    for path, part in model.named_modules():
        if isinstance(part, AdaptedPart):
            weight, bias = part.merged(mix)
            tensors |= {f"{path}.weight": weight} | ({} if bias is None else {f"{path}.bias": bias})
    plain = rebuilt(model, change, tensors)
    probes = _probes(spec) if inputs is None else inputs
    if probes is None:
        return Merged(plain, None)
    with mixed(model, mix):
        return Merged(plain, drift(model, plain, probes))


def unmerge(model: TransformerPart, adapter: AdapterSet) -> TransformerPart:
    """Return a merged model with the adapter apart again: the inverse of `merge`, up to rounding.

    Raises:
        SpecError: DoRA or a whole part, whose base can't be told from what it became, or a factor of 0.
    """
    odd = next((one.adapter for one in adapter.parts.placed if not isinstance(one.adapter, LoRA | IA3)), None)
    odd = odd or next((one.adapter for one in adapter.parts.placed if isinstance(one.adapter, DoRA)), None)
    if odd is not None:
        raise SpecError(f"{type(odd).__name__} can't be taken out of a matrix again; load the base, and attach to it")
    made = attach(model, adapter)
    assert isinstance(made.spec, Transformer)
    places = standing(made.spec)
    for one in adapter.parts.placed:
        part = made.get_submodule(places[one.path])
        assert isinstance(part, AdaptedPart)
        assert isinstance(part.base, LinearPart)
        with torch.no_grad():
            weight, bias = _taken_out(part, one)
        part.base.weight = nn.Parameter(weight, requires_grad=False)
        part.base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made


def _taken_out(part: AdaptedPart, placed: Placed) -> tuple[Tensor, Tensor | None]:
    """Return the base's matrix and bias of what they became by merging."""
    own, base, share = part.adapters[-1], part.base, placed.adapter.share
    assert isinstance(base, LinearPart)
    if isinstance(own, LoRAPart):
        exact = base.weight.to(torch.promote_types(base.weight.dtype, torch.float32))
        return own.merged(exact, None, Before(base, exact, exact), -share)[0].to(base.weight.dtype), base.bias
    assert isinstance(own, IA3Part)
    factors = own.shared(share).to(base.weight.dtype)
    if not bool(factors.all()):
        raise SpecError(f"{placed.path} was multiplied by a factor of 0, which can't be undone")
    if own.side == "inputs":
        return base.weight / factors, base.bias
    return base.weight / factors[:, None], None if base.bias is None else base.bias / factors


def _probes(spec: Transformer) -> list[Inputs] | None:
    """Return random tokens for a model that reads tokens alone."""
    sizes: dict[str, int] = {}
    for name, side in (("input_ids", spec.source or spec.target), ("decoder_input_ids", spec.target)):
        tokens = side.tokens if isinstance(side, Embed) else None
        if not isinstance(tokens, TokenEmbedding):
            return None
        sizes[name] = tokens.vocabulary
        if spec.encoder is None or spec.decoder is None or spec.delay is not None:
            break
    if spec.head is not None and any(isinstance(one, LastOf) for _, one in walk(spec.head)):
        return None
    bounds = [positions_of(side) for side in (spec.source, spec.target) if side is not None]
    length = min([PROBED, *(bound for bound in bounds if bound is not None)])
    chance = torch.Generator().manual_seed(0)
    return [{name: torch.randint(size, (4, length), generator=chance) for name, size in sizes.items()}]
