"""AdamW with moments in 8 bits: near AdamW's steps, as good in the end, a quarter of the memory, resumed exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.shrink.codes import from_bytes
from polyformer.train.optimisers import AdamW, AdamW8, optimiser_tensors, restore_optimiser
from polyformer.train.recipe import TrainRecipe

SMALL = AdamW8(least=0, block=64)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 96), nn.GELU(), nn.Linear(96, 5))


def task() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(256, 20, generator=draw)
    return x, torch.tanh(x @ torch.randn(20, 5, generator=draw))


def steps(model: nn.Module, optimiser: torch.optim.Optimizer, count: int) -> list[float]:
    x, y = task()
    losses = []
    for group in optimiser.param_groups:
        group["lr"] = 3e-3
    for i in range(count):
        rows = slice(64 * (i % 4), 64 * (i % 4) + 64)
        loss = (model(x[rows]) - y[rows]).square().mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def test_it_learns_as_adamw_does() -> None:
    ends = [steps(model := network(), record.build(model), 400)[-4:] for record in (AdamW(), SMALL)]
    plain, eight = (sum(end) for end in ends)
    assert eight < 1.15 * plain
    assert plain < 0.2


def test_small_parameters_are_adamws_own() -> None:
    one, other = network(), network()
    steps(one, AdamW(decay=0.1).build(one), 20)
    steps(other, AdamW8(decay=0.1).build(other), 20)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_moments_are_those_of_adamw_to_the_codes_precision() -> None:
    one, other = network(), network()
    plain, eight = AdamW().build(one), SMALL.build(other)
    steps(one, plain, 1)
    steps(other, eight, 1)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        wanted, state = plain.state[a], eight.state[b]
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            found = from_bytes(state[name], state[f"{name}_scale"], 64, signed)
            scale = state[f"{name}_scale"].repeat_interleave(64)[: len(found)]
            assert bool(((found - wanted[name].view(-1)).abs() <= 0.0071 * scale).all())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the first step is made before moments are codes


def test_a_small_second_moment_stays_above_zero() -> None:
    model = nn.Linear(64, 1, bias=False)
    optimiser = SMALL.build(model)
    optimiser.param_groups[0]["lr"] = 1e-3
    model.weight.grad = torch.full((1, 64), 1e-4)
    model.weight.grad[0, 0] = 1.0
    before = model.weight.detach().clone()
    for _ in range(3):
        optimiser.step()
    assert bool((optimiser.state[model.weight]["exp_avg_sq"] > 0).all())
    assert float((model.weight.detach() - before).abs().max()) < 4e-3


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for piece in (2**20, 128):
        monkeypatch.setattr("polyformer.train.adam8.PIECE", piece)
        model = network()
        steps(model, SMALL.build(model), 5)
        found.append([one.detach().clone() for one in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_moments_take_a_quarter() -> None:
    model = nn.Linear(512, 512, bias=False)
    sizes = []
    for record in (AdamW(), AdamW8()):
        optimiser = record.build(model)
        model.weight.grad = torch.randn_like(model.weight)
        optimiser.step()
        sizes.append(sum(t.numel() * t.element_size() for t in optimiser_tensors(model, optimiser).values()))
    assert sizes[1] < 0.26 * sizes[0]


def test_it_is_resumed_exactly() -> None:
    whole = network()
    optimiser = SMALL.build(whole)
    steps(whole, optimiser, 7)
    second = copy.deepcopy(whole)
    again = SMALL.build(second)
    restore_optimiser(second, again, optimiser_tensors(whole, optimiser))
    steps(whole, optimiser, 5)
    steps(second, again, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_recipe_names_it() -> None:
    recipe = TrainRecipe.from_data({"optimiser": {"type": "AdamW8", "block": 128}})
    assert recipe.optimiser == AdamW8(block=128)
    assert TrainRecipe.from_toml(recipe.to_toml()) == recipe
    assert TrainRecipe.from_data({"optimiser": {"beta2": 0.9}}).optimiser == AdamW(beta2=0.9)
    with pytest.raises(SpecError, match="block must be at least 1"):
        AdamW8(block=0)
