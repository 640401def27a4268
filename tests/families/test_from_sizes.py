"""Models that are made from sizes: Performer, Linformer and RetNet as whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.families import GMLP, LinformerLM, PerformerLM, RetNet
from polyformer.parts import Retention
from polyformer.parts.flow import GrowingCache
from polyformer.parts.model import TransformerPart
from polyformer.spec import Record, rewrite, walk

PERFORMER = PerformerLM(13, width=16, layers=2, heads=2, head_width=8, features=6)
LINFORMER = LinformerLM(13, 9, width=16, layers=3, heads=2, rank=4)
RETNET = RetNet(13, 16, 2, 2)
IDS = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(0))


def build(spec: Any) -> TransformerPart:
    torch.manual_seed(1)
    model = spec.build(dtype=torch.float64).eval()
    assert isinstance(model, TransformerPart)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def in_pieces(model: TransformerPart, pieces: tuple[int, ...]) -> Tensor:
    """Return the logits of a text that is read piece by piece."""
    cache, found, start = GrowingCache(), [], 0
    for size in pieces:
        found.append(model(IDS[:, start : start + size], cache=cache).logits)
        start += size
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    "sizes", [PERFORMER, RETNET, GMLP(13, 9, 8, 12, 2, "forwards")], ids=lambda s: type(s).__name__
)
def test_forwards_they_write_token_by_token(sizes: Any) -> None:
    model = build(sizes.spec())
    whole = model(IDS).logits
    torch.testing.assert_close(model(IDS[:, :4]).logits, whole[:, :4])
    for pieces in ((1,) * 9, (5, 1, 3), (9,)):
        torch.testing.assert_close(in_pieces(model, pieces), whole)


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_the_three_forms_of_retnet(chunk: int) -> None:
    """Parallel (a chunk as long as the text), chunkwise, recurrent (chunks of one row): one model, one answer."""

    def cut(path: str, record: Record) -> Record:
        return record.replace(chunk=chunk) if isinstance(record, Retention) else record

    model, other = build(RETNET.spec()), build(rewrite(RETNET.spec(), cut))
    assert [one.chunk for _, one in walk(other.spec) if isinstance(one, Retention)] == [chunk] * 2
    towards = torch.randn(2, 9, 13, dtype=torch.float64)
    found, wanted = other(IDS).logits, model(IDS).logits
    torch.testing.assert_close(found, wanted)
    one, two = (
        torch.autograd.grad((x * towards).sum(), list(m.parameters())) for x, m in ((found, other), (wanted, model))
    )
    for mine, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("sizes", [PERFORMER.replace(reads="both ways"), LINFORMER], ids=lambda s: type(s).__name__)
def test_both_ways_padding_is_left_out(sizes: Any) -> None:
    model, mask = build(sizes.spec()), torch.ones(2, 9)
    mask[1, 5:] = 0
    found = model(IDS, mask).logits
    torch.testing.assert_close(found[1, :5], model(IDS[1:, :5]).logits[0])
    torch.testing.assert_close(found[0], model(IDS[:1]).logits[0])


class TestLinformerSharing:
    @pytest.mark.parametrize(
        ("sharing", "matrices"), [("heads", 6), ("key-value", 3), ("keys as values", 3), ("layers", 1)]
    )
    def test_how_many_projections_there_are(self, sharing: str, matrices: int) -> None:
        model = build(LINFORMER.replace(sharing=sharing).spec())
        assert sum("kernel" in name for name, _ in model.named_parameters()) == matrices

    def test_one_for_all_layers_learns_from_all(self) -> None:
        """Its gradient is the sum of what the layers' own copies get, also after a move and a round trip of data."""
        shared = LINFORMER.replace(sharing="layers")
        model, apart = build(shared.spec()), build(LINFORMER.replace(sharing="key-value").spec())
        apart.load_state_dict(model.state_dict())
        names = [f"encoder.blocks.{i}.steps.0.op.kernel.keys" for i in range(3)]
        towards = torch.randn(2, 9, 13, dtype=torch.float64)
        for one in (model, apart):
            (one(IDS).logits * towards).sum().backward()
        torch.testing.assert_close(model(IDS).logits, apart(IDS).logits)
        summed = sum(apart.get_parameter(name).grad for name in names)
        torch.testing.assert_close(model.get_parameter(names[2]).grad, summed)
        model = model.to(torch.float32)
        assert model.get_parameter(names[0]) is model.get_parameter(names[2])
        assert type(shared.spec()).from_json(shared.spec().to_json()) == shared.spec()


@pytest.mark.parametrize("sizes", [PERFORMER, LINFORMER, RETNET], ids=lambda s: type(s).__name__)
def test_they_are_data(sizes: Any) -> None:
    assert type(sizes).from_toml(sizes.to_toml()) == sizes
    spec = sizes.spec()
    assert type(spec).from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: PERFORMER.replace(layers=0), "sizes must be at least 1"),
        (lambda: PERFORMER.replace(function="cos"), "function should be one of"),
        (lambda: PERFORMER.replace(head_width=7).spec(), "width must be even, not 7"),
        (lambda: LINFORMER.replace(layers=0), "sizes must be at least 1"),
        (lambda: LINFORMER.replace(heads=3).spec(), "can't be cut into 3 heads"),
        (lambda: LINFORMER.replace(rank=0).spec(), "length and rank must be at least 1"),
    ],
)
def test_refused(make: Any, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        make()


def test_a_text_that_is_too_long() -> None:
    with pytest.raises(SpecError, match="9"):
        build(LINFORMER.spec())(torch.zeros(1, 10, dtype=torch.long))
