"""A new head on a model: a rewrite that keeps all else, and says which tensors are new."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from polyformer.errors import SpecError
from polyformer.families import Family
from polyformer.loaded.model import Loaded, ready
from polyformer.parts import Chain, Dropout, Linear, Nth, TokenEmbedding
from polyformer.parts.model import Transformer
from polyformer.spec import Spec, walk
from polyformer.swap import transplant
from polyformer.weights.assemble import assemble, disassemble

Answers = Literal["sequence", "token", "image"]

ENDINGS: Mapping[Answers, str] = {
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "image": "ForImageClassification",
}


class Headed(NamedTuple):
    """A model with a head for labels, and the names of its parameters that are new; none if it had that head."""

    loaded: Loaded
    new: tuple[str, ...]


def has_head(loaded: Loaded, answers: Answers, labels: tuple[str, ...]) -> bool:
    """Tell whether a model gives scores to just these labels already, in this order."""
    if loaded.labels != labels:
        return False
    if loaded.family is not None:
        return loaded.family.head == answers
    return loaded.spec.head == _own_head(loaded.spec, answers, len(labels))


def with_head(loaded: Loaded, answers: Answers, labels: tuple[str, ...]) -> Headed:
    """Give a model a head that scores labels: of whole texts, of tokens, or of images.

    Of a published family it is the head of the reference's class for that, so that the result loads there; all tensors
    whose names on disk are the same are kept, as the reference does it. What is new is drawn from PyTorch's generator.

    Raises:
        SpecError: the family has no such head.
    """
    if has_head(loaded, answers, labels):
        return Headed(loaded, ())
    if loaded.family is None:
        made, report = transplant(loaded.model, _rewritten(loaded.spec, answers, len(labels)))
        new = tuple(entry.names[0] for entry in report.tensors if entry.fate == "new")
        return Headed(dataclasses.replace(loaded, model=made, labels=labels), new)
    family = _answering(loaded.family, answers, labels)
    spec = family.spec()
    begun = spec.build()
    drawn = family.names().to_disk(disassemble(begun))
    held = loaded.family.names().to_disk(disassemble(loaded.model))
    found, fresh = dict[str, Tensor](), list[str]()
    for name, tensor in drawn.items():
        before = next((held[one] for one in _names(name, held) if held[one].shape == tensor.shape), None)
        found[name] = tensor if before is None else before
        if before is None:
            fresh.append(name)
    model = ready(assemble(spec, family.names().to_ours(found)))
    places = {found[name].data_ptr() for name in fresh}
    new = tuple(name for name, tensor in disassemble(model).items() if tensor.data_ptr() in places)
    return Headed(dataclasses.replace(loaded, model=model, family=family, labels=labels), new)


def _answering(family: Family, answers: Answers, labels: tuple[str, ...]) -> Family:
    """Return the family's model that has this head."""
    names = list(family.architectures)
    wanted = next((i for i, name in enumerate(names) if name.endswith(ENDINGS[answers])), None)
    if wanted is None:
        raise SpecError(f"the family {family.model_type} has no model with a head for the labels of a {answers}")
    return family.replace(architecture=names[wanted] if wanted else "", labels=labels)


def _names(name: str, held: Mapping[str, Tensor]) -> Iterable[str]:
    """Return under which names a tensor may stand in the file of another class: with or without the base's name."""
    inner = name.partition(".")[2]
    outer = (one for one in held if one.partition(".")[2] == name)
    return (one for one in (name, inner, *outer) if one in held)


def _rewritten(spec: Transformer, answers: Answers, labels: int) -> Transformer:
    head = _own_head(spec, answers, labels)
    ties = tuple(one for one in spec.ties if not one.tied.startswith("head.") and not one.to.startswith("head."))
    return spec.replace(head=head, pooler=None, ties=ties)


def _own_head(spec: Transformer, answers: Answers, labels: int) -> Spec:
    widths = [record.width for _, record in walk(spec) if isinstance(record, TokenEmbedding)]
    if spec.encoder is None or answers == "image" or not widths:
        raise SpecError("a model of ours gets a head for labels if it is an encoder of texts; this is another model")
    steps = (Dropout(0.1), Linear(widths[0], labels))
    return Chain(steps if answers == "token" else (Nth(0), *steps))
