"""From a GGUF file to what a folder of the reference library would hold: the `config.json`, and the tensors' names.

llama.cpp names keys and tensors in its own way and changes three layouts: LLaMA's rotated pairs stand side by side,
Gemma's norms hold 1 + weight, GPT-2's projections are transposed. All of it is undone here, so that the family
itself need not know. Source: the converters in llama.cpp (`conversion/`), and its readers for the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyformer.errors import SpecError, WeightsError, suggest
from polyformer.weights.gguf import GgufFile
from polyformer.weights.names import Names, Operation, Row, Tensors, Transpose

FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class RotaryPairs(Operation):
    """Rows of a projection to rotated heads: on disk the two of a pair are neighbours (Su et al. 2021), in ours they
    are half a head apart."""

    heads: int

    def to_ours(self, tensors: Tensors) -> Tensors:
        return tuple(self._exchanged(tensor, (self.heads, -1, 2)) for tensor in tensors)

    def to_disk(self, tensors: Tensors) -> Tensors:
        return tuple(self._exchanged(tensor, (self.heads, 2, -1)) for tensor in tensors)

    def _exchanged(self, tensor: Tensor, cut: tuple[int, int, int]) -> Tensor:
        if not tensor.ndim or tensor.shape[0] % (2 * self.heads):
            raise WeightsError(f"a tensor of shape {list(tensor.shape)} has no rows for {self.heads} rotated heads")
        return tensor.reshape(*cut, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class OnePlus(Operation):
    """The disk holds 1 + ours, in float32. Whatever was added without rounding comes back bit for bit."""

    def to_ours(self, tensors: Tensors) -> Tensors:
        return tuple(tensor.float() - 1 for tensor in tensors)

    def to_disk(self, tensors: Tensors) -> Tensors:
        return tuple(tensor.float() + 1 for tensor in tensors)


class _Keys:
    """The keys of one architecture, of which each must be used."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self.file, self.prefix = file, prefix
        self.unread = {key for key in file.metadata if key.startswith(prefix)}

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number; `default` where there is none, or without a default an error."""
        self.unread.discard(self.prefix + key)
        value = self.file.metadata.get(self.prefix + key, default)
        if value is None:
            raise SpecError(f"{self.file.path} lacks the key '{self.prefix}{key}', without which the model is unknown")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SpecError(f"{self.file.path}: {self.prefix}{key} should be one number, not {_shown(value)}")
        return _decimal(value) if isinstance(value, float) else value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 1 on; `default` where there is none, or without a default an error."""
        value = self.number(key, default)
        if not isinstance(value, int) or value < 1:
            raise SpecError(f"{self.file.path}: {self.prefix}{key} should be a whole number from 1 on, not {value}")
        return value

    def expect(self, key: str, *expected: Any) -> None:
        """Raise unless a key is absent or has one of the values that are understood."""
        self.unread.discard(self.prefix + key)
        value = self.file.metadata.get(self.prefix + key, expected[0])
        if value not in expected:
            wanted = " or ".join(map(repr, expected))
            raise SpecError(f"{self.file.path}: {self.prefix}{key} = {_shown(value)}; only {wanted} is supported here")

    def finish(self) -> None:
        """Raise if a key was not used."""
        if self.unread:
            raise SpecError(f"{self.file.path} has the key '{min(self.unread)[:100]}', which is not understood")


Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How GGUF writes one kind of model.

    `sizes` pairs its keys with the reference's, `implied` are keys of the reference that have one value only,
    `further` reads all other keys, `rows` gives the tensors.
    """

    head: str
    sizes: Mapping[str, str]
    implied: Mapping[str, Any]
    further: Callable[[_Keys, Config], None]
    rows: Callable[[Mapping[str, Any]], list[Row]]


def gguf_config(file: GgufFile) -> Config:
    """Return the content of a `config.json` for the model in a GGUF file.

    Raises:
        SpecError: an architecture that is not known (the nearest is named), an adapter or projector instead of a
            model, a key that is missing, not understood or has an unsupported value; a vocabulary of unknown size.
    """
    metadata, path = file.metadata, file.path
    name = metadata.get("general.architecture")
    if metadata.get("general.type", "model") != "model":
        raise SpecError(f"{path} holds no model but something of the type {_shown(metadata['general.type'])}")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        near = suggest(name, ARCHITECTURES) if isinstance(name, str) else ""
        raise SpecError(f"{path} holds a model of the architecture {_shown(name)}, which is not known here{near}")
    if len(file.types.get("token_embd.weight", ("", ()))[1]) != 2:
        raise SpecError(f"{path} has no matrix token_embd.weight, so that the size of its vocabulary is unknown")
    known, keys = ARCHITECTURES[name], _Keys(file, f"{name}.")
    config: Config = {"architectures": [known.head], "model_type": name, **known.implied}
    config |= {theirs: keys.size(key) for key, theirs in known.sizes.items()}
    config["vocab_size"] = file.types["token_embd.weight"][1][0]
    config["tie_word_embeddings"] = "output.weight" not in file.types
    keys.expect("vocab_size", config["vocab_size"])
    for key, value in _NEUTRAL.items():
        keys.expect(key, value)
    known.further(keys, config)
    keys.finish()
    return config | _special_tokens(file)


def gguf_names(config: Mapping[str, Any]) -> Names:
    """Return the table between the reference's names on disk and those in a GGUF file.

    Args:
        config: what `gguf_config` returned.
    """
    rows = ARCHITECTURES[config["model_type"]].rows(config)
    if "rope_parameters" not in config:
        return Names(rows)
    factors = _frequency_factors(config)

    def as_configured(table: Tensor) -> bool:
        return table.shape == factors.shape and torch.allclose(table.float(), factors, rtol=1e-4)

    return Names(rows, computed={FREQUENCIES: as_configured})


def _special_tokens(file: GgufFile) -> Config:
    """The ids that a `config.json` names; several tokens may end a text (of a document, of a turn, of a message)."""
    said = {}
    for name in ("bos", "eos", "eot", "eom", "padding"):
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and type(value) is not int:
            raise SpecError(
                f"{file.path}: tokenizer.ggml.{name}_token_id should be a whole number, not {_shown(value)}"
            )
        said[name] = value
    ends = list(dict.fromkeys(said[name] for name in ("eos", "eot", "eom") if said[name] is not None))
    eos = ends if len(ends) > 1 else next(iter(ends), None)
    return {"bos_token_id": said["bos"], "eos_token_id": eos, "pad_token_id": said["padding"]}


def _decimal(value: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-05 rather than 9.999999747378752e-06."""
    shorter = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((short for short in shorter if torch.tensor(short, dtype=torch.float32).item() == value), value)


