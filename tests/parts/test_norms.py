"""Norms against PyTorch's and against the formulas; BatchNorm and padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.parts import BatchNorm, LayerNorm, RMSNorm
from polyformer.parts.flow import start_flow
from polyformer.spec import Spec
from tests.parts.models import WIDTH, Shape, build, decoder, pad, real, sentences
from tests.parts.reference import normalise

widths = pytest.mark.parametrize("width", [1, 3, 7, 16, 33])


def drawn(part: nn.Module) -> nn.Module:
    """Draw a part's weights anew, so that none is 1 or 0."""
    with torch.no_grad():
        for weight in part.parameters():
            weight.normal_()
    return part


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 3 + 2


@widths
@pytest.mark.parametrize("eps", [1e-5, 0.5])
class TestByTheFormula:
    @pytest.mark.parametrize(("gain", "bias"), [(True, True), (True, False), (False, True), (False, False)])
    def test_layer_norm(self, width: int, eps: float, gain: bool, bias: bool) -> None:
        x = rows(2, 3, width)
        part = drawn(LayerNorm(width, eps, gain, bias).build(dtype=torch.float64))
        expected = torch.tensor([[normalise(row.tolist(), eps) for row in one] for one in x], dtype=torch.float64)
        if gain:
            expected = expected * part.weight
        if bias:
            expected = expected + part.bias
        torch.testing.assert_close(part(x), expected)
        assert len(list(part.parameters())) == gain + bias

    def test_rms_norm(self, width: int, eps: float) -> None:
        x = rows(2, 3, width)
        part = drawn(RMSNorm(width, eps).build(dtype=torch.float64))
        expected = x / ((x**2).sum(-1, keepdim=True) / width + eps) ** 0.5 * part.weight
        torch.testing.assert_close(part(x), expected)

    def test_batch_norm_is_torchs(self, width: int, eps: float) -> None:
        own = drawn(BatchNorm(width, eps, momentum=0.3).build(dtype=torch.float64))
        other = nn.BatchNorm1d(width, eps, momentum=0.3, dtype=torch.float64)
        other.load_state_dict({"weight": own.weight, "bias": own.bias}, strict=False)
        for _ in range(3):
            x, y = (rows(2, 5, width).requires_grad_() for _ in range(2))
            with torch.no_grad():
                y.copy_(x)
            out, expected = own(x, start_flow(x)), other(y.flatten(0, 1)).view_as(y)
            torch.testing.assert_close(out, expected)
            (out**3).sum().backward()
            (expected**3).sum().backward()
            torch.testing.assert_close(x.grad, y.grad)
        torch.testing.assert_close(own.weight.grad, other.weight.grad)
        torch.testing.assert_close(own.running_mean, other.running_mean)
        torch.testing.assert_close(own.running_variance, other.running_var)
        x = rows(2, 5, width)
        expected = other.eval()(x.flatten(0, 1)).view_as(x)
        torch.testing.assert_close(own.eval()(x, start_flow(x)), expected)


class TestBatchNormAndPadding:
    def outputs(self, masked: bool, side: str) -> tuple[list[Tensor], list[Tensor], nn.Module, nn.Module]:
        texts = [rows(n, 4) for n in (3, 1, 5)]
        padded, mask = torch.full((3, 8, 4), 9.0, dtype=torch.float64), torch.zeros(3, 8)
        for i, text in enumerate(texts):
            place = slice(0, len(text)) if side == "right" else slice(8 - len(text), 8)
            padded[i, place], mask[i, place] = text, 1
        batched, alone = (BatchNorm(4, masked=masked).build(dtype=torch.float64) for _ in range(2))
        found = list(real(batched(padded, start_flow(padded, mask)), mask))
        together = torch.cat(texts)[None]
        expected = list(alone(together, start_flow(together))[0].split([3, 1, 5]))
        return found, expected, batched, alone

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_masked_statistics_are_those_of_real_tokens(self, side: str) -> None:
        found, expected, batched, alone = self.outputs(True, side)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(batched.running_mean, alone.running_mean)
        torch.testing.assert_close(batched.running_variance, alone.running_variance)

    def test_unmasked_shows_the_mistake(self) -> None:
        found, expected, batched, alone = self.outputs(False, "right")
        assert not torch.allclose(found[0], expected[0], rtol=0.05)
        assert not torch.allclose(batched.running_mean, alone.running_mean, rtol=0.05)

    def test_a_batch_of_padding_alone_changes_nothing(self) -> None:
        part = BatchNorm(4).build()
        x = torch.randn(2, 3, 4)
        assert torch.isfinite(part(x, start_flow(x, torch.zeros(2, 3)))).all()
        assert torch.equal(part.running_mean, torch.zeros(4))
        assert torch.equal(part.running_variance, torch.ones(4))

    def test_a_single_real_token(self) -> None:
        part = BatchNorm(4).build()
        x = torch.randn(1, 1, 4)
        assert torch.isfinite(part(x, start_flow(x))).all()
        assert torch.isfinite(part.running_variance).all()

    def test_under_autocast(self) -> None:
        part = BatchNorm(4).build()
        x = torch.randn(2, 3, 4)
        flow = start_flow(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = part(x.bfloat16(), flow)
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out.float(), BatchNorm(4).build()(x, flow), rtol=0.05, atol=0.05)
        assert part.running_mean.dtype == torch.float32

    def test_in_a_model_padded_is_unpadded_while_training(self) -> None:
        spec = decoder(Shape())
        first = spec.decoder.blocks[0]
        norm = first.replace(steps=tuple(step.replace(after=BatchNorm(WIDTH)) for step in first.steps))
        spec = spec.replace(decoder=spec.decoder.replace(blocks=(norm, norm)))
        models = [build(spec).train() for _ in range(2)]
        texts = sentences((6, 6))
        ids, mask = pad(texts, "left", 9)
        plain = models[0](torch.stack(texts)).hidden
        padded = models[1](ids, mask).hidden[:, 3:]
        torch.testing.assert_close(padded, plain)
        for (name, one), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
            torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("spec", [LayerNorm(5), RMSNorm(5), BatchNorm(5)], ids=lambda spec: type(spec).__name__)
def test_norms_forget_scale_and_keep_dtype(spec: Spec) -> None:
    x = torch.randn(2, 3, 5)
    part = spec.build().eval() if not isinstance(spec, BatchNorm) else spec.build()
    flow = start_flow(x)
    assert part(x, flow).shape == x.shape
    assert part(x, flow).dtype == torch.float32
    torch.testing.assert_close(part(x * 100, flow), part(x, flow), rtol=1e-3, atol=1e-3)


def test_width_must_be_positive() -> None:
    with pytest.raises(SpecError, match="width must be at least 1"):
        RMSNorm(0)
