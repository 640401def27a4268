"""The chunked loss against PyTorch's own on all logits at once: values, gradients, smoothing, padding, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.bench.memory import memory_of
from polyformer.parts import Linear, LMHead
from polyformer.parts.heads import LMHeadPart
from polyformer.parts.linear import LinearPart
from polyformer.parts.part import Part
from polyformer.train import objectives
from polyformer.train.objectives import IGNORED, sequence_loss


class Scaled(LinearPart):
    """A projection that is not plain, so that the general path is taken."""

    def forward(self, x: Tensor, flow: object = None) -> Tensor:
        return super().forward(x) * 1.5


def make_head(vocabulary: int, bias: bool, plain: bool = True) -> Part:
    head = LMHead(Linear(16, vocabulary, bias)).build()
    if not plain:
        assert isinstance(head, LMHeadPart)
        head.projection = Scaled(Linear(16, vocabulary, bias))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradients_equal_full_logits(
    plain: bool, bias: bool, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "CHUNK_BYTES", 4 * 53 * 3)  # three rows a chunk
    torch.manual_seed(1)
    head = make_head(53, bias, plain).double()
    hidden = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(53, (3, 5))
    labels[0, 3:] = IGNORED
    loss = sequence_loss(head, hidden, labels, smoothing)
    (loss.objective / loss.tokens).backward()
    got = [hidden.grad, *(p.grad for p in head.parameters())]

    hidden.grad = None
    head.zero_grad()
    logits = head(hidden, None).flatten(0, 1)
    wanted = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)
    wanted.backward()
    assert loss.tokens == 13
    assert loss.objective.item() / 13 == pytest.approx(wanted.item(), rel=1e-12)
    plain_loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    assert float(loss.likelihood) == pytest.approx(plain_loss.item(), rel=1e-12)
    for a, b in zip(got, [hidden.grad, *(p.grad for p in head.parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_extreme_logits_stay_finite() -> None:
    head = make_head(11, bias=False)
    with torch.no_grad():
        next(head.parameters()).mul_(1e4)
    hidden = torch.randn(4, 16, requires_grad=True)
    loss = sequence_loss(head, hidden, torch.tensor([0, 1, 2, 3]), 0.1)
    loss.objective.backward()
    assert torch.isfinite(loss.objective)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_a_batch_of_padding_only_costs_nothing() -> None:
    head = make_head(11, bias=True)
    hidden = torch.randn(2, 3, 16, requires_grad=True)
    loss = sequence_loss(head, hidden, torch.full((2, 3), IGNORED), 0.1)
    loss.objective.backward()
    assert (loss.tokens, loss.objective.item(), float(loss.likelihood)) == (0, 0.0, 0.0)
    assert hidden.grad is None or not hidden.grad.any()


def test_logits_of_the_whole_batch_are_never_held() -> None:
    """The largest tensor made, forward and backward, is a chunk of logits and not [N, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = op(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    vocabulary, rows = 16384, 2048
    head = make_head(vocabulary, bias=False)
    hidden = torch.randn(rows, 16, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,))
    with Watch():
        sequence_loss(head, hidden, labels, 0.1).objective.backward()
    assert largest <= objectives.CHUNK_BYTES // 4 < rows * vocabulary / 4


def test_a_frozen_head_gets_no_gradient_nor_room_for_one() -> None:
    vocabulary = 4096
    labels, hidden = torch.randint(vocabulary, (8,)), torch.randn(8, 16, requires_grad=True)
    head = make_head(vocabulary, bias=True)
    (wanted,) = torch.autograd.grad(sequence_loss(head, hidden, labels).objective, hidden)
    took = []
    for learns in (True, False):
        head.requires_grad_(learns)
        took.append(memory_of(lambda: torch.autograd.grad(sequence_loss(head, hidden, labels).objective, hidden)))
    (found,) = torch.autograd.grad(sequence_loss(head, hidden, labels).objective, hidden)
    assert torch.equal(found, wanted)
    assert took[0].peak - took[1].peak >= 4 * vocabulary * 16


def test_a_large_vocabulary_gets_chunks_of_enough_rows() -> None:
    assert objectives.chunk_rows(8192) == 256
    assert objectives.chunk_rows(49152) == 128
    assert objectives.chunk_rows(2**18) == 32
    assert objectives.chunk_rows(2**26) == 1


def test_without_gradients_nothing_is_kept() -> None:
    head = make_head(11, bias=True)
    with torch.no_grad():
        loss = sequence_loss(head, torch.randn(4, 16), torch.tensor([0, 1, 2, 3]))
    assert not loss.objective.requires_grad
    assert loss.objective.item() == pytest.approx(float(loss.likelihood), rel=1e-6)


def test_autocast_uses_half_products_and_gives_gradients_of_the_parameters_kind() -> None:
    head = make_head(32, bias=True)
    hidden = torch.randn(6, 16, requires_grad=True)
    labels = torch.randint(32, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        half = sequence_loss(head, hidden, labels, 0.1)
    half.objective.backward()
    full = sequence_loss(head, hidden, labels, 0.1)
    assert half.objective.item() == pytest.approx(full.objective.item(), rel=0.02)
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in head.parameters())
