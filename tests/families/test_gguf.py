"""From GGUF to the reference: its configuration and every tensor of it, bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError, WeightsError
from polyformer.families.gguf import ARCHITECTURES, OnePlus, RotaryPairs, gguf_config, gguf_names
from polyformer.weights.gguf import GgufFile, read_gguf
from polyformer.weights.names import Names
from tests.weights.gguf_writer import gguf, plain, smollm2

HEADS, GROUPS = 4, 2
ROTARY = {
    "context_length": 64,
    "embedding_length": 32,
    "block_count": 2,
    "feed_forward_length": 24,
    "attention.head_count": HEADS,
    "attention.head_count_kv": GROUPS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50000.0,
    "vocab_size": 11,
}
KEYS: dict[str, dict[str, Any]] = {
    "llama": ROTARY | {"rope.dimension_count": 8},
    "qwen2": ROTARY,
    "qwen3": ROTARY | {"attention.key_length": 128, "attention.value_length": 128},
    "gemma2": {key: value for key, value in ROTARY.items() if key not in ("vocab_size", "rope.freq_base")}
    | {
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention.sliding_window": 16,
    },
    "gpt2": {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 128,
        "attention.head_count": HEADS,
        "attention.layer_norm_epsilon": 1e-5,
    },
}
TOKENIZER = {
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(11)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
}
# What llama.cpp's converters do with a name of the reference, step by step.
RENAMED = {
    "llama": [
        ("^model.layers.", "blk."),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.(.)_proj", r"attn_\1"),
        ("self_attn.(.)_norm", r"attn_\1_norm"),
        ("mlp.(.*)_proj", r"ffn_\1"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("^model.embed_tokens", "token_embd"),
        ("^model.norm", "output_norm"),
        ("^lm_head", "output"),
    ],
    "gpt2": [
        ("^transformer.h.", "blk."),
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("ln_1", "attn_norm"),
        ("ln_2", "ffn_norm"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
        ("^transformer.wte", "token_embd"),
        ("^transformer.wpe", "position_embd"),
        ("^transformer.ln_f", "output_norm"),
        ("^lm_head", "output"),
    ],
}
RENAMED["gemma2"] = [
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    *RENAMED["llama"],
]


def converted(architecture: str, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """What llama.cpp's converters make of one tensor of the reference's folder."""
    for pattern, replacement in RENAMED.get(architecture, RENAMED["llama"]):
        name = re.sub(pattern, replacement, name)
    rotated = re.search(r"attn_([qk])\.", name) if architecture == "llama" else None
    if rotated:
        heads = HEADS if rotated[1] == "q" else GROUPS
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    if architecture == "gemma2" and name.endswith("norm.weight"):
        tensor = tensor + 1
    if architecture == "gpt2" and tensor.ndim == 2 and name.startswith("blk."):
        tensor = tensor.T
    return name, tensor


def reference(architecture: str, config: dict[str, Any]) -> Any:
    """A random model of the reference library; every tensor is far from its start."""
    transformers = pytest.importorskip("transformers")
    made = transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    model = getattr(transformers, config["architectures"][0])(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def opened(path: Path, architecture: str, changes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GgufFile:
    """Write and open a file; a change to None leaves a key out."""
    keys = {f"{architecture}.{key}": value for key, value in KEYS.get(architecture, {}).items()}
    metadata = {"general.architecture": architecture, **keys, **TOKENIZER, **changes}
    kept = {key: value for key, value in metadata.items() if value is not None}
    (path / "x.gguf").write_bytes(gguf(kept, {name: plain(tensor) for name, tensor in tensors.items()}))
    return read_gguf(path / "x.gguf")


def empty(
    path: Path, architecture: str, changes: Mapping[str, Any] | None = None, more: Mapping[str, Tensor] | None = None
) -> GgufFile:
    """A file with keys and, of the tensors, only the embedding and those given."""
    return opened(path, architecture, changes or {}, {"token_embd.weight": torch.zeros(11, 32), **(more or {})})


def whole(path: Path, architecture: str, untied: bool = False, **changes: Any) -> tuple[GgufFile, Any, dict[str, Any]]:
    """A file with a random model, the model, and its tensors as the reference saves them."""
    more = {"output.weight": torch.zeros(11, 32)} if untied else {}
    config = gguf_config(empty(path, architecture, changes, more))
    model = reference(architecture, config)
    saved = {name: tensor for name, tensor in model.state_dict().items() if untied or name != "lm_head.weight"}
    tensors = dict(converted(architecture, name, tensor) for name, tensor in saved.items())
    return opened(path, architecture, changes, tensors), model, saved


def test_the_list_is_tested() -> None:
    assert set(KEYS) == set(ARCHITECTURES)


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", KEYS)
def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, architecture: str, untied: bool) -> None:
    file, _, saved = whole(tmp_path, architecture, untied)
    names = gguf_names(gguf_config(file))
    found = names.to_ours(file.tensors)
    assert set(found) == set(saved)
    if architecture == "gemma2":  # adding 1 has rounded; what was not rounded is tested below
        for name in saved:
            torch.testing.assert_close(found[name], saved[name], rtol=0, atol=2e-7)
    else:
        assert all(found[name].equal(tensor) for name, tensor in saved.items())
    back = names.to_disk(found)
    assert set(back) == set(file.tensors)
    assert all(back[name].equal(tensor) for name, tensor in file.tensors.items())


@pytest.mark.parametrize("architecture", KEYS)
def test_the_reference_reads_the_same(tmp_path: Path, architecture: str) -> None:
    """The reference's own reader of GGUF gives the same: our files are as the ecosystem writes them."""
    pytest.importorskip("gguf")
    file, model, saved = whole(tmp_path, architecture, untied=architecture != "gemma2")
    config = gguf_config(file)
    found = gguf_names(config).to_ours(file.tensors)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    theirs = cast(Any, load_gguf_checkpoint)(str(file.path), return_tensors=True, model_to_load=model)
    assert set(theirs["tensors"]) == set(saved)
    assert all(tensor.equal(found[name]) for name, tensor in theirs["tensors"].items())
    told = theirs["config"] | {"rope_theta": None, "_model_name_or_path": None}
    told |= theirs["tokenizer_config"]
    both = told.keys() & config.keys()
    assert {"vocab_size", "model_type", "tie_word_embeddings", "bos_token_id", "eos_token_id"} <= both
    for key in both:
        assert config[key] == pytest.approx(told[key]), key


