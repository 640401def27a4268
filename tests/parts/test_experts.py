"""Mixture of experts against a loop over rows, its capacity, and the losses of its router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Attention,
    Causal,
    Chain,
    Embed,
    Experts,
    FeedForward,
    Gated,
    Linear,
    Residual,
    RMSNorm,
    RouterLosses,
    Routing,
    Stack,
    TokenEmbedding,
    Trace,
    Transformer,
    routing_loss,
    routing_trace,
)
from polyformer.parts.flow import start_flow
from polyformer.spec import Record

WIDTH, COUNT = 6, 5
EXPERT = FeedForward.gated(WIDTH, 8)


def experts(chosen: int = 2, **changes: Any) -> Any:
    """Return experts in float64 whose router decides clearly, so that no rounding changes a choice."""
    torch.manual_seed(1)
    part = Experts.of(EXPERT, WIDTH, COUNT, chosen).replace(**changes).build(dtype=torch.float64)
    with torch.no_grad():
        part.router.weight.normal_(std=2)
    return part


def rows(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


def one_by_one(part: Any, x: Tensor, normalised: bool) -> Tensor:
    """Each row by itself: its probabilities, its experts, their sum."""
    made = []
    for row in x.flatten(0, 1):
        probabilities = part.router(row).softmax(-1)
        best = probabilities.argsort(descending=True)[: part.chosen].tolist()
        share = probabilities[best].sum() if normalised else 1.0
        flow = start_flow(row[None, None])
        made.append(sum(probabilities[e] / share * part.experts[e](row[None, None], flow)[0, 0] for e in best))
    return torch.stack(made).view_as(x)


@pytest.mark.parametrize("weights", ["all", "chosen"])
@pytest.mark.parametrize("chosen", [1, 2, COUNT])
def test_it_is_the_weighted_sum_of_the_best_experts(chosen: int, weights: str) -> None:
    part, x = experts(chosen, weights=weights), rows()
    found, expected = part(x, start_flow(x)), one_by_one(part, x, weights == "chosen")
    torch.testing.assert_close(found, expected)
    toward = torch.randn_like(x)
    own = torch.autograd.grad((found * toward).sum(), list(part.parameters()), allow_unused=True)
    theirs = torch.autograd.grad((expected * toward).sum(), list(part.parameters()), allow_unused=True)
    for one, other in zip(own, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_an_expert_runs_once_on_all_of_its_rows() -> None:
    part, x = experts(), rows(3, 11)
    sizes: list[int] = []
    for expert in part.experts:
        expert.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    part(x, start_flow(x))
    assert len(sizes) <= COUNT
    assert sum(sizes) == 3 * 11 * 2


def test_rows_don_t_know_of_each_other() -> None:
    part, x = experts(), rows(2, 9)
    whole = part(x, start_flow(x))
    alone = torch.stack([part(x[:, i : i + 1], start_flow(x[:, i : i + 1]))[:, 0] for i in range(9)], 1)
    torch.testing.assert_close(whole, alone)
    assert part(x[:, :0], start_flow(x[:, :0])).shape == (2, 0, WIDTH)


def all_to(part: Any, expert: int) -> None:
    """Let the router choose one expert for whatever has a positive first element."""
    with torch.no_grad():
        part.router.weight.zero_()
        part.router.weight[expert, 0] = 10


def test_an_expert_takes_the_first_rows_of_a_sequence_only() -> None:
    part, x = experts(1, weights="all", capacity=2), rows(2, 5)
    x[..., 0] = 1
    all_to(part, 3)
    made = part(x, start_flow(x))
    free = experts(1, weights="all")
    all_to(free, 3)
    torch.testing.assert_close(made[:, :2], free(x, start_flow(x))[:, :2])
    assert (made[:, :2] != 0).all()
    assert (made[:, 2:] == 0).all()


def test_padding_takes_no_capacity() -> None:
    part, x = experts(1, weights="all", capacity=2), rows(1, 5)
    x[..., 0] = 1
    all_to(part, 3)
    made = part(x, start_flow(x, torch.tensor([[0, 0, 1, 1, 1]])))
    assert (made[:, 2:4] != 0).all()
    assert (made[:, 4] == 0).all()


def test_jitter_is_for_training() -> None:
    part, x = experts(jitter=0.3), rows()
    assert part.eval()(x, start_flow(x)).equal(experts()(x, start_flow(x)))
    part.train()
    assert not part(x, start_flow(x)).equal(part(x, start_flow(x)))


def test_an_expert_for_all_in_its_own_measure() -> None:
    part: Any = Gated(EXPERT, Linear(WIDTH, 1, bias=False)).build(dtype=torch.float64)
    x = rows()
    flow = start_flow(x)
    expected = torch.sigmoid(x @ part.gate.weight.T) * part.op(x, flow)
    torch.testing.assert_close(part(x, flow), expected)


def test_a_router_that_does_not_care_is_balanced() -> None:
    """Equation 4: the loss is 1 a choice when experts are chosen alike, and E when one gets all."""
    even = Routing(torch.zeros(COUNT, COUNT), torch.arange(COUNT)[:, None])
    assert float(even.balance()) == pytest.approx(1)
    lopsided = Routing(torch.eye(COUNT)[:1].repeat(8, 1) * 50, torch.zeros(8, 1, dtype=torch.long))
    assert float(lopsided.balance()) == pytest.approx(COUNT)


def test_the_losses_of_the_router_by_their_equations() -> None:
    scores = torch.randn(4, 3, requires_grad=True)
    real = torch.tensor([True, True, False, True])
    chosen = scores.topk(2).indices
    routing = Routing(scores, chosen, real)
    kept = scores.detach()[real]
    load = torch.stack([(chosen[real] == e).sum() / 3 for e in range(3)])
    torch.testing.assert_close(routing.balance().detach(), 3 * (load * kept.softmax(-1).mean(0)).sum())
    torch.testing.assert_close(routing.magnitude().detach(), kept.exp().sum(-1).log().square().mean())
    (routing.balance() + routing.magnitude()).backward()
    assert scores.grad is not None
    assert (scores.grad[real] != 0).any()
    assert (scores.grad[~real] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_of_the_reference(masked: bool) -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    scores = torch.randn(12, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]) if masked else None
    wanted = mixtral.load_balancing_loss_func((scores,), 5, 2, mask)
    found = Routing(scores, scores.topk(2).indices, None if mask is None else mask.flatten().bool()).balance()
    torch.testing.assert_close(found, wanted)


def test_a_trace_asks_for_routing_alone() -> None:
    """In training, nothing but the routers' scores is kept, and their loss reaches the routers."""
    looking = Residual(Attention.of_width(WIDTH, 2, Causal()))
    block = Chain((Residual(Experts.of(EXPERT, WIDTH, COUNT, 2), pre=RMSNorm(WIDTH)), looking))
    model: Any = Transformer(target=Embed(TokenEmbedding(9, WIDTH)), decoder=Stack((block, block))).build()
    trace = Trace(wants=frozenset(("routing",)))
    model(torch.randint(9, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), trace=trace)
    assert list(trace.routing) == ["decoder.0.steps.0.op", "decoder.1.steps.0.op"]
    assert not trace.attention
    everything = Trace()
    model(torch.randint(9, (2, 4)), trace=everything)
    assert list(everything.attention) == ["decoder.0.steps.1.op", "decoder.1.steps.1.op"]
    assert everything.routing.keys() == trace.routing.keys()
    routing = trace.routing["decoder.1.steps.0.op"]
    assert routing.scores.shape == (8, COUNT)
    assert routing.real is not None
    assert int(routing.real.sum()) == 6
    torch.stack([one.balance() for one in trace.routing.values()]).mean().backward()
    router = model.decoder.blocks[0].steps[0].op.router
    assert router.weight.grad.abs().sum() > 0


