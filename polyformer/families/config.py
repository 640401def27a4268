"""Reading a reference library's `config.json` so that nothing in it is ignored silently, and writing it.

A family is a record whose fields are the keys that matter, under their names in the file and with the reference's
defaults. Every other key must be one of which it is known what it says, with a value that says nothing special.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from polyformer.errors import SpecError, suggest
from polyformer.families import generation
from polyformer.spec import Record, field_types

if TYPE_CHECKING:
    import torch

    from polyformer.parts.feedforward import Activation
    from polyformer.parts.model import Transformer
    from polyformer.weights.names import Names

F = TypeVar("F", bound="Family")

REMARKS = frozenset(
    (
        "_name_or_path",
        "_num_labels",
        "architectures",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "init_std",
        "initializer_range",
        "label2id",
        "model_type",
        "num_labels",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
"""Keys that change nothing in what a model computes, whatever they hold."""

PLAIN: dict[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "return_dict": True,
    "sep_token_id": None,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "torchscript": False,
    "use_bfloat16": False,
}
"""Keys that every configuration of the reference may hold, with its defaults."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Family(Record, abstract=True):
    """A published architecture, as its `config.json` describes one model of it.

    A subclass's fields are the keys that it uses. Class variables say the rest:

    - `model_type`, `architectures`: what stands in the file; the first architecture is written.
    - `unused`: further keys of the reference, each with the one value that is understood.
    - `aliases`: second names of keys, which must agree with the first.
    """

    model_type: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    unused: ClassVar[Mapping[str, Any]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}

    def check(self) -> None:
        """Bound all sizes, so that no file can ask for a model that takes minutes and gigabytes to describe."""
        for key in field_types(type(self)):
            value = getattr(self, key)
            if isinstance(value, int):
                least, most = (1, 4096) if key.endswith("layers") else (-1, 2**24)
                self.require(least <= value <= most, f"{key} = {value} is not between {least} and {most}")

    def spec(self) -> Transformer:
        """Return the model; raises `SpecError` for a combination that is not supported."""
        raise NotImplementedError

    def names(self) -> Names:
        """Return the table of the tensors' names on disk."""
        raise NotImplementedError


def read_config(family: type[F], data: Mapping[str, Any], where: str) -> F:
    """Read a `config.json` of a family.

    Args:
        data: the file's content.
        where: the file, for messages.
    Raises:
        SpecError: a key that the family does not know, or an unused one whose value is not the reference's default;
            an architecture (a kind of head) that is not supported; values of the wrong kind; remote code.
    """
    refuse_remote_code(data, where)
    kinds = field_types(family)
    found = {key: value for key, value in data.items() if key in kinds}
    plain = {**PLAIN, **family.unused}
    for key, value in data.items():
        if key in kinds or key in REMARKS or key in generation.KEYS:
            continue
        if key in family.aliases:
            same = found.setdefault(family.aliases[key], value)
            if same != value:
                raise SpecError(f"{where} has {key} = {value!r}, but {family.aliases[key]} = {same!r}")
        elif key not in plain:
            near = suggest(key, kinds) if len(suggest(key, kinds)) < 60 else ""
            raise SpecError(f"{where} has a key '{key}' that the family {family.model_type} does not know{near}")
        elif value != plain[key]:
            raise SpecError(f"{where} has {key} = {value!r}; only {plain[key]!r} is supported")
    heads = data.get("architectures") or [family.architectures[0]]
    if heads[0] not in family.architectures:
        raise SpecError(f"{where} is of a {heads[0]}; supported: {', '.join(family.architectures)}")
    return family.from_data(found, where)


def write_config(config: Family, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of a `config.json` from which the reference library makes the same model."""
    values = {key: getattr(config, key) for key in field_types(type(config))}
    heads = [config.architectures[0]]
    return {
        "architectures": heads,
        "dtype": str(dtype).removeprefix("torch."),
        "model_type": config.model_type,
        **values,
    }


def activation(name: str) -> Activation:
    """Return our name of a reference's activation; raises `SpecError` for one that we lack."""
    if name not in ACTIVATIONS:
        raise SpecError(f"there is no activation '{name}'{suggest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def refuse_remote_code(data: object, where: str) -> None:
    """Raise `SpecError` where a file, at any depth, asks that code which came with it be run."""
    if isinstance(data, Mapping):
        if "auto_map" in data:
            raise SpecError(
                f"{where} asks to run program code that comes with the model (auto_map); this is never done"
            )
        for value in data.values():
            refuse_remote_code(value, where)
    elif isinstance(data, (list, tuple)):
        for value in data:
            refuse_remote_code(value, where)
