"""From a spec and tensors to a model, and back: nothing is initialised first, nothing is copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError, WeightsError
from polyformer.parts.model import TransformerPart
from polyformer.parts.part import Part
from polyformer.spec import Spec
from polyformer.weights.files import called


def assemble(
    spec: Spec,
    tensors: Mapping[str, Tensor],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Part:
    """Build the module of `spec` around given tensors.

    The module is built on the meta device, so that no weights are made only to be overwritten, and takes the tensors
    themselves: those of a memory-mapped file stay mapped, and a model is in memory once.

    Args:
        spec: what to build.
        tensors: parameters and buffers by our names. Of parameters that are tied to each other one is enough; if
            several are there, they must be equal.
        device: where they go; where they are if None.
        dtype: what floating-point tensors become; what they are if None.
    Raises:
        WeightsError: tensors missing or left over, or of the wrong shape or kind; it names them.
        SpecError: sizes beyond what a tensor can have.
    """
    try:
        part = spec.build("meta")
    except (RuntimeError, TypeError) as error:  # what PyTorch raises for them
        raise SpecError(f"the model can't be built: {str(error).splitlines()[0]}") from error
    wanted = _state(part)
    tied = _names_of_each(part)
    left_over = [called(tensors, name) for name in tensors if name not in wanted]
    if left_over:
        raise WeightsError(f"there is no place in this model for {_listed(left_over)}")
    missing = [names for names in tied if not any(name in tensors for name in names)]
    if missing:
        raise WeightsError(f"the weights lack {_listed(called(tensors, names[0]) for names in missing)}")
    for names in tied:
        name, *others = [name for name in names if name in tensors]
        tensor = _fitting(tensors, name, wanted[name])
        for other in others:
            if not tensors[other].equal(tensor):
                raise WeightsError(f"{called(tensors, name)} and {called(tensors, other)} are tied, but they differ")
        is_parameter = isinstance(wanted[name], nn.Parameter)
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else None).contiguous()
        made = nn.Parameter(tensor, wanted[name].requires_grad) if is_parameter else tensor
        for one in names:
            owner, _, leaf = one.rpartition(".")
            setattr(part.get_submodule(owner), leaf, made)
    if isinstance(part, TransformerPart):
        part.tie()
    return part


def disassemble(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a model by our names; of tied ones the first. They share its memory."""
    state = _state(model)
    return {names[0]: state[names[0]].detach() for names in _names_of_each(model)}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that are saved with them, tied ones under each of their names."""
    saved = model.state_dict().keys()
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in everything if name in saved}


def _names_of_each(model: nn.Module) -> list[list[str]]:
    """The names under which each tensor stands."""
    names: dict[int, list[str]] = {}
    for name, tensor in _state(model).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _fitting(tensors: Mapping[str, Tensor], name: str, wanted: Tensor) -> Tensor:
    tensor = tensors[name]
    if tensor.shape != wanted.shape:
        shapes = f"has shape {list(tensor.shape)}, but the model needs {list(wanted.shape)}"
        raise WeightsError(f"{called(tensors, name)} {shapes}")
    if tensor.is_floating_point() != wanted.is_floating_point():
        raise WeightsError(f"{called(tensors, name)} holds {tensor.dtype}, but the model needs {wanted.dtype}")
    return tensor


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
