"""sentence-transformers folders (Reimers and Gurevych 2019): how a text's rows become its vector.

`modules.json` lists steps, each with a folder of its own: the Transformer, pooling, and perhaps dense layers and
normalising. Every step but the first becomes part of a `Chain`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from polyformer import parts
from polyformer.errors import SpecError, suggest
from polyformer.parts.feedforward import Activation
from polyformer.spec import Record, Spec
from polyformer.weights import strict_json
from polyformer.weights.files import TensorMap, read_tensors
from polyformer.weights.folders import member
from polyformer.weights.names import Names, Row

MODULES, CONFIG, LENGTH, PROMPTS = (
    "modules.json",
    "config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
MODES: dict[str, Spec] = {"cls": parts.Nth(0), "lasttoken": parts.Last(), "max": parts.Max(), "mean": parts.Mean()}
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""How folders say the mode, but for the newest, which have it as `pooling_mode`."""

ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
}
R = TypeVar("R", bound=Record)


class PoolingConfig(Record):
    """The keys of a pooling step's `config.json`."""

    word_embedding_dimension: int | None = None
    embedding_dimension: int | None = None
    pooling_mode: str | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_lasttoken: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    include_prompt: bool = True

    def step(self, where: str) -> Spec:
        """Return the pooling part."""
        modes = [mode for flag, mode in FLAGS.items() if getattr(self, flag)]
        modes = [self.pooling_mode] if self.pooling_mode is not None else modes
        if len(modes) != 1:
            raise SpecError(f"{where} asks for {' and '.join(modes) or 'no'} pooling; one way is supported at a time")
        if modes[0] not in MODES:
            raise SpecError(f"{where} asks for {modes[0]} pooling, which is not supported{suggest(modes[0], MODES)}")
        if not self.include_prompt:
            raise SpecError(
                f"{where} leaves prompts out of the pooling (include_prompt = false), which isn't supported"
            )
        return MODES[modes[0]]

    @property
    def width(self) -> int | None:
        """How wide the rows are."""
        return self.embedding_dimension if self.word_embedding_dimension is None else self.word_embedding_dimension


class DenseConfig(Record):
    """The keys of a dense step's `config.json`."""

    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"

    def steps(self, where: str) -> tuple[Spec, Spec]:
        """Return the affine map and its activation."""
        if self.activation_function not in ACTIVATIONS:
            near = suggest(self.activation_function, ACTIVATIONS)
            raise SpecError(f"{where} has an activation_function that is not known: {self.activation_function}{near}")
        linear = parts.Linear(self.in_features, self.out_features, self.bias)
        return linear, parts.Activate(ACTIVATIONS[self.activation_function])


class LengthConfig(Record):
    """The keys of `sentence_bert_config.json`."""

    max_seq_length: int | None = None
    do_lower_case: bool = False


@dataclass(frozen=True)
class SentenceModules:
    """What a sentence-transformers folder says beyond the model.

    Attributes:
        pooler: rows [B, S, D] to vectors [B, E].
        tensors: the pooler's, by our names; none if it has no dense steps.
        folder, transformer: the folder that says so, and that of the model itself.
        length: the most tokens that a text is cut to, or None.
    """

    pooler: parts.Chain
    tensors: TensorMap
    folder: Path
    transformer: Path
    length: int | None


def read_sentence_modules(folder: Path) -> SentenceModules:
    """Read how a folder pools its model's rows.

    Raises:
        SpecError: a step or a setting that isn't supported: two ways of pooling at once, weighted means, a prompt$
            before every text; it names the file.
        WeightsError: files that are damaged, missing, or outside of the folder; pickled weights.
    """
    (first, model), *others = _modules(folder)
    if first != "Transformer" or not others or others[0][0] != "Pooling":
        raise SpecError(f"{folder / MODULES} should list a Transformer, its pooling, and then any further steps")
    pooling = _config(PoolingConfig, others[0][1], CONFIG)
    steps, width = [pooling.step(str(others[0][1] / CONFIG))], pooling.width
    rows: list[Row] = []
    readers: dict[str, Callable[[], Tensor]] = {}
    for kind, place in others[1:]:
        if kind == "Dense":
            dense, tensors = _config(DenseConfig, place, CONFIG), read_tensors(place)
            if width not in (None, dense.in_features):
                raise SpecError(f"{place / CONFIG} takes {dense.in_features} values, but is given {width}")
            rows.append(Row(f"steps.{len(steps)}.{{w}}", f"{place.name}/linear.{{w}}"))
            readers |= {f"{place.name}/{name}": functools.partial(tensors.__getitem__, name) for name in tensors}
            steps += dense.steps(str(place / CONFIG))
            width = dense.out_features
        elif kind == "Normalize":
            steps.append(parts.Normalise())
        else:
            raise SpecError(f"{folder / MODULES} has a step '{kind[:100]}', which is not supported behind the pooling")
    tensors = Names(rows).to_ours(TensorMap(readers))
    _refuse_prompt(folder)
    return SentenceModules(parts.Chain(tuple(steps)), tensors, folder, model, _length(model))


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Return each step's kind, without the package that it comes from, and its folder."""
    found = []
    for told in strict_json.read_list(member(folder, MODULES)):
        kind, place = (told.get("type"), told.get("path")) if isinstance(told, Mapping) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str):
            raise SpecError(f"{folder / MODULES} should list steps, each with a type and a path")
        package, _, name = kind.rpartition(".")
        if package.partition(".")[0] != "sentence_transformers":
            raise SpecError(
                f"{folder / MODULES} asks to run program code of its own ({kind[:100]}); this is never done"
            )
        found.append((name, member(folder, place) if place else folder))
    if not found:
        raise SpecError(f"{folder / MODULES} lists no steps")
    return found


def _config(kind: type[R], folder: Path, name: str) -> R:
    file = member(folder, name)
    return kind.from_data(strict_json.read(file), str(file))


def _length(model: Path) -> int | None:
    """Return the most tokens of a text; refuse lower-casing, which is a matter of the tokenizer elsewhere."""
    if not (model / LENGTH).exists():
        return None
    said = _config(LengthConfig, model, LENGTH)
    if said.do_lower_case:
        raise SpecError(
            f"{model / LENGTH} has do_lower_case = true, which is not supported; lower-case the texts first"
        )
    return said.max_seq_length


def _refuse_prompt(folder: Path) -> None:
    """Refuse a folder that puts words before every text."""
    if not (folder / PROMPTS).exists():
        return
    name = strict_json.read(member(folder, PROMPTS)).get("default_prompt_name")
    if name is not None:
        raise SpecError(
            f"{folder / PROMPTS} puts the prompt '{str(name)[:100]}' before every text, which isn't supported"
        )