LOSSES = RouterLosses(0.3, 0.05)


def layered(losses: RouterLosses | None, count: int = COUNT) -> Any:
    """Return a decoder of two layers of experts, the second of them with `count`."""
    blocks = [
        Residual(Experts.of(EXPERT, WIDTH, size, 2).replace(losses=losses), pre=RMSNorm(WIDTH))
        for size in (COUNT, count)
    ]
    return Transformer(target=Embed(TokenEmbedding(9, WIDTH)), decoder=Stack(tuple(blocks))).build(dtype=torch.float64)


class TestLossesInTraining:
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    mask = ids.gt(0).long()

    def traced(self, model: Any) -> Trace:
        trace = routing_trace(model)
        assert trace is not None
        model(self.ids, self.mask, trace=trace)
        return trace

    def test_only_models_that_have_them_are_traced(self) -> None:
        assert routing_trace(layered(None)) is None
        trace = self.traced(layered(LOSSES))
        assert trace.wants == {"routing"}
        assert len(trace.routing) == 2
        assert float(routing_loss(Trace())) == 0

    def test_the_mean_of_the_layers(self) -> None:
        trace = self.traced(layered(LOSSES))
        each = [0.3 * one.balance() + 0.05 * one.magnitude() for one in trace.routing.values()]
        torch.testing.assert_close(routing_loss(trace), (each[0] + each[1]) / 2)

    def test_one_loss_of_all_rows(self) -> None:
        """As the reference works it out, padding left out."""
        mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
        trace = self.traced(layered(LOSSES.replace(over="all layers")))
        scores = tuple(one.scores for one in trace.routing.values())
        wanted = 0.3 * mixtral.load_balancing_loss_func(scores, COUNT, 2, self.mask)
        z = torch.stack([score[self.mask.flatten().bool()].logsumexp(-1).square().mean() for score in scores]).mean()
        torch.testing.assert_close(routing_loss(trace).float(), (wanted + 0.05 * z).float(), atol=1e-6, rtol=1e-6)

    def test_stacks_add_up(self) -> None:
        one = Routing(torch.randn(4, 3), torch.tensor([[0], [1], [1], [2]]), losses=LOSSES)
        both = Trace(routing={"encoder.0.op": one, "decoder.0.op": one})
        torch.testing.assert_close(routing_loss(both), 2 * routing_loss(Trace(routing={"encoder.0.op": one})))

    def test_padding_counts_for_nothing(self) -> None:
        model = layered(LOSSES)
        found = routing_loss(self.traced(model))
        trace = routing_trace(model)
        model(
            torch.cat((torch.full((2, 3), 5), self.ids), 1),
            torch.cat((self.mask[:, :3] * 0, self.mask), 1),
            trace=trace,
        )
        torch.testing.assert_close(found, routing_loss(trace))

    def test_layers_with_other_numbers_of_experts(self) -> None:
        assert routing_loss(self.traced(layered(LOSSES, 3))) > 0
        with pytest.raises(SpecError, match="layers of 3 and of 5 experts have no loss in common"):
            routing_loss(self.traced(layered(LOSSES.replace(over="all layers"), 3)))

    def test_weights_are_positive(self) -> None:
        with pytest.raises(SpecError, match="balance and magnitude can't be negative"):
            RouterLosses(-0.1)

    def test_they_balance_a_lopsided_router(self) -> None:
        """Trained on nothing else, the rows are soon shared out."""
        part = Experts.of(EXPERT, WIDTH, COUNT, 2)
        part = part.replace(router=Linear(WIDTH, COUNT), losses=RouterLosses(1.0, 0.0))
        model: Any = Transformer(target=Embed(TokenEmbedding(9, WIDTH)), decoder=Stack((part,))).build()
        ids = torch.randint(9, (8, 16))
        with torch.no_grad():
            model.decoder.blocks[0].router.bias[0] = 5
        optimiser = torch.optim.Adam(model.parameters(), 0.02)
        found = []
        for _ in range(40):
            trace = routing_trace(model)
            model(ids, trace=trace)
            loss = routing_loss(trace)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(float(loss.detach()))
        assert found[-1] < 2.1 < 2.3 < found[0]


def test_experts_without_rows_get_no_gradient() -> None:
    part, x = experts(1, weights="all"), rows(2, 5)
    x[..., 0] = 1
    all_to(part, 3)
    part(x, start_flow(x)).sum().backward()
    assert [expert.up.weight.grad is not None for expert in part.experts] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"chosen": 6}, "6 of 5 experts"),
        ({"chosen": 0}, "0 of 5 experts"),
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"jitter": 1.0}, "jitter must be in"),
        ({"router": Linear(WIDTH, 4)}, "a router to 4 has 5 experts"),
    ],
)
def test_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Experts.of(EXPERT, WIDTH, COUNT, 2).replace(**changes)


def test_many_experts_are_a_short_file() -> None:
    spec = Experts.of(EXPERT, WIDTH, 128, 8)
    assert Record.from_json(spec.to_json()) == spec
    assert len(spec.to_json()) < 1000