EXPECTED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False, "head_dim": 8, "hidden_act": "silu"},
    "qwen2": {"hidden_act": "silu"},
    "qwen3": {"attention_bias": False, "head_dim": 128, "hidden_act": "silu"},
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": 16,
    },
}
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "num_key_value_heads": GROUPS,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
}
OURS_AND_THEIRS = {
    "vocab_size": 11,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_the_configuration(tmp_path: Path, architecture: str) -> None:
    wanted = {"architectures": [HEAD[architecture]], "model_type": architecture, **OURS_AND_THEIRS}
    assert gguf_config(empty(tmp_path, architecture)) == wanted | COMMON | EXPECTED[architecture]


def test_the_configuration_of_gpt2(tmp_path: Path) -> None:
    assert gguf_config(empty(tmp_path, "gpt2")) == {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **OURS_AND_THEIRS,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_embd": 32,
        "n_head": HEADS,
        "n_inner": 128,
        "n_layer": 2,
        "n_positions": 64,
    }


def test_what_the_tensors_say(tmp_path: Path) -> None:
    one = torch.zeros(32)
    more = {"output.weight": torch.zeros(11, 32), "blk.0.attn_q.bias": one, "blk.0.ffn_up.bias": one}
    config = gguf_config(empty(tmp_path, "llama", more=more))
    assert not config["tie_word_embeddings"]
    assert config["attention_bias"]
    assert config["mlp_bias"]
    assert gguf_config(empty(tmp_path, "qwen3", more=more))["attention_bias"]


def test_several_tokens_may_end_a_text(tmp_path: Path) -> None:
    ends = {f"tokenizer.ggml.{name}_token_id": i for name, i in (("eos", 2), ("eot", 7), ("eom", 2))}
    assert gguf_config(empty(tmp_path, "llama", ends))["eos_token_id"] == [2, 7]
    none: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": None for name in ("bos", "eos", "padding")}
    config = gguf_config(empty(tmp_path, "llama", none))
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
    with pytest.raises(SpecError, match=r"tokenizer\.ggml\.bos_token_id should be a whole number, not 'x'"):
        gguf_config(empty(tmp_path, "llama", {"tokenizer.ggml.bos_token_id": "x"}))


def test_the_largest_gemma_divides_by_another_root(tmp_path: Path) -> None:
    config = gguf_config(empty(tmp_path, "gemma2", {"gemma2.block_count": 46}))
    assert config["query_pre_attn_scalar"] == 32 // HEADS


# ---------------------------------------------------------------------------------------------------------------
# Positions

YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "linear unsaid": ({"rope.scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
    "linear of old": ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "linear by 1": ({"rope.scaling.factor": 1.0}, {"rope_type": "default"}),
    "yarn": (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "yarn in full": (
        YARN
        | {f"rope.scaling.yarn_{key}": value for key, value in (("attn_factor", 1.2), ("beta_fast", 30.0))}
        | {"rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.finetuned": True},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 1.2,
            "beta_fast": 30.0,
            "beta_slow": 2.0,
        },
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_scaled_positions(tmp_path: Path, case: str) -> None:
    keys, wanted = SCALINGS[case]
    config = gguf_config(empty(tmp_path, "llama", {f"llama.{key}": value for key, value in keys.items()}))
    assert config["rope_parameters"] == {"rope_theta": 50000.0, **wanted}


def llama3(width: int, theta: float, factor: float) -> tuple[dict[str, Any], Tensor]:
    """The reference's scaling of LLaMA 3.1, and the table that llama.cpp's converter makes of it."""
    rope = {
        "rope_theta": theta,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    table = []
    for place in range(0, width, 2):
        wave = 2 * math.pi * theta ** (place / width)
        smooth = (8192 / wave - 1) / 3
        between = 1 / ((1 - smooth) / factor + smooth)
        table.append(1.0 if wave < 8192 / 4 else factor if wave > 8192 else between)
    return rope, torch.tensor(table)


WIDTHS = pytest.mark.parametrize(
    ("width", "theta", "factor"), [(128, 500000.0, 8.0), (64, 500000.0, 32.0), (8, 1e6, 8.0)]
)


@WIDTHS
def test_the_table_is_the_references(width: int, theta: float, factor: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, table = llama3(width, theta, factor)
    sizes = {"hidden_size": 4 * width, "num_attention_heads": 4, "max_position_embeddings": 131072}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**sizes, rope_parameters=rope), "cpu")
    torch.testing.assert_close(theta ** -(torch.arange(0, width, 2) / width) / scaled, table, rtol=1e-5, atol=0)


@WIDTHS
def test_the_table_of_llama_3(tmp_path: Path, width: int, theta: float, factor: float) -> None:
    rope, table = llama3(width, theta, factor)
    keys = {"llama.rope.freq_base": theta, "llama.embedding_length": 4 * width, "llama.rope.dimension_count": width}
    tensors = {"token_embd.weight": torch.zeros(11, 4 * width), "rope_freqs.weight": table}
    file = opened(tmp_path, "llama", keys, tensors)
    config = gguf_config(file)
    assert config["rope_parameters"] == rope
    names = gguf_names(config)
    assert set(names.to_ours(file.tensors)) == {"model.embed_tokens.weight"}
    file = opened(tmp_path, "llama", keys, tensors | {"rope_freqs.weight": table * torch.linspace(0.9, 1, width // 2)})
    with pytest.raises(WeightsError, match=r"'rope_freqs.weight' of x\.gguf is not what is computed"):
        gguf_names(gguf_config(file)).to_ours(file.tensors)


def test_a_table_that_changes_nothing(tmp_path: Path) -> None:
    file = empty(tmp_path, "llama", more={"rope_freqs.weight": torch.ones(4)})
    config = gguf_config(file)
    assert config["rope_parameters"]["rope_type"] == "default"
    assert set(gguf_names(config).to_ours(file.tensors)) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_a_table_in_another_architecture(tmp_path: Path, architecture: str) -> None:
    file = empty(tmp_path, architecture, more={"rope_freqs.weight": torch.full((4,), 8.0)})
    with pytest.raises(WeightsError, match=r"'rope_freqs.weight' of x\.gguf"):
        gguf_names(gguf_config(file)).to_ours(file.tensors)


# ---------------------------------------------------------------------------------------------------------------
# What is refused

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": ("llamma", {}, r"of the architecture 'llamma', which is not known here \(did you mean 'llama'\?\)"),
    "far off": ("rwkv7", {}, r"of the architecture 'rwkv7', which is not known here \(known: gemma2, gpt2"),
    "no name": ("llama", {"general.architecture": None}, "of the architecture None"),
    "a list": ("llama", {"general.architecture": ["llama"]}, "of the architecture an array"),
    "an adapter": ("llama", {"general.type": "adapter"}, "holds no model but something of the type 'adapter'"),
    "a key less": ("llama", {"llama.block_count": None}, r"lacks the key 'llama\.block_count'"),
    "an eps less": ("gpt2", {"gpt2.attention.layer_norm_epsilon": None}, "lacks the key 'gpt2.attention.layer_norm_ep"),
    "a key more": ("llama", {"llama.logit_scale": 2.0}, r"has the key 'llama\.logit_scale', which is not understood"),
    "experts": ("llama", {"llama.expert_count": 8}, r"llama\.expert_count = 8; only 0 is supported"),
    "a size a word": ("llama", {"llama.block_count": "2"}, r"block_count should be one number, not '2'"),
    "sizes by layer": (
        "llama",
        {"llama.attention.head_count": [4, 4]},
        "head_count should be one number, not an array",
    ),
    "no heads": ("llama", {"llama.attention.head_count": 0}, r"head_count should be a whole number from 1 on, not 0"),
    "half a layer": ("llama", {"llama.block_count": 1.5}, r"block_count should be a whole number from 1 on, not 1\.5"),
    "not a number": ("llama", {"llama.rope.freq_base": float("nan")}, "rope.freq_base should be one number, not nan"),
    "vocabulary": ("llama", {"llama.vocab_size": 12}, r"llama\.vocab_size = 12; only 11 is supported"),
    "values": ("llama", {"llama.attention.value_length": 4}, r"value_length = 4; only 8 is supported"),
    "half rotated": ("llama", {"llama.rope.dimension_count": 4}, r"rope\.dimension_count = 4; only 8 is supported"),
    "wide heads": ("qwen2", {"qwen2.attention.key_length": 16}, r"key_length = 16; only 8 is supported"),
    "scaling": ("llama", {"llama.rope.scaling.type": "longrope"}, "only 'linear' or 'none' or 'yarn' is supported"),
    "layout": ("llama", {"llama.tensor_data_layout": "x"}, "tensor_data_layout = 'x'; only 'Meta AI original pth'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(tmp_path: Path, case: str) -> None:
    architecture, changes, message = REFUSED[case]
    if architecture not in KEYS:
        changes = {f"{architecture}.{key}": value for key, value in KEYS["llama"].items()}
    with pytest.raises(SpecError, match=f"x.gguf.*{message}"):
        gguf_config(empty(tmp_path, architecture, changes))


def test_tables_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"x.gguf has no matrix token_embd\.weight"):
        gguf_config(opened(tmp_path, "llama", {}, {}))
    with pytest.raises(SpecError, match=r"rope_freqs\.weight should have half of a head's width, not the shape \[5\]"):
        gguf_config(empty(tmp_path, "llama", more={"rope_freqs.weight": torch.ones(5)}))
    keys = {f"llama.{key}": value for key, value in YARN.items()}
    with pytest.raises(SpecError, match=r"scales its positions both by yarn and by rope_freqs\.weight"):
        gguf_config(empty(tmp_path, "llama", keys, {"rope_freqs.weight": torch.full((4,), 2.0)}))


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    file = empty(tmp_path, "llama", more={"blk.0.attn_q_norm.bias.x": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"'blk.0.attn_q_norm.bias.x' of x\.gguf belongs to no part"):
        gguf_names(gguf_config(file)).to_ours(file.tensors)


# ---------------------------------------------------------------------------------------------------------------
# Operations


def test_rotary_pairs() -> None:
    disk = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])  # pairs (0, 1) and (2, 3) of each of two heads
    (ours,) = RotaryPairs(2).to_ours((disk,))
    assert ours.tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    assert RotaryPairs(2).to_disk((ours,))[0].equal(disk)
    matrix = torch.randn(8, 3)
    assert RotaryPairs(2).to_disk(RotaryPairs(2).to_ours((matrix,)))[0].equal(matrix)
    with pytest.raises(WeightsError, match=r"shape \[6, 2\] has no rows for 2 rotated heads"):
        RotaryPairs(2).to_ours((torch.ones(6, 2),))


def test_one_plus_comes_back_bit_for_bit() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    weights = every[(every.abs() > 2**-16) & (every.abs() < 2**8)]  # of smaller ones, 1 + w keeps fewer bits
    assert len(weights) > 6000
    (back,) = OnePlus().to_ours((1 + weights,))
    assert back.equal(weights)
    assert OnePlus().to_disk((back,))[0].equal(1 + weights)
    (single,) = OnePlus().to_ours((torch.tensor([0.251]).bfloat16(),))
    assert single.tolist() == [torch.tensor(0.251).bfloat16().item() - 1]


def test_one_is_taken_away_before_anything_is_rounded(tmp_path: Path) -> None:
    weights = (torch.randn(32) * 0.01).bfloat16().float()
    tensors = {"token_embd.weight": torch.zeros(11, 32), "output_norm.weight": 1 + weights}
    opened(tmp_path, "gemma2", {}, tensors)
    file = read_gguf(tmp_path / "x.gguf", torch.bfloat16)
    found = gguf_names(gguf_config(file)).to_ours(file.tensors)["model.norm.weight"]
    assert found.bfloat16().float().equal(weights)


# ---------------------------------------------------------------------------------------------------------------
# A real file


def test_a_real_configuration() -> None:
    file = read_gguf(smollm2())
    config = gguf_config(file)
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    assert config.items() >= (sizes | {"model_type": "llama", "vocab_size": 49152, "rms_norm_eps": 1e-5}).items()
    assert config["tie_word_embeddings"]
    names: Names = gguf_names(config)
    found = names.to_ours(file.tensors)
    assert found["model.layers.29.self_attn.k_proj.weight"].shape == (192, 576)
    transformers = pytest.importorskip("transformers")
    made = transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    with torch.device("meta"):
        model = cast(Any, transformers.LlamaForCausalLM(made))
    assert set(found) == set(model.state_dict()) - {"lm_head.weight"}
