"""The 2017 Transformer: its choices, and the same weights in `torch.nn.Transformer`, both ways."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.families import Transformer2017
from polyformer.families.transformer import (
    AttentionChoice,
    Depth,
    FeedForwardChoice,
    NormChoice,
    PositionChoice,
    torch_rows,
)
from polyformer.parts import Transformer
from polyformer.parts.model import TransformerPart, parameters_of
from polyformer.spec import walk
from polyformer.weights.assemble import assemble, disassemble
from polyformer.weights.names import Names, Row

SMALL = Transformer2017(23, 19, width=16, depth=Depth(2, 3), attention=AttentionChoice(heads=4), dropout=0.0)


class Reference(nn.Module):
    """`torch.nn.Transformer` between embeddings (without positions) and a head, as its users have to add them."""

    def __init__(self, config: Transformer2017) -> None:
        super().__init__()
        assert config.source_vocabulary
        assert config.target_vocabulary
        self.source = nn.Embedding(config.source_vocabulary, config.width)
        self.target = nn.Embedding(config.target_vocabulary, config.width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says that its fast path is off for this form
            self.transformer = nn.Transformer(
                config.width,
                config.attention.heads,
                config.depth.encoder,
                config.depth.decoder,
                config.feedforward.hidden,
                config.dropout,
                config.feedforward.activation,
                batch_first=True,
                norm_first=config.norm.placement == "pre",
            )
        self.head = nn.Linear(config.width, config.target_vocabulary, bias=False)
        self.scale = config.width**0.5

    def forward(self, source: Tensor, source_mask: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
        length = target.shape[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its nested tensors are a prototype
            hidden = self.transformer(
                self.source(source) * self.scale,
                self.target(target) * self.scale,
                tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(1),
                src_key_padding_mask=~source_mask,
                tgt_key_padding_mask=~target_mask,
                memory_key_padding_mask=~source_mask,
            )
        logits: Tensor = self.head(hidden)
        return logits


def reference_form(placement: Any, activation: Any = "relu") -> tuple[Transformer2017, Names]:
    config = SMALL.replace(
        norm=NormChoice("layer", placement, final=True),
        positions=PositionChoice("none"),
        feedforward=FeedForwardChoice(24, activation),
        ties="none",
    )
    around = [
        Row("source.tokens.weight", "source.weight"),
        Row("target.tokens.weight", "target.weight"),
        Row("head.projection.weight", "head.weight"),
    ]
    return config, Names([*torch_rows(config, "transformer."), *around])


def batch(padding: str) -> dict[str, Tensor]:
    """Sentences of odd and differing lengths; the padding holds ordinary tokens that must not matter."""
    source, target = torch.randint(0, 23, (4, 9)), torch.randint(0, 19, (4, 7))
    masks = []
    for length, real in ((9, (9, 5, 1, 7)), (7, (3, 7, 1, 6))):
        places = torch.arange(length)[None]
        counts = torch.tensor(real)[:, None]
        masks.append({"none": places >= 0, "right": places < counts, "left": places >= length - counts}[padding])
    masks = [mask.expand(4, -1).clone() for mask in masks]
    return {"source": source, "source_mask": masks[0], "target": target, "target_mask": masks[1]}


def ours(model: TransformerPart, data: dict[str, Tensor]) -> Tensor:
    out = model(data["source"], data["source_mask"], data["target"], data["target_mask"]).logits
    assert out is not None
    return out


def from_reference(reference: Reference, config: Transformer2017, names: Names) -> TransformerPart:
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    model = assemble(config.spec(), names.to_ours(weights))
    assert isinstance(model, TransformerPart)
    return model


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_same_numbers_as_torch(placement: str, padding: str, mode: str) -> None:
    config, names = reference_form(placement)
    reference = Reference(config).train(mode == "train")
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = from_reference(reference, config, names).train(mode == "train")
    data = batch(padding)
    real = data["target_mask"]
    wanted, found = reference(**data)[real], ours(model, data)[real]
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    if mode == "eval":
        return
    labels = torch.randint(0, 19, (int(real.sum()),))
    for logits in (wanted, found):
        torch.autograd.backward(nn.functional.cross_entropy(logits, labels))
    wanted_gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found_gradients) == len(list(model.parameters()))
    mapped = names.to_disk(found_gradients)
    assert set(mapped) == set(wanted_gradients)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(mapped[name], gradient, atol=1e-5, rtol=1e-4, msg=f"the gradient of {name} differs")


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_a_model_of_ours_goes_to_torch_and_back(placement: str) -> None:
    config, names = reference_form(placement, "gelu")
    model = config.spec().build().eval()
    assert isinstance(model, TransformerPart)
    reference = Reference(config).eval()
    reference.load_state_dict(dict(names.to_disk(disassemble(model))))
    data = batch("right")
    real = data["target_mask"]
    torch.testing.assert_close(ours(model, data)[real], reference(**data)[real], atol=1e-5, rtol=0)
    again = from_reference(reference, config, names)
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())


CHOICES: dict[str, dict[str, Any]] = {
    "paper": {},
    "pre-norm": {"norm": NormChoice(placement="pre")},
    "sandwich RMS": {"norm": NormChoice("rms", "sandwich")},
    "batch norm": {"norm": NormChoice("batch", "pre")},
    "final norms": {"norm": NormChoice(final=True)},
    "learned": {"positions": PositionChoice("learned", length=12)},
    "gated positions": {"positions": PositionChoice("sinusoidal", "gate")},
    "concatenated": {"positions": PositionChoice("learned", "concatenate", 12, width=5), "ties": "none"},
    "no positions": {"positions": PositionChoice("none", "concatenate")},
    "grouped": {"attention": AttentionChoice(heads=4, groups=2, dropout=0.1)},
    "multi-query": {"attention": AttentionChoice(heads=4, groups=1)},
    **{kind: {"feedforward": FeedForwardChoice(24, kind, 0.1)} for kind in ("relu", "gelu", "silu")},
    **{kind: {"feedforward": FeedForwardChoice(24, kind)} for kind in ("reglu", "geglu", "swiglu")},
    "untied": {"ties": "none"},
    "all tied": {"ties": "all", "source_vocabulary": 19},
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_builds_trains_and_survives_its_file(name: str) -> None:
    config = SMALL.replace(dropout=0.1, **CHOICES[name])
    assert Transformer2017.from_json(config.to_json()) == config
    assert Transformer2017.from_toml(config.to_toml()) == config
    spec = config.spec()
    assert Transformer.from_json(spec.to_json()) == spec
    model = spec.build()
    assert isinstance(model, TransformerPart)
    data = batch("right")
    data["source"] %= 19
    loss = ours(model, data)[data["target_mask"]].square().mean()
    torch.autograd.backward(loss)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    again = assemble(spec, disassemble(model)).eval()
    assert isinstance(again, TransformerPart)
    assert ours(again, data).equal(ours(model.eval(), data))


def test_the_base_model_of_the_paper() -> None:
    spec = Transformer2017(37_000, 37_000, ties="all").spec()
    model = spec.build("meta")
    assert parameters_of(model) == 63_082_496
    kinds = [type(record).__name__ for path, record in walk(spec) if path.startswith("encoder.blocks.0.steps.0")]
    assert kinds == ["Residual", "Attention", *["Linear"] * 4, "Heads", "Everyone", "Softmax", "Dropout", "LayerNorm"]
    assert len(spec.to_json().splitlines()) < 300
    placed = {path for path, record in walk(spec) if type(record).__name__ == "Dropout"}
    assert {path.rsplit(".", 1)[1] for path in placed} == {"post", "dropout"}
    assert {path for path in placed if path.endswith("dropout")} == {"source.dropout", "target.dropout"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18}, "a width of 18 can't be cut into 4 heads"),
        ({"attention": AttentionChoice(4, 3)}, "4 heads can't share 3"),
        ({"ties": "all"}, "only in a joint vocabulary"),
        ({"ties": "al"}, "did you mean 'all'"),
        ({"positions": PositionChoice("sinusoidal", "concatenate")}, "choose ties = 'none'"),
        (
            {"positions": PositionChoice("sinusoidal", "concatenate", width=16), "ties": "none"},
            "no width to the tokens",
        ),
        ({"positions": PositionChoice("learned")}, "need a length"),
        ({"source_vocabulary": None}, "source_vocabulary and target_vocabulary must be known"),
    ],
)
def test_choices_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SMALL.replace(**changes).spec()
