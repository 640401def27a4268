"""Marian against the reference library: the same numbers from the same folder, and the same folder back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polyformer as pf
from polyformer.errors import SpecError, WeightsError
from polyformer.families import Marian
from polyformer.families.config import PLAIN, keys
from polyformer.parts import Transformer
from polyformer.parts.flow import GrowingCache, StaticCache
from polyformer.weights.files import SINGLE
from tests.families.cases.marian import SEPARATE, SIZES

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

CONFIGS: dict[str, dict[str, Any]] = {
    "shared": {"activation_function": "swish", "scale_embedding": True},
    "separate": {"activation_function": "relu", "scale_embedding": True, **SEPARATE},
    "separate, untied": {"activation_function": "gelu", "tie_word_embeddings": False, **SEPARATE},
    "odd width": {
        "activation_function": "gelu_new",
        "d_model": 15,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 5,
    },
}


def saved(folder: Path, name: str, shards: bool = False) -> Any:
    """Save a random model with the reference library; every tensor, biases and norms too, is far from its start."""
    model = transformers.MarianMTModel(transformers.MarianConfig(**SIZES | CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.final_logits_bias.normal_()
    model.save_pretrained(folder, max_shard_size="5KB" if shards else "1GB")
    return model


def batch(vocabulary: int = 49) -> dict[str, Tensor]:
    """Sentences of odd lengths, padded on the right with ordinary tokens."""
    data = {"input_ids": torch.randint(0, 49, (3, 7)), "decoder_input_ids": torch.randint(0, vocabulary, (3, 5))}
    data["decoder_input_ids"][:, 0] = 49
    data["attention_mask"] = (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()
    data["decoder_attention_mask"] = (torch.arange(5) < torch.tensor([[3], [5], [2]])).long()
    return data


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_logits_both_ways(tmp_path: Path, name: str, shards: bool) -> None:
    reference = saved(tmp_path / "theirs", name, shards)
    assert (tmp_path / "theirs" / SINGLE).exists() != shards
    loaded = pf.load(tmp_path / "theirs")
    data = batch()
    real = data["decoder_attention_mask"].bool()
    with torch.no_grad():
        found, wanted = cast(Any, loaded.model)(**data), reference(**data)
    torch.testing.assert_close(found.logits[real], wanted.logits[real], atol=1e-5, rtol=0)
    mask = data["attention_mask"].bool()
    torch.testing.assert_close(found.encoder_hidden[mask], wanted.encoder_last_hidden_state[mask], atol=1e-5, rtol=0)
    pf.save(loaded, tmp_path / "ours")
    again = transformers.MarianMTModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert again(**data).logits.equal(wanted.logits)
    assert again.state_dict().keys() == reference.state_dict().keys()
    assert all(tensor.equal(again.state_dict()[key]) for key, tensor in reference.state_dict().items())
    if not shards:
        assert (tmp_path / "ours" / SINGLE).read_bytes() == (tmp_path / "theirs" / SINGLE).read_bytes()
    assert pf.load(tmp_path / "ours").family == loaded.family


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_in_training_mode(tmp_path: Path, name: str) -> None:
    reference = saved(tmp_path / "theirs", name).train()
    loaded = pf.load(tmp_path / "theirs")
    model: Any = loaded.model.train()
    data = batch()
    labels = torch.randint(0, 49, (3, 5)).masked_fill(data["decoder_attention_mask"] == 0, -100)
    for one in (reference, model):
        torch.autograd.backward(torch.nn.functional.cross_entropy(one(**data).logits.flatten(0, 1), labels.flatten()))
    assert loaded.family is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = loaded.family.names().to_disk(gradients)
    wanted = {key: p.grad for key, p in reference.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted) | {"final_logits_bias"}
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-4, msg=f"the gradient of {key} differs")


@pytest.mark.parametrize("cache", [GrowingCache(), StaticCache(room=5)], ids=["growing", "static"])
def test_cached_equals_full(tmp_path: Path, cache: GrowingCache) -> None:
    reference = saved(tmp_path, "shared")
    model = pf.load(tmp_path).model
    data = batch()
    with torch.no_grad():
        wanted = reference(data["input_ids"], data["attention_mask"], data["decoder_input_ids"]).logits
        memory = model.encode(data["input_ids"], data["attention_mask"])
        assert model.head is not None
        steps = [
            model.head(model.decode(data["decoder_input_ids"][:, i : i + 1], None, memory, cache)) for i in range(5)
        ]
    torch.testing.assert_close(torch.cat(steps, 1), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    saved(tmp_path / "32", "shared").to(dtype).save_pretrained(tmp_path / "16")
    loaded = pf.load(tmp_path / "16")
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    pf.save(loaded, tmp_path / "again")
    assert transformers.MarianMTModel.from_pretrained(tmp_path / "again").dtype == dtype
    assert (tmp_path / "again" / SINGLE).read_bytes() == (tmp_path / "16" / SINGLE).read_bytes()
    reference = transformers.MarianMTModel.from_pretrained(tmp_path / "16", dtype=torch.float32).eval()
    data = batch()
    real = data["decoder_attention_mask"].bool()
    with torch.no_grad():
        found = cast(Any, pf.load(tmp_path / "16", dtype=torch.float32).model)(**data).logits
        torch.testing.assert_close(found[real], reference(**data).logits[real], atol=1e-5, rtol=0)


def test_older_files(tmp_path: Path) -> None:
    """Older folders name tied tensors several times, hold the position tables, and more keys in their configuration."""
    reference = saved(tmp_path, "shared")
    tensors = load_file(tmp_path / SINGLE)
    state = reference.state_dict()
    for name in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = state[name].clone()
    for side in ("encoder", "decoder"):
        tensors[f"model.{side}.embed_positions.weight"] = state[f"model.{side}.embed_positions.weight"].clone()
    save_file(tensors, tmp_path / SINGLE)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    older = {
        "_name_or_path": "/tmp/opus-mt",
        "_num_labels": 3,
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "bad_words_ids": [[49]],
        "bos_token_id": 0,
        "classif_dropout": 0.0,
        "id2label": {"0": "LABEL_0"},
        "max_length": 20,
        "normalize_before": False,
        "normalize_embedding": False,
        "num_beams": 6,
        "num_hidden_layers": 2,
        "static_position_embeddings": True,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config | older))
    loaded = pf.load(tmp_path)
    data = batch()
    with torch.no_grad():
        torch.testing.assert_close(
            cast(Any, loaded.model)(**data).logits[0, :3], reference(**data).logits[0, :3], atol=1e-5, rtol=0
        )
    assert loaded.generation.num_beams == 6
    assert loaded.generation.bad_words_ids == ((49,),)
    assert loaded.generation.decoder_start_token_id == 49
    tensors["model.encoder.embed_positions.weight"][3, 3] += 0.1
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(
        WeightsError, match=r"model\.encoder\.embed_positions\.weight' of model\.safetensors is not what"
    ):
        pf.load(tmp_path)


def test_tensors_that_do_not_fit_are_called_by_their_names_on_disk(tmp_path: Path) -> None:
    saved(tmp_path, "shared")
    whole = load_file(tmp_path / SINGLE)
    name = "model.decoder.layers.2.encoder_attn.k_proj.weight"

    def loading(tensors: dict[str, Tensor]) -> str:
        save_file(tensors, tmp_path / SINGLE)
        with pytest.raises(WeightsError) as caught:
            pf.load(tmp_path)
        return str(caught.value)

    without = {key: tensor for key, tensor in whole.items() if key != name}
    assert loading(without) == f"the weights lack '{name}'"
    assert "'model.extra.weight' of model.safetensors belongs to no part" in loading(
        whole | {"model.extra.weight": whole[name].clone()}
    )
    assert f"'{name}' has shape [3, 16], but the model needs [16, 16]" in loading(whole | {name: torch.ones(3, 16)})
    deeper = "model.decoder.layers.7.fc1.weight"
    assert f"no place in this model for '{deeper}'" in loading(whole | {deeper: torch.ones(20, 16)})
    other = whole | {"lm_head.weight": whole["model.shared.weight"] + 1}
    assert "'model.shared.weight' and 'lm_head.weight' are tied, but they differ" in loading(other)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_survives_its_files(name: str) -> None:
    config = Marian.from_data(SIZES | CONFIGS[name])
    assert Marian.from_json(config.to_json()) == config
    spec = config.spec()
    assert Transformer.from_json(spec.to_json()) == spec


def test_the_defaults_are_the_reference_s() -> None:
    reference = transformers.MarianConfig().to_dict()
    for key in keys(Marian):
        if key != "decoder_vocab_size":
            assert getattr(Marian(), key) == reference[key], key
    for key, value in (PLAIN | Marian.unused).items():
        assert reference.get(key, value) == value, key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, "untied head"),
        ({"decoder_vocab_size": 60}, "decoder_vocab_size differs"),
        ({"activation_function": "swiish"}, r"no activation 'swiish' \(did you mean 'swish'"),
        ({"d_model": 17}, "17 can't be cut into 2 heads"),
        ({"pad_token_id": 50}, "padding 50 is no token of a vocabulary of 50"),
    ],
)
def test_what_a_marian_can_not_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Marian.from_data(SIZES | changes).spec()
