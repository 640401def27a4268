"""Sound of other lengths, padding, older folders, and what a model of sound can't be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import polyformer as pf
from polyformer.errors import SpecError, WeightsError
from polyformer.families import read_family
from polyformer.weights.files import SINGLE
from tests.families.cases import CASES
from tests.families.parity import load, reference, theirs, transformers

BY_NAME = {case.name: case for case in CASES}
CONFORMERS = ["wav2vec2-conformer", "wav2vec2-conformer-rotary", "wav2vec2-conformer-placeless"]


@pytest.mark.parametrize("name", CONFORMERS)
def test_padded_waveforms_are_what_they_are_alone(name: str) -> None:
    """The reference hears padding in its convolutions; here a sound in a batch is the same as by itself, there too."""
    case = BY_NAME[name]
    model: Any = load(case).model
    sound = torch.randn(3, 303)
    lengths = [303, 190, 64]
    mask = (torch.arange(303) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        together = model(input_values=sound, attention_mask=mask).hidden
        for i, length in enumerate(lengths):
            alone = {"input_values": sound[i : i + 1, :length]}
            wanted = theirs(reference(case)[0], alone)["hidden"]
            torch.testing.assert_close(model(**alone).hidden, wanted, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together[i, : wanted.shape[1]], wanted[0], atol=1e-5, rtol=1e-4)


def test_spectrum_augmentation_is_for_training() -> None:
    keys = BY_NAME["wav2vec2-conformer"].keys | {"model_type": "wav2vec2-conformer", "apply_spec_augment": True}
    model: Any = read_family(keys | {"mask_time_prob": 0.9, "mask_time_length": 3}, "a file").spec().build()
    sound = torch.randn(1, 303)
    with torch.no_grad():
        quiet = [model.eval()(input_values=sound).hidden for _ in range(2)]
        masked = [model.train()(input_values=sound).hidden for _ in range(2)]
    assert quiet[0].equal(quiet[1])
    assert not masked[0].equal(masked[1])
    loss = model(input_values=sound).hidden.square().mean()
    loss.backward()
    assert model.get_parameter("source.stem.steps.4.weight").grad.abs().sum() > 0


def test_an_older_conformer(tmp_path: Path) -> None:
    """Weight normalisation had other names once."""
    case = BY_NAME["wav2vec2-conformer"]
    folder = reference(case)[1]
    tensors = load_file(folder / SINGLE)
    conv = "encoder.pos_conv_embed.conv"
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        tensors[f"{conv}.{old}"] = tensors.pop(f"{conv}.parametrizations.weight.{new}")
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    older = pf.load(tmp_path).model.state_dict()
    assert all(tensor.equal(older[name]) for name, tensor in load(case).model.state_dict().items())


def test_rotation_rates_must_be_what_is_computed(tmp_path: Path) -> None:
    folder = reference(BY_NAME["wav2vec2-conformer-rotary"])[1]
    tensors = load_file(folder / SINGLE)
    tensors["encoder.embed_positions.inv_freq"][1] *= 2
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"embed_positions\.inv_freq.* is not what is computed"):
        pf.load(tmp_path)


def test_whisper_hears_less_than_it_could() -> None:
    """Fewer frames than the model's have the first of its positions; more are an error."""
    model: Any = load(BY_NAME["whisper-base"]).model
    ids = torch.tensor([[3, 4, 5]])
    features = torch.randn(1, 8, 14)
    out = model(input_features=features, decoder_input_ids=ids)
    assert out.encoder_hidden.shape == (1, 7, 16)
    with pytest.raises(SpecError, match="12 tokens is longer than the model's 11 positions"):
        model(input_features=torch.randn(1, 8, 24), decoder_input_ids=ids)
    with pytest.raises(SpecError, match="takes no attention mask for sound"):
        model(input_features=features, attention_mask=torch.ones(1, 14), decoder_input_ids=ids)


def test_whisper_s_positions_stay_as_they_are() -> None:
    case = BY_NAME["whisper"]
    model: Any = load(case).model.train()
    out = model(**case.inputs()).logits
    out.square().mean().backward()
    assert "source.positions.weight" not in dict(model.named_parameters())
    wanted = reference(case)[0].model.encoder.embed_positions.weight
    assert model.source.positions.weight.equal(wanted)
    fresh: Any = load(case).spec.build()
    torch.testing.assert_close(fresh.source.positions.weight, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("whisper", {"scale_embedding": True}, "scale_embedding = True; only False"),
        ("whisper", {"encoder_attention_heads": 3}, "16 can't be cut into 3 heads"),
        ("whisper", {"hidden_size": 17}, "hidden_size = 17, but d_model = 16"),
        ("whisper", {"architectures": ["WhisperForAudioClassification"]}, "of a WhisperForAudioClassification"),
        ("wav2vec2-conformer", {"add_adapter": True}, "add_adapter = True; only False"),
        ("wav2vec2-conformer", {"conv_kernel": [10, 3]}, "should name the same 1 to 32 layers"),
        ("wav2vec2-conformer", {"conv_stride": [0, 1, 1]}, "sizes from 1 to 65536"),
        ("wav2vec2-conformer", {"num_feat_extract_layers": 4}, "num_feat_extract_layers = 4; only 3 goes with"),
        ("wav2vec2-conformer", {"output_hidden_size": 4}, "output_hidden_size = 4; only 16 goes with"),
        ("wav2vec2-conformer", {"conv_depthwise_kernel_size": 4}, "a depthwise kernel of 4 has no middle"),
        ("wav2vec2-conformer", {"position_embeddings_type": "learned"}, "should be one of 'relative', 'rotary'"),
        ("wav2vec2-conformer", {"num_conv_pos_embedding_groups": 3}, "has no such groups"),
        (
            "wav2vec2-conformer",
            {"vocab_size": None, "architectures": ["Wav2Vec2ConformerForCTC"]},
            "needs a vocab_size",
        ),
    ],
)
def test_what_a_model_of_sound_can_not_be(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_family(BY_NAME[name].keys | {"model_type": name} | changes, "a file").spec()


@pytest.mark.parametrize("name", ["Whisper", "Wav2Vec2Conformer"])
def test_the_defaults_are_the_reference_s(name: str) -> None:
    told = getattr(transformers, f"{name}Config")().to_dict()
    read = read_family(told | {"architectures": None}, "a file")
    assert read == read_family({"model_type": told["model_type"]}, "a file")