def _shown(value: object) -> str:
    return "an array" if isinstance(value, tuple) else repr(value)[:60]


# ---------------------------------------------------------------------------------------------------------------
# What several architectures share

_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "pooling_type": 0,
    "tensor_data_layout": "Meta AI original pth",
}
"""Keys of any architecture, with the value that says nothing special."""

_SIZES = {
    "attention.head_count": "num_attention_heads",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
}

_GPT2_SIZES = {
    "attention.head_count": "n_head",
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
}


def _rotary(keys: _Keys, config: Config) -> None:
    """Norms, heads and their rotation, as in LLaMA and its relatives."""
    config["rms_norm_eps"] = keys.number("attention.layer_norm_rms_epsilon")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = keys.size("attention.head_count_kv", heads)
    config["head_dim"] = width = keys.size("attention.key_length", _width(config))
    keys.expect("attention.value_length", width)
    keys.expect("rope.dimension_count", width)
    config["rope_parameters"] = {"rope_theta": keys.number("rope.freq_base", 10000.0), **_scaling(keys, config)}
    if FREQUENCIES in keys.file.types:
        _llama3(keys, config)


def _scaling(keys: _Keys, config: Config) -> Config:
    keys.unread.discard(f"{keys.prefix}rope.scaling.finetuned")  # of no consequence: how the model came to be
    keys.expect("rope.scaling.attn_factor", 1.0)
    keys.expect("rope.scaling.type", "linear", "none", "yarn")
    kind = keys.file.metadata.get(f"{keys.prefix}rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    length = keys.size("rope.scaling.original_context_length", config["max_position_embeddings"])
    if kind == "none" or factor in (0, 1):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    keys.expect("rope.scaling.yarn_ext_factor", 1.0)
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    for key, theirs in (("attn_factor", "attention_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
        if f"{keys.prefix}rope.scaling.yarn_{key}" in keys.file.metadata:
            found[theirs] = keys.number(f"rope.scaling.yarn_{key}")
    return found


def _llama3(keys: _Keys, config: Config) -> None:
    """Name the scaling that a table of frequency factors comes from: that of LLaMA 3.1, or none."""
    if keys.file.types[FREQUENCIES][1] != (config["head_dim"] // 2,):
        shape = list(keys.file.types[FREQUENCIES][1])
        raise SpecError(f"{keys.file.path}: {FREQUENCIES} should have half of a head's width, not the shape {shape}")
    factor = _decimal(float(keys.file.tensors[FREQUENCIES].max()))
    if factor == 1:
        return
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        raise SpecError(f"{keys.file.path} scales its positions both by {rope['rope_type']} and by {FREQUENCIES}")
    rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192  # what converters assume, and what all published models have


def _width(config: Mapping[str, Any]) -> int:
    """The width of a head where nothing else is said."""
    width: int = config["hidden_size"] // config["num_attention_heads"]
    return width


def _frequency_factors(config: Mapping[str, Any]) -> Tensor:
    """What each frequency is divided by (LLaMA 3.1): 1 for waves short beside the original length, `factor` for
    long ones, and a blend for those between."""
    rope, width = config["rope_parameters"], config.get("head_dim", _width(config))
    if rope["rope_type"] != "llama3":
        return torch.ones(width // 2)
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] / waves
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - share) / rope["factor"] + share)
    return factors.float()


# ---------------------------------------------------------------------------------------------------------------
# The architectures


def _llama(keys: _Keys, config: Config) -> None:
    _rotary(keys, config)
    config["attention_bias"] = "blk.0.attn_q.bias" in keys.file.types
    config["mlp_bias"] = "blk.0.ffn_up.bias" in keys.file.types


def _qwen2(keys: _Keys, config: Config) -> None:
    _rotary(keys, config)
    keys.expect("attention.key_length", _width(config))
    del config["head_dim"]


def _qwen3(keys: _Keys, config: Config) -> None:
    _rotary(keys, config)
    config["attention_bias"] = "blk.0.attn_q.bias" in keys.file.types


def _gemma2(keys: _Keys, config: Config) -> None:
    _rotary(keys, config)
    for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        config[key] = keys.number(key, default)
    config["sliding_window"] = keys.size("attention.sliding_window", 4096)
    # The file does not say what attention is scaled by; llama.cpp knows the one published model that is different.
    is_27b = config["num_hidden_layers"] == 46
    config["query_pre_attn_scalar"] = _width(config) if is_27b else config["head_dim"]


def _gpt2(keys: _Keys, config: Config) -> None:
    config["layer_norm_epsilon"] = keys.number("attention.layer_norm_epsilon")
    keys.expect("attention.head_count_kv", config["n_head"])


# ---------------------------------------------------------------------------------------------------------------
# Their tensors: the reference's names and GGUF's

_OUTER = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_FINAL_NORM = {"model.norm": "output_norm"}
_ATTENTION = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
_ROTATED = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
_FEED_FORWARD = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QUERY_KEY_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA2_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GPT2_TURNED = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def _outer(names: Mapping[str, str], *operations: Operation) -> list[Row]:
    return [Row(f"{theirs}.{{w}}", f"{gguf}.{{w}}", *operations) for theirs, gguf in names.items()]


def _inner(names: Mapping[str, str], *operations: Operation) -> list[Row]:
    layers, blocks = "model.layers.{i}", "blk.{i}"
    return _outer({f"{layers}.{theirs}": f"{blocks}.{gguf}" for theirs, gguf in names.items()}, *operations)


def _llama_rows(config: Mapping[str, Any]) -> list[Row]:
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    rotated = zip(_ROTATED.items(), heads, strict=True)
    return [
        *_outer(_OUTER | _FINAL_NORM),
        *_inner(_ATTENTION | _FEED_FORWARD | _NORMS),
        *(row for item, count in rotated for row in _inner(dict([item]), RotaryPairs(count))),
    ]


def _qwen_rows(config: Mapping[str, Any]) -> list[Row]:
    return [
        *_outer(_OUTER | _FINAL_NORM),
        *_inner(_ATTENTION | _ROTATED | _FEED_FORWARD | _NORMS | _QUERY_KEY_NORMS),
    ]


def _gemma2_rows(config: Mapping[str, Any]) -> list[Row]:
    return [
        *_outer(_OUTER),
        *_outer(_FINAL_NORM, OnePlus()),
        *_inner(_ATTENTION | _ROTATED | _FEED_FORWARD),
        *_inner(_GEMMA2_NORMS, OnePlus()),
    ]


def _gpt2_rows(config: Mapping[str, Any]) -> list[Row]:
    outer = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    inner = {f"h.{{i}}.{theirs}": f"blk.{{i}}.{gguf}" for theirs, gguf in _GPT2_TURNED.items()}
    norms = {"h.{i}.ln_1": "blk.{i}.attn_norm", "h.{i}.ln_2": "blk.{i}.ffn_norm"}
    return [
        *_outer({f"transformer.{theirs}": gguf for theirs, gguf in (outer | norms).items()}),
        *_outer({f"transformer.{theirs}": gguf for theirs, gguf in inner.items()}, Transpose()),
        *_outer({"lm_head": "output"}),
    ]


_SILU, _GELU = {"hidden_act": "silu"}, {"hidden_activation": "gelu_pytorch_tanh"}

ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma2": Architecture("Gemma2ForCausalLM", _SIZES, _GELU, _gemma2, _gemma2_rows),
    "gpt2": Architecture("GPT2LMHeadModel", _GPT2_SIZES, {"activation_function": "gelu_new"}, _gpt2, _gpt2_rows),
    "llama": Architecture("LlamaForCausalLM", _SIZES, _SILU, _llama, _llama_rows),
    "qwen2": Architecture("Qwen2ForCausalLM", _SIZES, _SILU, _qwen2, _qwen_rows),
    "qwen3": Architecture("Qwen3ForCausalLM", _SIZES, _SILU, _qwen3, _qwen_rows),
}
"""The architectures by their names in GGUF, which are the reference's model types too."""
