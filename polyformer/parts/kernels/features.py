"""Attention whose scores are products of feature maps, φ(q) · φ(k), so that its cost is linear in the length.

A query's answer is Σⱼ φ(q)·φ(kⱼ) vⱼ / Σⱼ φ(q)·φ(kⱼ), where keys are summed before any query asks. The rules `Everyone`,
`Causal` and `SameDocument` can be honoured so; others, and score biases, are errors that name the kernel. A cache holds
the sums, which are as large after one token as after many.

Shape letters: B batch, S queries, K keys, H heads, G key/value heads, E head width, F features.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.kernels.kernel import Context, Kernel, KernelPart, beyond
from polyformer.parts.kernels.sums import CHUNK, Terms, weighted_sums
from polyformer.parts.part import Part
from polyformer.parts.rules import Causal, Everyone, Rule, SameDocument

if TYPE_CHECKING:
    from polyformer.parts.flow import Pair


class LinearAttention(Kernel):
    """φ(x) = elu(x) + 1, as many features as a head is wide (Katharopoulos et al. 2020, section 3.2.1, equation 7).

    `chunk` rows at a time are worked out against each other where order counts; it changes the cost only.
    """

    chunk: int = CHUNK

    def check(self) -> None:
        self.require(self.chunk > 0, f"chunk must be at least 1, not {self.chunk}")

    def unable(self, see: Rule) -> str:
        return beyond(see, Everyone, Causal, SameDocument)

    def module(self) -> Part:
        return LinearAttentionPart(self)


class Performer(Kernel):
    """Random features that estimate softmax attention, or another kernel (FAVOR+: Choromanski et al. 2021).

    For "exp", φ(x) = exp(w·x - |x|²/2) with x scaled by √scale (None: scale is 1/√E): positive, and in the mean over w
    φ(q)·φ(k) is exp(scale · q·k) (lemma 1). The other functions f make generalised attention, φ(x) = f(w·x) + 0.001
    (section 2.2; Performer-ReLU), which estimates no softmax, but may train better.

    The vectors w, for heads `width` wide, are Gaussian, and orthogonal within each `width` of them (section 2.4). They
    are a buffer, saved with the weights. In training, new ones are drawn after every `redraw_every` steps (0: never) by
    whoever takes the steps (`redraw`): all passes of one step have the same, so that activations can be made again.
    `chunk` is as in `LinearAttention`.

    Where the authors subtract the highest exponent of all keys and add a small number, here each key's highest exponent
    is its level in the weighted sums: nothing overflows, nothing is added, and what a query sees depends neither on
    later keys nor on other rows of the batch.

    `width` may be left open where a model will tell it (`fitted`); building needs it.
    """

    width: int | None = None
    features: int = 256
    function: Literal["exp", "relu", "sigmoid", "abs"] = "exp"
    scale: float | None = None
    chunk: int = CHUNK
    redraw_every: int = 0

    def check(self) -> None:
        self.require(self.redraw_every >= 0, "redraw_every can't be negative; 0 means never")
        sizes = (1 if self.width is None else self.width, self.features, self.chunk)
        self.require(min(sizes) > 0, "width, features and chunk must be at least 1")
        self.require(self.scale is None or self.scale > 0, f"scale must be positive, not {self.scale}")

    def unable(self, see: Rule) -> str:
        return beyond(see, Everyone, Causal, SameDocument)

    def fitted(self, width: int, length: int | None = None) -> Performer:
        told = f"random features for vectors {self.width} wide can't be those of heads {width} wide"
        self.require(self.width in (None, width), told)
        return self.replace(width=width)

    def module(self) -> Part:
        self.require(self.width is not None, "needs the width of a head to be built")
        return PerformerPart(self)


class FeaturePart(KernelPart):
    """What kernels with a feature map share; a subclass gives `map`. All is summed in float32 or wider."""

    def __init__(self, spec: LinearAttention | Performer) -> None:
        super().__init__(spec)
        self.name, self.chunk = type(spec).__name__, spec.chunk

    def map(self, x: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """Return (features, level) of x [B, G, K, E], [B, G, K, F] and [b, g, K]: φ(x) = e^level · features."""
        raise NotImplementedError

    def recall(self, new: Pair, context: Context) -> Pair:
        return new

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        with torch.autocast(qkv[0].device.type, enabled=False):
            q, k, v = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in qkv)
            ones = F.pad(v, (0, 1), value=1.0)  # so that the last column is what the others are divided by
            sums = weighted_sums((q, k, ones), Terms(self.map, self.name, self.chunk), context)
            mixed, total = sums[..., :-1], sums[..., -1:]
            return (mixed / total.masked_fill(total == 0, 1.0)).to(qkv[2].dtype)

    def weights(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        batch, groups, keys, _ = k.shape
        if keys != context.view.keys:
            raise SpecError(f"{self.name} holds sums of earlier keys, of which no attention weights can be shown")
        each = torch.eye(keys, dtype=q.dtype, device=q.device).expand(batch, groups, -1, -1)
        return self.attend((q, k, each), dataclasses.replace(context, cache=None))


class LinearAttentionPart(FeaturePart):
    """No weights."""

    def map(self, x: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        return F.elu(x) + 1, x.new_zeros(1, 1, x.shape[2])


FUNCTIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "abs": torch.abs}
"""What generalised attention makes of projections, beside the exponential."""


class PerformerPart(FeaturePart):
    """Holds the random vectors [F, E] as a buffer."""

    by_chance = frozenset(("projection",))
    projection: Tensor

    def __init__(self, spec: Performer) -> None:
        super().__init__(spec)
        self.function, self.scale, self.redraw_every = spec.function, spec.scale, spec.redraw_every
        assert spec.width is not None
        self.register_buffer("projection", torch.empty(spec.features, spec.width))
        self.redraw()

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new random vectors.

        Args:
            generator: one of the CPU; None is PyTorch's own.
        """
        if self.projection.is_meta:
            return

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        features, width = self.projection.shape
        bases, triangles = torch.linalg.qr(draw(-(-features // width), width, width))
        bases = bases * triangles.diagonal(dim1=1, dim2=2).sign()[:, None]  # which makes all directions as likely
        lengths = draw(features, width).norm(dim=1, keepdim=True)
        self.projection.copy_(bases.flatten(0, 1)[:features] * lengths)

    def map(self, x: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        width = self.projection.shape[1]
        if x.shape[-1] != width:
            raise SpecError(f"this Performer's random features are for heads {width} wide, not {x.shape[-1]}")
        x = x * (width**-0.5 if self.scale is None else self.scale) ** 0.5
        projected = x @ self.projection.to(x.dtype).T
        if self.function != "exp":
            return FUNCTIONS[self.function](projected) + 1e-3, x.new_zeros(1, 1, x.shape[2])
        exponents = projected - x.square().sum(-1, keepdim=True) / 2
        levels = exponents.detach().amax(-1)
        return (exponents - levels[..., None]).exp(), levels


def redraw(model: nn.Module, steps: int) -> None:
    """Draw new random vectors for each Performer in a model whose turn it is after so many steps of training.

    They come from PyTorch's generator, so that a run that goes on from its state draws what it would have drawn.
    """
    for part in model.modules():
        if isinstance(part, PerformerPart) and part.redraw_every and steps % part.redraw_every == 0:
            part.redraw()
