"""Decoders beyond the parity suite: long texts, older folders, published configurations, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polyformer as pf
from polyformer.errors import SpecError, WeightsError
from polyformer.families import read_family
from polyformer.families.decoder import Decoder
from polyformer.families.falcon import Falcon
from polyformer.families.gemma2 import Gemma2
from polyformer.families.gpt2 import GPT2
from polyformer.families.llama import Llama
from polyformer.families.mixtral import Mixtral
from polyformer.families.qwen_moe import Qwen2Moe
from polyformer.parts import Experts, Linear, Memory, RMSNorm, TokenEmbedding, routing_loss, routing_trace
from polyformer.parts.flow import GrowingCache
from polyformer.parts.model import parameters_of
from polyformer.spec import walk
from polyformer.weights.files import SINGLE
from tests.families.cases import CASES, Case
from tests.families.cases import decoders as sizes
from tests.families.parity import assert_same, load, mine, real, reference, theirs, transformers
from tests.families.published import PUBLISHED

Tensors = dict[str, Tensor]
ALL = ("GPT2", "GPTNeoX", "Bloom", "Mpt", "Falcon", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Olmo2", "Mixtral")
CONFIGS = (*ALL, "Qwen2Moe", "Qwen3Moe")


def case(name: str) -> Case:
    """The case of this name."""
    return next(one for one in CASES if one.name == name)


def copied(name: str, folder: Path) -> tuple[Any, Path]:
    """A case's reference model, and a copy of its folder to be changed."""
    model, place = reference(case(name))
    shutil.copytree(place, folder / name)
    return model, folder / name


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a folder's configuration."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change a folder's tensors."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE)


def still_the_same(model: Any, folder: Path, name: str) -> None:
    """A changed folder gives the answers that the reference gave, and is saved as the reference saves."""
    data = case(name).inputs()
    loaded = pf.load(folder)
    with torch.no_grad():
        assert_same(real(mine(loaded.model, data), data), real(theirs(model, data), data), 1e-5)
    pf.save(loaded, folder / "again")
    before, after = load_file(reference(case(name))[1] / SINGLE), load_file(folder / "again" / SINGLE)
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[key]) for key, tensor in before.items())


# ---------------------------------------------------------------------------------------------------------------
# Long texts

LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "windows of Mistral": ("Mistral", sizes.GROUPED | {"sliding_window": 16}),
    "windows of Gemma 2": ("Gemma2", sizes.GEMMA | {"sliding_window": 16}),
    "windows of Qwen2": (
        "Qwen2",
        sizes.GROUPED | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "windows of Mixtral": ("Mixtral", sizes.MIXTRAL | {"sliding_window": 16}),
    "linear": ("Llama", sizes.GROUPED | sizes.rope("linear")),
    "dynamic": ("Llama", sizes.GROUPED | sizes.rope("dynamic")),
    "yarn": ("Llama", sizes.GROUPED | sizes.rope("yarn", original_max_position_embeddings=32, beta_fast=4.0)),
    "llama3": (
        "Llama",
        sizes.GROUPED
        | sizes.rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "dynamic, a part of each head": (
        "GPTNeoX",
        sizes.NEOX | sizes.rope("dynamic", partial_rotary_factor=0.5) | {"hidden_size": 32},
    ),
    "alibi of BLOOM": ("Bloom", sizes.BLOOM),
    "alibi of MPT": ("Mpt", sizes.MPT | {"max_seq_len": 300}),
    "rounded alibi of Falcon": ("Falcon", sizes.FALCON | {"alibi": True, "hidden_size": 24, "num_attention_heads": 12}),
}


@pytest.mark.parametrize("name", LONG)
def test_texts_longer_than_windows_and_training(name: str, tmp_path: Path) -> None:
    """300 tokens where positions were made for 32: every row of whole and of padded texts."""
    kind, keys = LONG[name]
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**keys)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 49, (2, 300))
    mask = (torch.arange(300) < torch.tensor([[300], [251]])).long()
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        found = cast(Any, pf.load(tmp_path).model)(ids, mask).logits[mask.bool()]
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_a_text_longer_than_learned_positions_is_refused() -> None:
    with pytest.raises(SpecError, match="33 tokens is longer than the model's 32 positions"):
        load(case("gpt2")).model(torch.zeros(1, 33, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------
# Older folders


def test_rotary_positions_as_they_were_spelled(tmp_path: Path) -> None:
    model, folder = copied("llama-llama3", tmp_path)

    def older(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}

    change_config(folder, older)
    spec = pf.load(folder).spec
    rates = cast(Any, dict(walk(spec))["decoder.blocks.0.steps.0.op.position"]).plain()
    change_tensors(folder, lambda tensors: tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": rates})
    with pytest.raises(WeightsError, match=r"layers.1.self_attn.rotary_emb.inv_freq.* is not what is computed"):
        pf.load(folder)
    scaled = cast(Any, dict(walk(spec))["decoder.blocks.0.steps.0.op.position"])
    rates = scaled.scaling.frequencies(scaled, 0).half()
    change_tensors(folder, lambda tensors: tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": rates})
    still_the_same(model, folder, "llama-llama3")


def triangle(size: int) -> Tensor:
    """A causal mask as older folders hold it."""
    return torch.ones(size, size, dtype=torch.uint8).tril()[None, None]


def test_a_first_gpt2(tmp_path: Path) -> None:
    """Without a prefix, and with masks beside the weights."""
    model, folder = copied("gpt2", tmp_path)
    masks = {f"h.{i}.attn.bias": triangle(32) for i in range(2)} | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    change_tensors(folder, lambda old: {k.removeprefix("transformer."): t for k, t in old.items()} | masks)
    change_config(folder, lambda config: config.update(n_ctx=32, predict_special_tokens=True))
    still_the_same(model, folder, "gpt2")
    change_tensors(folder, lambda old: old | {"h.1.attn.bias": torch.ones(1, 1, 32, 32)})
    with pytest.raises(WeightsError, match=r"h.1.attn.bias.* is not what is computed"):
        pf.load(folder)


def test_a_first_pythia(tmp_path: Path) -> None:
    model, folder = copied("gpt_neox", tmp_path)
    rates = 10000.0 ** -torch.arange(0, 1, 1.0)
    one = "gpt_neox.layers.1.attention"
    others = {
        f"{one}.bias": triangle(32),
        f"{one}.masked_bias": torch.tensor(-1e9),
        f"{one}.rotary_emb.inv_freq": rates,
    }
    change_tensors(folder, lambda old: old | others)

    def older(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}

    change_config(folder, older)
    still_the_same(model, folder, "gpt_neox")


def test_a_first_bloom(tmp_path: Path) -> None:
    model, folder = copied("bloom", tmp_path)
    change_tensors(folder, lambda old: {key.removeprefix("transformer."): tensor for key, tensor in old.items()})

    def older(config: dict[str, Any]) -> None:
        config["n_embed"], config["num_attention_heads"] = config.pop("hidden_size"), config.pop("n_head")
        config |= {"offset_alibi": 100, "seq_length": 2048, "pretraining_tp": 4, "skip_bias_add": True}

    change_config(folder, older)
    still_the_same(model, folder, "bloom")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_in_one_tensor(name: str, tmp_path: Path) -> None:
    """As the reference holds them in memory, and folders hold them that were saved without being converted back."""
    model, folder = copied(name, tmp_path)
    change_tensors(folder, lambda old: {k: t.clone().contiguous() for k, t in model.state_dict().items()})
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in load_file(folder / SINGLE))
    still_the_same(model, folder, name)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_loss_of_the_routers(name: str) -> None:
    """What the reference adds to the loss of the tokens, in a padded batch; gradients reach the routers."""
    model, _ = reference(case(name))
    ours, data = load(case(name)).model, case(name).inputs()
    assert float(data["attention_mask"].float().mean()) < 1
    wanted = model.router_aux_loss_coef * model(**data, output_router_logits=True).aux_loss
    trace = routing_trace(ours)
    assert trace is not None
    ours(**data, trace=trace)
    found = routing_loss(trace)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    found.backward()
    routers = [weight.grad for key, weight in ours.named_parameters() if "router" in key]
    assert routers
    assert all(one is not None and float(one.abs().max()) > 0 for one in routers)


# ---------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_a_silent_file_means_the_reference_s_defaults(name: str) -> None:
    config = getattr(transformers, f"{name}Config")()
    loud = read_family(json.loads(config.to_json_string(use_diff=False)), "config.json")
    silent = read_family({"model_type": loud.model_type}, "config.json")
    assert isinstance(loud, Decoder)
    assert isinstance(silent, Decoder)
    assert silent.spec() == loud.spec()
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "classifier_dropout"):
        assert getattr(silent, key) == getattr(loud, key), key


def count(spec: Any) -> int:
    """Count a spec's parameters without building it: for models that would take long to describe even so."""
    total = 0
    for _, record in walk(spec):
        if isinstance(record, Linear):
            total += record.outputs * (record.inputs + record.bias)
        elif isinstance(record, TokenEmbedding):
            total += record.vocabulary * record.width
        elif isinstance(record, RMSNorm):
            total += record.width
    return total


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters(name: str) -> None:
    expected, config = PUBLISHED[name]
    spec = cast(Any, read_family(config, "config.json").spec())
    if any(isinstance(record, Experts) for _, record in walk(spec)):
        assert count(spec) == expected
    else:
        assert parameters_of(spec.build("meta")) == expected


# ---------------------------------------------------------------------------------------------------------------
# Particulars


def test_gpt2_writes_what_an_encoder_read() -> None:
    keys = sizes.GPT2 | {"add_cross_attention": True, "scale_attn_by_inverse_layer_idx": True}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**keys)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    family = read_family(json.loads(model.config.to_json_string()), "config.json")
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    ours = cast(Any, pf_assemble(family, tensors))
    memory, real_rows = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    ids = torch.randint(3, 49, (2, 6))
    with torch.no_grad():
        wanted = model(ids, encoder_hidden_states=memory, encoder_attention_mask=real_rows).logits
        read = Memory(memory, real_rows.bool())
        torch.testing.assert_close(ours.head(ours.decode(ids, memory=read)), wanted, atol=1e-5, rtol=1e-5)
        cache = GrowingCache()
        pieces = [ours.decode(piece, memory=read, cache=cache) for piece in ids.split(2, 1)]
        torch.testing.assert_close(ours.head(torch.cat(pieces, 1)), wanted, atol=1e-5, rtol=1e-5)


def pf_assemble(family: Any, tensors: Tensors) -> Any:
    """Build a family's model of tensors that were never on disk."""
    from polyformer.weights.assemble import assemble

    return assemble(family.spec(), family.names().to_ours(tensors)).eval()


def test_gemma_scales_its_embeddings_in_its_precision() -> None:
    """√24 is 4.899, but 4.906 in bfloat16; every row is the reference's bit for bit."""
    keys = sizes.GEMMA | {"hidden_size": 24}
    model = transformers.Gemma2Model(transformers.Gemma2Config(**keys)).bfloat16()
    family = read_family(json.loads(model.config.to_json_string()) | {"architectures": ["Gemma2Model"]}, "config.json")
    ours = cast(Any, pf_assemble(family, model.state_dict()))
    ids = torch.arange(50)[None]
    assert ours.target(ids, ours.target.begin(given(ids))).equal(model.embed_tokens(ids))
    assert family.spec().target.scale != 4.90625  # type: ignore[union-attr]


def given(ids: Tensor) -> Any:
    """What a model's first part begins with."""
    from polyformer.parts import Given

    return Given(ids)


def test_tied_heads_are_one_matrix() -> None:
    model = cast(Any, load(case("llama-tied")).model)
    assert model.head.projection.weight is model.target.tokens.weight
    model = cast(Any, load(case("llama")).model)
    assert model.head.projection.weight is not model.target.tokens.weight


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "longrope"}},
            "rope_type should be one of .* not 'longrope'",
        ),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "factor": 8}}, "needs low_freq_factor"),
        ({"model_type": "llama", "rope_parameters": {"short_factor": [1.0]}}, "unknown key 'short_factor'"),
        ({"model_type": "llama", "rope_parameters": [1]}, "should have a table of numbers"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "yarn", "rope_type": "linear"}},
            "type 'yarn', but .* 'linear'",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "linear"}},
            "both rope_parameters and rope_scaling",
        ),
        ({"model_type": "llama", "num_key_value_heads": 5}, "32 heads can't share 5"),
        ({"model_type": "llama", "num_attention_heads": 0}, "at least 1"),
        ({"model_type": "llama", "hidden_act": "gleu"}, r"no activation 'gleu' \(did you mean 'gelu'"),
        ({"model_type": "llama", "sliding_window": 5}, "key 'sliding_window'"),
        ({"model_type": "gpt2", "n_layer": 10**6}, "1000000 layers are not between"),
        ({"model_type": "gpt2", "n_head": 7}, "768 can't be cut into 7 heads"),
        ({"model_type": "gpt2", "n_ctx": 7, "n_positions": 8}, "n_ctx = 7, but n_positions"),
        ({"model_type": "bloom", "slow_but_exact": True}, "slow_but_exact = True; only False"),
        ({"model_type": "mpt", "attn_config": {"qk_ln": True}}, "qk_ln should be one of False"),
        ({"model_type": "mpt", "attn_config": {"attn_type": "multiquery_attention"}}, "attn_type should be one of"),
        ({"model_type": "mpt", "attn_config": {"clip": 3}}, r"unknown key 'clip' \(did you mean 'clip_qkv'"),
        ({"model_type": "mpt", "expansion_ratio": 3}, "expansion_ratio = 3; only 4"),
        ({"model_type": "falcon", "num_ln_in_parallel_attn": 2}, "is for the new decoder architecture"),
        ({"model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False}, "has parallel_attn"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "names 1 layers, but there are 26"),
        ({"model_type": "gemma2", "layer_types": ["chunked"] * 26}, "layer_types.* not 'chunked'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"model_type": "mixtral", "num_local_experts": 10**5}, "100000 experts in each of 32 layers"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "9 of 8 experts can't be chosen"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1"),
        (
            {"model_type": "olmo2", "architectures": ["Olmo2ForTokenClassification"]},
            "is of a Olmo2ForTokenClassification",
        ),
    ],
)
def test_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        read_family(config, "config.json").spec()


def test_tensors_that_don_t_fit(tmp_path: Path) -> None:
    _, folder = copied("falcon-new", tmp_path)
    change_config(folder, lambda config: config.update(num_kv_heads=1))
    with pytest.raises(WeightsError, match=r"query_key_value.*should have 24 rows"):
        pf.load(folder)
    _, folder = copied("mixtral", tmp_path)
    change_tensors(folder, lambda old: {k: t for k, t in old.items() if "experts.2.w1" not in k})
    with pytest.raises(WeightsError, match=r"block_sparse_moe.experts.2.w1.weight"):
        pf.load(folder)
    change_config(folder, lambda config: config.update(num_local_experts=2))
    with pytest.raises(WeightsError, match=r"block_sparse_moe.experts"):
        pf.load(folder)


def test_specs_are_data() -> None:
    """Depth patterns, experts and scalings are written and read."""
    for family in (GPT2(), Llama(), Gemma2(), Falcon(), Mixtral(), Qwen2Moe(decoder_sparse_step=2)):
        spec = family.spec()
        assert type(spec).from_json(spec.to_json()) == spec
        assert len(spec.to_json()) < 12_000
