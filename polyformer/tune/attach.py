"""Models with adapters made of models without, and back: the base's tensors are shared, never copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import Adapted, Adapter, Transformer
from polyformer.parts.adapters import mixed
from polyformer.parts.flow import Mix
from polyformer.parts.model import TransformerPart
from polyformer.spec import Record, Spec, walk
from polyformer.swap.origins import origins, owner, tied_groups
from polyformer.swap.swap import Swap
from polyformer.tune.changes import AddAdapters, Placed, RemoveAdapters, Shared, place_of, refuse_unknown
from polyformer.tune.targets import matching, nearest, standing
from polyformer.weights.assemble import assemble


@dataclass(frozen=True)
class AdapterSet:
    """One adapter of a model, apart from it: which parts it has, and their tensors.

    Attributes:
        parts: what stands where.
        tensors: by the path of the part that they stand beside and their own name: `"decoder.….q.a"`.
    """

    parts: AddAdapters
    tensors: Mapping[str, Tensor]


def attach(model: TransformerPart, adapter: Swap | AdapterSet) -> TransformerPart:
    """Return a model with an adapter: a new one (`LoraChange`, …), or one with its tensors.

    The base's tensors are shared with `model`, and don't learn any more; those of all adapters do.

    Raises:
        SpecError: targets that match nothing, sizes that don't fit, a name that the model has already.
    """
    if isinstance(adapter, Swap):
        made = rebuilt(model, adapter)
    else:
        new = adapter.parts.apply(_spec(model))
        places = {one.path: place_of(new, one.path, one.adapter.name) for one in adapter.parts.placed}
        named = {_put(name, places): tensor for name, tensor in adapter.tensors.items()}
        made = rebuilt(model, adapter.parts, named)
    return train_adapters(made)


def adapter_of(model: TransformerPart, name: str = "default") -> AdapterSet:
    """Return a model's adapter by itself; its tensors are the model's own. Raises `SpecError` for an unknown name."""
    spec, placed, tensors = _spec(model), list[Placed](), dict[str, Tensor]()
    refuse_unknown([name], spec)
    places: dict[str, str] = {}
    records = dict(walk(spec))
    for plain, path in standing(spec).items():
        record = records[path]
        if not isinstance(record, Adapted):
            continue
        for i, one in enumerate(record.adapters):
            if one.name == name:
                placed.append(Placed(plain, one))
                places[f"{path}.adapters.{i}"] = plain
                own = model.get_submodule(f"{path}.adapters.{i}").state_dict()
                tensors |= {f"{plain}.{key}": tensor for key, tensor in own.items()}
    shared = []
    for group in tied_groups(spec.ties):
        owners = [next((place for place in places if one.startswith(f"{place}.")), "") for one in group]
        if all(owners):
            shared.append(Shared(tuple(places[one] for one in owners), group[0][len(owners[0]) + 1 :]))
    return AdapterSet(AddAdapters(tuple(placed), tuple(shared)), tensors)


def detach(model: TransformerPart, *names: str) -> TransformerPart:
    """Return the model without some of its adapters, without any if none is named; raises `SpecError` as above."""
    from polyformer.tune.changes import adapters_of

    return rebuilt(model, RemoveAdapters(names or tuple(adapters_of(_spec(model)))))


@contextmanager
def using(model: TransformerPart, mix: Mix | str) -> Iterator[None]:
    """Within this, let a mix of adapters act, or one, and no others; an empty mix is the base alone.

    Raises:
        SpecError: a name that no adapter of the model has.
    """
    mix = {mix: 1.0} if isinstance(mix, str) else mix
    refuse_unknown(list(mix), _spec(model))
    with mixed(model, mix):
        yield


def train_adapters(model: TransformerPart, *names: str) -> TransformerPart:
    """Let the adapters learn, all or those named, and nothing else; returns the model."""
    refuse_unknown(names, _spec(model))
    model.requires_grad_(False)
    for part in model.modules():
        own = getattr(part, "spec", None)
        if isinstance(own, Adapter) and (not names or own.name in names):
            part.requires_grad_(True)
    return model


def freeze(model: TransformerPart, *patterns: str) -> TransformerPart:
    """Let what patterns mean not learn any more, such as "decoder.blocks.0.*" or "target"; returns the model.

    A pattern means parameters, or parts with all that is in them, by their paths or the ends of these.

    Raises:
        SpecError: a pattern that matches nothing.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = matching(pattern, known)
        if not found:
            parts = {name.rsplit(".", i)[0] for name in known for i in range(name.count(".") + 1)}
            raise SpecError(f"'{pattern}' matches no parameter of this model{nearest(pattern, parts)}")
        for name in found:
            known[name].requires_grad_(False)
    return model


def rebuilt(model: TransformerPart, change: Swap, tensors: Mapping[str, Tensor] | None = None) -> TransformerPart:
    """Return the model that a change makes of another; what both have is one tensor in both.

    Unlike `transplant`, it fits nothing: each tensor is found whole, is given, or is new. Where two parts came from
    one, the second gets tensors of its own.

    Args:
        tensors: by name in the new model, for those that are not the old one's.
    Raises:
        SpecError: a change that can't be made of this model.
    """
    old, given = _spec(model), tensors or {}
    new = change.apply(old)
    came = origins(old, new, change.moves(old, new))
    held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held |= dict(model.named_buffers(remove_duplicate=False))
    records, found, used = dict(walk(new)), dict[str, Tensor](), set[int]()
    first = {name: group[0] for group in tied_groups(new.ties) for name in group}
    for name in new.build("meta").state_dict():
        path = owner(name, records)
        source = f"{came[path]}{name[len(path) :]}"
        if name in given:
            found[name] = given[name]
        elif first.get(name, name) in found:
            continue
        elif came[path] is not None and source in held:
            tensor = held[source]
            found[name] = tensor.detach().clone() if id(tensor) in used else tensor.detach()
            used.add(id(tensor))
        else:
            found[name] = _initial(records[path], name[len(path) :].lstrip("."), held)
    made = assemble(new, found)
    assert isinstance(made, TransformerPart)
    return made.train(model.training)


def _initial(record: Record, name: str, like: Mapping[str, Tensor]) -> Tensor:
    """Return a new tensor where the others are, in single precision at least."""
    assert isinstance(record, Spec)
    made: Tensor = record.build().state_dict()[name]
    beside = next((one for one in like.values() if one.is_floating_point()), made)
    if not made.is_floating_point():
        return made.to(beside.device)
    return made.to(beside.device, torch.promote_types(beside.dtype, torch.float32))


def _spec(model: TransformerPart) -> Transformer:
    assert isinstance(model.spec, Transformer)
    return model.spec


def _put(name: str, places: Mapping[str, str]) -> str:
    """Return a tensor's name in a model, given that by the path of the part that its adapter stands beside."""
    path = max((one for one in places if name.startswith(f"{one}.")), key=len)
    return places[path] + name[len(path) :]
