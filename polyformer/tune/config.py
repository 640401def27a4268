"""PEFT's `adapter_config.json`, read so that nothing in it is ignored silently, and written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyformer.errors import SpecError, suggest
from polyformer.spec import Record
from polyformer.weights import strict_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

KINDS = {
    "LORA": "LoRA",
    "IA3": "IA³",
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
}

REMARKS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_ia3_weights",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "megatron_core",
        "peft_type",
        "peft_version",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    )
)
"""Keys that say how an adapter was made, or what its tensors show anyway."""

READ = frozenset(
    (
        "alpha_pattern",
        "bias",
        "encoder_hidden_size",
        "feedforward_modules",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "num_virtual_tokens",
        "prefix_projection",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "token_dim",
        "use_dora",
        "use_rslora",
    )
)

CHANGING_THE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Ways of beginning after which the base's own matrices are others."""


class PeftConfig(Record):
    """What an adapter's configuration says that its tensors don't.

    Attributes:
        kind: PEFT's word for the method.
        rank, alpha: of LoRA; `ranks` and `alphas` for some modules, as pairs of a pattern and a number.
        root: rsLoRA's scale.
        directed: DoRA.
        dropout: LoRA's.
        tokens: how many there are of a prefix or a prompt.
        inputs: IA³'s modules whose inputs have factors, as a pattern or ends of names.
    """

    kind: str
    rank: int = 8
    alpha: float = 8.0
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    root: bool = False
    directed: bool = False
    dropout: float = 0.0
    tokens: int = 0
    inputs: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """Return a module's rank."""
        return next((rank for pattern, rank in self.ranks if _means(pattern, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """Return a module's alpha."""
        return next((alpha for pattern, alpha in self.alphas if _means(pattern, module)), self.alpha)


def read_config(path: Path) -> PeftConfig:
    """Read an `adapter_config.json`.

    Raises:
        WeightsError: a file that can't be read.
        SpecError: a method or a setting that isn't understood; it names the key.
    """
    data = strict_json.read(path)
    kind = data.get("peft_type")
    if kind not in KINDS:
        raise SpecError(f"{path} has peft_type = {kind!r}; read are {', '.join(KINDS)}")
    for key, value in data.items():
        if key not in READ and key not in REMARKS and value not in (None, False, "", [], {}):
            near = suggest(key, READ) if "did you" in suggest(key, READ) else ""
            raise SpecError(f"{path} has {key} = {value!r}, which is not understood{near}")
    if data.get("bias", "none") != "none":
        raise SpecError(f"{path} has bias = {data['bias']!r}: biases that were trained are not read; only 'none' is")
    begun = data.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGING_THE_BASE):
        told = f"{path} has init_lora_weights = {begun!r}"
        raise SpecError(f"{told}, which changed the base's own matrices; convert it to plain LoRA first")
    values: dict[str, Any] = {
        "kind": kind,
        "rank": data.get("r"),
        "alpha": data.get("lora_alpha"),
        "ranks": _pairs(data.get("rank_pattern")),
        "alphas": _pairs(data.get("alpha_pattern")),
        "root": data.get("use_rslora"),
        "directed": data.get("use_dora"),
        "dropout": data.get("lora_dropout"),
        "tokens": data.get("num_virtual_tokens"),
        "inputs": _listed(data.get("feedforward_modules")),
    }
    return PeftConfig.from_data({key: value for key, value in values.items() if value is not None}, str(path))


def write_config(path: Path, data: Mapping[str, Any]) -> None:
    """Write an `adapter_config.json`."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def is_among(module: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether ends of names, or an expression for whole ones, mean a module."""
    return any(module == one or module.endswith(f".{one}") or _matches(one, module) for one in patterns)


def _means(pattern: str, module: str) -> bool:
    return _matches(rf"(.*\.)?({pattern})$", module)


def _matches(pattern: str, module: str) -> bool:
    """Tell whether an expression matches a name; one that could take long, by mistake or malice, is refused."""
    repeats = len(re.findall(r"[*+{]", pattern))
    if repeats > 4 or len(pattern) > 400 or re.search(r"\)[*+{]", pattern):
        raise SpecError(f"'{pattern[:60]}' in {CONFIG} is too intricate a pattern; write names or their ends")
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error:
        raise SpecError(f"'{pattern[:60]}' in {CONFIG} is no pattern") from None


def _pairs(table: Any) -> Any:
    return [[key, value] for key, value in table.items()] if isinstance(table, Mapping) else table


def _listed(names: Any) -> Any:
    return [names] if isinstance(names, str) else names
