"""Reading a reference library's `config.json` so that nothing in it is ignored silently, and writing it.

A family is a record whose fields are the keys that matter, under their names in the file and with the reference's
defaults. Every other key must be one of which it is known what it says, with a value that says nothing special.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from polyformer.errors import SpecError, suggest
from polyformer.families import generation
from polyformer.spec import Record, field_types

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from polyformer.parts.feedforward import Activation
    from polyformer.parts.model import Transformer
    from polyformer.weights.names import Names

F = TypeVar("F", bound="Family")

Head = Literal["none", "lm", "mlm", "pretraining", "discriminator", "sequence", "token", "span", "image", "ctc"]
"""What stands on a model: nothing, next or masked words, masked words and next sentences (BERT's pretraining), whether
each token was replaced (ELECTRA's), one label to a sequence, one to a token, the ends of an answer, one label to an
image, a letter or nothing to each moment of sound."""

LABELS = ("id2label", "label2id", "num_labels")

REMARKS = frozenset(
    (
        "_name_or_path",
        "_num_labels",
        "architectures",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "init_std",
        "initializer_range",
        "model_type",
        "problem_type",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
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
    "is_encoder_decoder": False,
    "prefix": None,
    "pruned_heads": {},
    "return_dict": True,
    "sep_token_id": None,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "torchscript": False,
    "use_bfloat16": False,
}
"""Keys that every configuration of the reference may hold, with its defaults."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "identity",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


class Family(Record, abstract=True):
    """A published architecture, as its `config.json` describes one model of it.

    A subclass's fields are the keys that it uses. Class variables say the rest:

    - `model_type`: what stands in the file.
    - `architectures`: the reference's classes that can be read, each with the head that it has; the first one is
      meant where the file is silent.
    - `unused`: further keys of the reference, each with the one value that is understood.
    - `aliases`: second names of keys, which must agree with the first.
    - `paper`, `tokenizer` (the kind that it was published with): for the list of families.

    The fields `architecture`, `labels` (what a classifier's outputs mean) and `pooled` (whether a base model has its
    pooler, which only the tensors in the file tell) are those of every family.
    """

    model_type: ClassVar[str]
    architectures: ClassVar[Mapping[str, Head]]
    unused: ClassVar[Mapping[str, Any]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    paper: ClassVar[str] = ""
    tokenizer: ClassVar[str] = ""

    architecture: str = ""
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    pooled: bool = True

    @property
    def head(self) -> Head:
        """The head of this model."""
        return self.architectures[self.architecture or next(iter(self.architectures))]

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return a file's content as today's reference would write it; for families whose keys have changed."""
        return data

    def check(self) -> None:
        """Bound all sizes, so that no file can ask for a model that takes minutes and gigabytes to describe."""
        known = self.architecture in ("", *self.architectures)
        self.require(known, f"architecture '{self.architecture}' is none of {', '.join(self.architectures)}")
        for key in keys(type(self)):
            value = getattr(self, key)
            if isinstance(value, int):
                least, most = (1, 4096) if key.endswith("layers") else (-1, 2**24)
                self.require(least <= value <= most, f"{key} = {value} is not between {least} and {most}")

    def seeing(self, names: Mapping[str, Tensor]) -> Self:
        """Return this model as its tensors show it, by their names on disk, where its configuration is silent."""
        return self

    def spec(self) -> Transformer:
        """Return the model; raises `SpecError` for a combination that is not supported."""
        raise NotImplementedError

    def names(self) -> Names:
        """Return the table of the tensors' names on disk."""
        raise NotImplementedError

    def module(self, name: str) -> str | None:
        """Return what the reference calls, in memory, the matrix that a file calls `name`; None if it is none there."""
        return name


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
    data = family.modern(data, where)
    kinds = keys(family)
    found = {key: value for key, value in data.items() if key in kinds}
    plain = {**PLAIN, **family.unused}
    for key, value in data.items():
        if key in kinds or key in LABELS or key in REMARKS or key in generation.KEYS:
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
    made_by = data.get("architectures") or list(family.architectures)
    first = made_by[0] if isinstance(made_by, (list, tuple)) else made_by
    if not isinstance(first, str) or first not in family.architectures:
        raise SpecError(f"{where} is of a {str(first)[:100]}; supported: {', '.join(family.architectures)}")
    architecture = "" if first == next(iter(family.architectures)) else first
    return family.from_data({**found, "architecture": architecture, "labels": _labels(data, where)}, where)


def keys(family: type[Family]) -> list[str]:
    """Return the fields of a family that are keys of its `config.json`."""
    return [key for key in field_types(family) if key not in ("architecture", "labels", "pooled")]


def _labels(data: Mapping[str, Any], where: str) -> list[str]:
    """Read what a classifier's outputs mean; without names they are counted."""
    names = data.get("id2label")
    if names is None:
        count = data.get("num_labels", 2)
        if type(count) is not int or not 0 <= count <= 2**20:
            raise SpecError(f"{where} has num_labels = {count!r}, which is no number of labels")
        return [f"LABEL_{i}" for i in range(count)]
    places = {str(i) for i in range(len(names))} if isinstance(names, Mapping) else None
    if places is None or {str(key) for key in names} != places:
        raise SpecError(f"{where} should have an id2label from 0, 1, 2, … to names")
    by_place = {int(key): str(name) for key, name in names.items()}
    return [by_place[i] for i in range(len(by_place))]


def write_config(config: Family, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of a `config.json` from which the reference library makes the same model."""
    values = {key: getattr(config, key) for key in keys(type(config))}
    plain = {key: _plain(value, dtype) for key, value in values.items()}
    return {
        "architectures": [config.architecture or next(iter(config.architectures))],
        "dtype": str(dtype).removeprefix("torch."),
        "id2label": {str(i): name for i, name in enumerate(config.labels)},
        "label2id": {name: i for i, name in enumerate(config.labels)},
        "model_type": config.model_type,
        **plain,
    }


def _plain(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Family):
        return write_config(value, dtype)
    return value.to_data() if isinstance(value, Record) else value


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
