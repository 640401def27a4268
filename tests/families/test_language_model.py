"""Small language models: what their rows meet by, under which names, and what can't be."""

from __future__ import annotations

import pytest
import torch

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.families.gmlp import GMLP
from polyformer.families.language_model import LanguageModel
from polyformer.families.mixers import Sizes, mixer
from polyformer.families.transformer import NormChoice
from polyformer.parts.model import TransformerPart
from polyformer.spec import walk

SIZES = {"vocabulary": 40, "length": 12, "width": 16, "depth": 2, "heads": 2}
CAUSAL = parts.Causal() & parts.SameDocument()


def attentions(model: LanguageModel) -> set[parts.Attention]:
    return {one for _, one in walk(model.spec()) if isinstance(one, parts.Attention)}


@pytest.mark.parametrize("positions", ["rotary", "alibi", "learned", "sinusoidal", "none"])
@pytest.mark.parametrize("reads", ["forwards", "both ways"])
def test_it_runs(reads: str, positions: str) -> None:
    model = LanguageModel(**SIZES, reads=reads, positions=positions).spec().build()  # type: ignore[arg-type]
    assert isinstance(model, TransformerPart)
    found = model(input_ids=torch.randint(40, (2, 12))).logits
    assert found is not None
    assert found.shape == (2, 12, 40)
    assert (model.decoder is None) == (reads == "both ways")


def test_it_is_gpt_in_our_sizes() -> None:
    """Pre-norm blocks, a final norm, one matrix for embedding and head: 12 w² + the norms and biases of GPT-2."""
    model = LanguageModel(**SIZES, positions="learned").replace(feedforward=LanguageModel().feedforward)
    found = sum(p.numel() for p in model.spec().build().parameters())
    block = 4 * (16 * 16 + 16) + 2 * 16 * 1024 + 1024 + 16 + 4 * 16
    assert found == 40 * 16 + 12 * 16 + 2 * block + 2 * 16


@pytest.mark.parametrize(
    ("choice", "see", "kernel"),
    [
        ("softmax", CAUSAL, parts.Softmax()),
        ("Soft-max", CAUSAL, parts.Softmax()),
        ("window", CAUSAL & parts.Window(3), parts.Sliding()),
        (parts.Window(5), CAUSAL & parts.Window(5), parts.Sliding()),
        ("tiled", CAUSAL, parts.Tiled()),
        ("flex", CAUSAL, parts.Flex()),
        ("local", CAUSAL, parts.Local(parts.Chunks(3))),
        ("aft", CAUSAL, parts.AttentionFree()),
        ("performer", CAUSAL, parts.Performer(8)),
        ({"type": "Performer", "features": 128}, CAUSAL, parts.Performer(8, 128)),
        ("linear", CAUSAL, parts.LinearAttention()),
        ({"type": "Capped", "cap": 30.0}, CAUSAL, parts.Capped(30.0)),
    ],
    ids=str,
)
def test_kernels_and_rules(choice: object, see: parts.Rule, kernel: parts.Kernel) -> None:
    model = LanguageModel.from_data({**SIZES, "attention": _data(choice)})
    (found,) = attentions(model)
    assert found.kernel == kernel
    assert set(parts.kernels.kernel.rules_of(found.see)) == set(parts.kernels.kernel.rules_of(see))


def _data(choice: object) -> object:
    return {"type": "Window", **choice.to_data()} if isinstance(choice, parts.Window) else choice


def test_parts_in_attentions_place() -> None:
    retention = LanguageModel(**SIZES, attention="retention").spec()
    assert {type(one).__name__ for _, one in walk(retention)} & {"Attention", "Retention"} == {"Retention"}
    gated = [
        one for _, one in walk(LanguageModel(**SIZES, attention="gmlp").spec()) if type(one).__name__ == "SpatialGating"
    ]
    theirs = [
        one for _, one in walk(GMLP(40, 12, 16, 32, 2, "forwards").spec()) if type(one).__name__ == "SpatialGating"
    ]
    assert set(gated) == set(theirs)
    (hashing, _) = [
        one for _, one in walk(LanguageModel(**SIZES, attention="lsh").spec()) if isinstance(one, parts.Hashing)
    ]
    assert (hashing.see, hashing.chunks) == (CAUSAL, parts.Chunks(3))
    plain = LanguageModel(**SIZES, attention="none").spec()
    assert not attentions(LanguageModel(**SIZES, attention="none"))
    assert len(plain.decoder.blocks[0].steps) == 1  # type: ignore[union-attr, attr-defined]
    whole = parts.Retention.of_width(16, 2, parts.Causal())
    assert mixer(whole, Sizes(16, 2), CAUSAL) is whole


def test_linformer_fills_in_the_length() -> None:
    (found,) = attentions(LanguageModel(**SIZES, reads="both ways", attention="linformer"))
    assert found.kernel == parts.Linformer(12)
    given = LanguageModel(**SIZES, reads="both ways", attention=parts.Linformer(20, 4))
    assert {one.kernel for one in attentions(given)} == {parts.Linformer(20, 4)}


def test_what_can_not_be() -> None:
    def refused(sentence: str, **choices: object) -> None:
        with pytest.raises(SpecError, match=sentence):
            LanguageModel(**{**SIZES, **choices}).spec()  # type: ignore[arg-type]

    refused("the vocabulary must be known", vocabulary=None)
    refused(r"Linformer can't follow .*can't honour the rule Causal", attention="linformer")
    refused("can't be those of heads 8 wide", attention=parts.Performer(4))
    refused("did you mean 'retention'", attention="retension")
    refused("'window' needs to know the longest sequence", attention="window", length=None)
    refused("'gmlp' needs to know the longest sequence", attention="gmlp", length=None)
    refused("learned positions need to know", positions="learned", length=None)
    refused("needs the longest sequence", attention="linformer", reads="both ways", length=None)
    refused("would see what comes", norm=NormChoice("batch", "pre"))
    refused("heads evenly", heads=3)
    for kernel in (parts.Performer(), parts.Linformer()):
        with pytest.raises(SpecError, match="to be built"):
            kernel.build()
