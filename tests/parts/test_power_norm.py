"""PowerNorm against its algorithm written out with loops; warm-up, padding and resuming."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import Chain, PowerNorm, RMSNorm
from polyformer.parts.flow import start_flow
from tests.parts.models import WIDTH, Shape, build, decoder, gradients, pad, sentences

EPS = 1e-5


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 3 + 2


def norm(width: int = 3, momentum: float = 0.3, warmup: int = 0):
    return PowerNorm(width, EPS, momentum, warmup).build(dtype=torch.float64)


class ByHand:
    """Algorithm 2 for one feature, in plain numbers; α is 1 - momentum."""

    def __init__(self, alpha: float) -> None:
        self.alpha, self.square, self.slope = alpha, 1.0, 0.0

    def step(self, x: list[float], gradient: list[float]) -> tuple[list[float], list[float]]:
        """Return x̂ and ∂L/∂x, given ∂L/∂x̂."""
        scale = math.sqrt(self.square + EPS)
        scaled = [one / scale for one in x]
        back = [(g - self.slope * one) / scale for g, one in zip(gradient, scaled, strict=True)]
        gamma = sum(one * one for one in scaled) / len(x)
        product = sum(g * one for g, one in zip(gradient, scaled, strict=True)) / len(x)
        self.slope = self.slope * (1 - (1 - self.alpha) * gamma) + (1 - self.alpha) * product
        self.square = self.alpha * self.square + (1 - self.alpha) * sum(one * one for one in x) / len(x)
        return scaled, back


@pytest.mark.parametrize("momentum", [0.1, 0.3, 1.0])
def test_both_passes_are_the_papers(momentum: float) -> None:
    part, hands = norm(momentum=momentum), [ByHand(1 - momentum) for _ in range(3)]
    with torch.no_grad():
        part.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        part.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    for _ in range(4):
        x, upper = rows(2, 5, 3).requires_grad_(), rows(2, 5, 3)
        found = part(x, start_flow(x))
        found.backward(upper)
        for i, hand in enumerate(hands):
            gain, bias = part.weight[i].item(), part.bias[i].item()
            own = (upper[..., i] * gain).flatten().tolist()
            scaled, back = hand.step(x[..., i].flatten().tolist(), own)
            expected = torch.tensor(scaled, dtype=torch.float64).view(2, 5)
            torch.testing.assert_close(found[..., i], gain * expected + bias)
            torch.testing.assert_close(x.grad[..., i], torch.tensor(back, dtype=torch.float64).view(2, 5))
            assert float(part.running_square[i]) == pytest.approx(hand.square)
            assert float(part.running_slope[i]) == pytest.approx(hand.slope)


def test_gradients_of_gain_and_bias() -> None:
    part, x, upper = norm(), rows(2, 5, 3), rows(2, 5, 3)
    part.running_square.copy_(torch.tensor([1.0, 4.0, 9.0]))
    scaled = x / torch.sqrt(part.running_square + EPS)
    part(x, start_flow(x)).backward(upper)
    torch.testing.assert_close(part.weight.grad, (scaled * upper).sum((0, 1)))
    torch.testing.assert_close(part.bias.grad, upper.sum((0, 1)))


class TestWarmUp:
    def test_it_is_the_batchs_own_with_the_exact_gradient(self) -> None:
        part = norm(warmup=2)
        for _ in range(2):
            x, upper = rows(2, 5, 3).requires_grad_(), rows(2, 5, 3)
            plain = x.detach().clone().requires_grad_()
            expected = plain / torch.sqrt(plain.square().mean((0, 1)) + EPS)
            found = part(x, start_flow(x))
            torch.testing.assert_close(found, expected)
            found.backward(upper)
            expected.backward(upper)
            torch.testing.assert_close(x.grad, plain.grad)

    def test_it_gathers_the_mean_of_all_batches_and_then_ends(self) -> None:
        part, batches = norm(warmup=3), [rows(2, 5, 3) for _ in range(4)]
        for x in batches[:3]:
            part(x, start_flow(x))
        gathered = torch.stack([x.square().mean((0, 1)) for x in batches[:3]]).mean(0)
        torch.testing.assert_close(part.running_square, gathered)
        found = part(batches[3], start_flow(batches[3]))
        torch.testing.assert_close(found, batches[3] / torch.sqrt(gathered + EPS))

    def test_evaluation_uses_what_was_gathered_and_changes_nothing(self) -> None:
        part, x = norm(warmup=3), rows(2, 5, 3)
        part(x, start_flow(x))
        kept = {name: tensor.clone() for name, tensor in part.state_dict().items()}
        y = rows(2, 5, 3)
        torch.testing.assert_close(part.eval()(y, start_flow(y)), y / torch.sqrt(x.square().mean((0, 1)) + EPS))
        assert all(torch.equal(tensor, kept[name]) for name, tensor in part.state_dict().items())


@pytest.mark.parametrize("warmup", [0, 9])
class TestPadding:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_is_unpadded(self, side: str, warmup: int) -> None:
        texts, uppers = [rows(n, 3) for n in (3, 1, 5)], [rows(n, 3) for n in (3, 1, 5)]
        padded, upper = torch.full((3, 8, 3), 9.0, dtype=torch.float64), torch.zeros(3, 8, 3, dtype=torch.float64)
        mask = torch.zeros(3, 8)
        for i, text in enumerate(texts):
            place = slice(0, len(text)) if side == "right" else slice(8 - len(text), 8)
            padded[i, place], upper[i, place], mask[i, place] = text, uppers[i], 1
        batched, alone = norm(warmup=warmup), norm(warmup=warmup)
        for part in (batched, alone):
            part.running_slope.fill_(0.7)
        padded.requires_grad_()
        together = torch.cat(texts)[None].requires_grad_()
        found, expected = batched(padded, start_flow(padded, mask)), alone(together, start_flow(together))
        torch.testing.assert_close(found[mask.bool()], expected[0])
        found.backward(upper)
        expected.backward(torch.cat(uppers)[None])
        torch.testing.assert_close(padded.grad[mask.bool()], together.grad[0])
        assert not padded.grad[~mask.bool()].any()
        for name, tensor in batched.state_dict().items():
            torch.testing.assert_close(tensor, alone.state_dict()[name], msg=name)

    def test_a_batch_of_padding_alone_changes_nothing(self, warmup: int) -> None:
        part, x = norm(warmup=warmup), rows(2, 3, 3)
        kept = {name: tensor.clone() for name, tensor in part.state_dict().items()}
        assert torch.isfinite(part(x, start_flow(x, torch.zeros(2, 3)))).all()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in part.state_dict().items())


def test_resumed_training_is_the_same() -> None:
    whole, first, second = norm(warmup=2), norm(warmup=2), norm(warmup=2)
    for i in range(6):
        if i == 3:
            second.load_state_dict(first.state_dict())
        x, upper = rows(1, 4, 3), rows(1, 4, 3)
        given = [x.clone().requires_grad_() for _ in range(2)]
        parts = whole, first if i < 3 else second
        for part, one in zip(parts, given, strict=True):
            part(one, start_flow(one)).backward(upper)
        assert torch.equal(given[0].grad, given[1].grad)
    assert torch.equal(whole.running_slope, second.running_slope)


def test_in_a_model_padded_is_unpadded_while_training() -> None:
    spec = decoder(Shape())
    first = spec.decoder.blocks[0]
    scaled = Chain((RMSNorm(WIDTH, gain=False), PowerNorm(WIDTH, warmup=1)))
    block = first.replace(steps=tuple(step.replace(after=scaled) for step in first.steps))
    spec = spec.replace(decoder=spec.decoder.replace(blocks=(block, block)))
    models = [build(spec).train() for _ in range(2)]
    ids, mask = pad(sentences((6, 6)), "left", 9)
    for _ in range(3):
        plain = models[0](torch.stack(sentences((6, 6)))).hidden
        padded = models[1](ids, mask).hidden[:, 3:]
        torch.testing.assert_close(padded, plain)
        found = [gradients(*pair) for pair in zip(models, (plain.pow(3).sum(), padded.pow(3).sum()), strict=True)]
        for name, one in found[0].items():
            torch.testing.assert_close(one, found[1][name], msg=name)


def test_under_autocast() -> None:
    part, x = PowerNorm(4).build(), torch.randn(2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = part(x.bfloat16(), start_flow(x))
    torch.testing.assert_close(out.float(), PowerNorm(4).build()(x, start_flow(x)), rtol=0.05, atol=0.05)
    assert part.running_square.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "width must be at least 1"),
        ({"width": 2, "momentum": 0.0}, r"momentum must be in \(0, 1\], not 0.0"),
        ({"width": 2, "warmup": -1}, "warmup can't be negative"),
    ],
)
def test_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        PowerNorm(**values)
