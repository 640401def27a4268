"""What is trained beside a part whose own tensors stay: LoRA, DoRA, IA³, and a whole part in another's place.

Shape letters: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.dropout import Dropout
from polyformer.parts.flow import Mix
from polyformer.parts.linear import Affine, AffinePart
from polyformer.parts.lora import LoRAProduct, joins
from polyformer.parts.part import Part
from polyformer.parts.positions import Position
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Adapter(Spec, abstract=True):
    """What changes a part's answer and is trained in its place.

    Attributes:
        name: parts of one adapter share it; a model can hold several adapters.
        share: how much of it acts where nobody says otherwise (`Mix`): 1 is all, 0 nothing.
    """

    name: str
    share: float

    def fits(self, base: Spec) -> str:
        """Return why it can't stand beside a part, or nothing where it can."""
        return ""


class LoRA(Adapter):
    """y + s B A x, with A [R, I] and B [O, R]: a change of low rank (Hu et al. 2022, section 4.1).

    The scale s is alpha / R or, where `scaling` is "root", alpha / √R, which keeps gradients in size as the rank grows
    (rsLoRA, Kalajdzievski 2023). A starts from a uniform distribution, B from zero: so does the change.
    """

    inputs: int
    outputs: int
    rank: int
    alpha: float
    scaling: Literal["rank", "root"] = "rank"
    dropout: Dropout | None = None

    def check(self) -> None:
        self.require(min(self.inputs, self.outputs) > 0, "inputs and outputs must be at least 1")
        self.require(self.rank > 0, f"a rank of {self.rank} changes nothing; it must be at least 1")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))

    def fits(self, base: Spec) -> str:
        return _sizes_differ(base, self.inputs, self.outputs)

    def module(self) -> Part:
        return LoRAPart(self)


class DoRA(LoRA):
    """m · (W + s B A) x / ‖W + s B A‖ by outputs: length and direction of W's rows apart (Liu et al. 2024, section 4).

    What is trained of the lengths m is their difference from those of W's rows, which starts from zero. As in the
    paper's section 4.3, no gradient goes through the norm.
    """

    def module(self) -> Part:
        return DoRAPart(self)


class IA3(Adapter):
    """A trained factor for each of a part's outputs, or of its inputs, from 1 on (Liu et al. 2022, section 3.3)."""

    width: int
    side: Literal["outputs", "inputs"] = "outputs"

    def check(self) -> None:
        self.require(self.width > 0, "width must be at least 1")

    def fits(self, base: Spec) -> str:
        whole = (self.width, None) if self.side == "inputs" else (None, self.width)
        return _sizes_differ(base, *whole)

    def module(self) -> Part:
        return IA3Part(self)


class Whole(Adapter):
    """A part of the same kind in the place of the base, trained as a whole: a task's own head, say."""

    part: Spec

    def fits(self, base: Spec) -> str:
        return "" if self.part == base else f"it would put {type(self.part).__name__} in another part's place"

    def module(self) -> Part:
        return WholePart(self)


class Adapted(Spec):
    """A part with adapters beside it, which act one after the other in their shares."""

    base: Spec
    adapters: tuple[Adapter, ...]

    def check(self) -> None:
        names = [one.name for one in self.adapters]
        self.require(bool(names), "there must be an adapter")
        twice = next((name for name in names if names.count(name) > 1), None)
        self.require(twice is None, f"two adapters beside one part are called '{twice}'")
        for one in self.adapters:
            why = one.fits(self.base)
            self.require(not why, f"the adapter '{one.name}' doesn't fit: {why}")

    def module(self) -> Part:
        return AdaptedPart(self)


def _sizes_differ(base: Spec, inputs: int | None, outputs: int | None) -> str:
    if not isinstance(base, Affine):
        return f"{type(base).__name__} has no matrix"
    own = base.inputs if inputs is None else inputs, base.outputs if outputs is None else outputs
    if own == (base.inputs, base.outputs):
        return ""
    return f"it is for {own[0]} inputs and {own[1]} outputs, and this has {base.inputs} and {base.outputs}"


class Before(NamedTuple):
    """What an adapter is told of the base's own answer, before any adapter has left its mark on it.

    Attributes:
        base: the part itself.
        x: the rows that go in [..., I]; in a merge the base's matrix [O, I].
        y: its answer to what `enter` makes of them [..., O]; in a merge what `enter` makes of the matrix.
    """

    base: Part
    x: Tensor
    y: Tensor


Merged = tuple[Tensor, Tensor | None]
"""A matrix [O, I] and a bias [O] or None."""


class AdapterPart(Part):
    """What stands beside a base; it is asked before and after it, for all rows that it acts on at once.

    Attributes:
        changes_flow: it acts by the flow that the base is given, and by nothing else.
    """

    changes_flow = False

    def around(self, flow: Flow, acting: Callable[[Flow], Acting]) -> Flow:
        """Return the flow that the base is given, for one or several sequences.

        Args:
            acting: the adapters that act on a sequence.
        """
        return flow

    def enter(self, x: Tensor, share: float) -> Tensor:
        """Return the rows that the base is given."""
        return x

    def leave(self, y: Tensor, before: Before, share: float) -> Tensor:
        """Return the answer in the place of y, which earlier adapters may have changed."""
        return y

    def joins(self, base: AffinePart, x: Tensor) -> bool:
        """Tell whether `joined` is a quicker way to what `enter`, the base and `leave` give for these rows."""
        return False

    def joined(self, base: AffinePart, x: Tensor, share: float) -> Tensor:
        """Return the answer of both."""
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None, before: Before, share: float) -> Merged:
        """Do to a matrix and a bias what `leave` does to their answer."""
        raise NotImplementedError


Acting = list[tuple[AdapterPart, float]]
"""Adapters with their shares, in order."""


class Mixing(Part):
    """A part that does one thing or another by which adapters act.

    Attributes:
        mix: the shares of adapters where the flow says nothing of them; None for those in the specs.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.mix: Mix | None = None

    def share_of(self, one: Adapter | AfterPrefix, mix: Mix | None) -> float:
        """Return the share that an adapter, or what belongs to it, has in a mix; None is this part's own."""
        mix = self.mix if mix is None else mix
        return one.share if mix is None else mix.get(one.name, 0.0)


class LoRAPart(AdapterPart):
    """y [..., O] -> y + share · s · B A x."""

    dropout: Part | None
    spec: LoRA

    def __init__(self, spec: LoRA) -> None:
        super().__init__(spec)
        self.a = nn.Parameter(torch.empty(spec.rank, spec.inputs))
        self.b = nn.Parameter(torch.zeros(spec.outputs, spec.rank))
        self.scale = spec.scale
        nn.init.kaiming_uniform_(self.a, math.sqrt(5))

    def dropped(self, x: Tensor) -> Tensor:
        """Return the rows as A sees them, in its precision."""
        x = x.to(self.a.dtype)
        return x if self.dropout is None else self.dropout(x, None)

    def narrow(self, x: Tensor, share: float) -> Tensor:
        """Return share · s · A x [..., R]; the scale is taken where rows are short."""
        return F.linear(x, self.a) * (self.scale * share)

    def leave(self, y: Tensor, before: Before, share: float) -> Tensor:
        narrow = self.narrow(self.dropped(before.x), share)
        if y.dtype != narrow.dtype:
            return y + F.linear(narrow, self.b).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), narrow.flatten(0, -2), self.b.mT).view_as(y)

    def joins(self, base: AffinePart, x: Tensor) -> bool:
        dropping = self.dropout is not None and self.training
        return type(self) is LoRAPart and not dropping and joins(base, x, self.a)

    def joined(self, base: AffinePart, x: Tensor, share: float) -> Tensor:
        y: Tensor = LoRAProduct.apply(x, self.a, self.b, base, self.scale * share)  # type: ignore[no-untyped-call]
        return y

    def merged(self, weight: Tensor, bias: Tensor | None, before: Before, share: float) -> Merged:
        return torch.addmm(weight, self.b.to(weight.dtype), self.a.to(weight.dtype), alpha=self.scale * share), bias


class DoRAPart(LoRAPart):
    """y [..., O] -> y + share · (m / ‖W + s B A‖ · (W + s B A) x - W x)."""

    spec: DoRA

    def __init__(self, spec: DoRA) -> None:
        super().__init__(spec)
        self.longer = nn.Parameter(torch.zeros(spec.outputs))

    def lengths(self, weight: Tensor) -> Tensor:
        """Return m [O], the trained lengths of the rows of W."""
        lengths: Tensor = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=self.longer.dtype)
        return self.longer + lengths

    def factors(self, weight: Tensor) -> Tensor:
        """Return m / ‖W + s B A‖ [O], for the base's matrix.

        Of the norm's square, the parts W², 2 s W·B A and (s B A)² are added up apart, so that no matrix of W's size is
        made.
        """
        with torch.no_grad():
            weight = weight.to(self.a.dtype)
            crossed = (F.linear(weight, self.a) * self.b).sum(1)
            own = (self.b @ (self.a @ self.a.mT) * self.b).sum(1)
            square = torch.linalg.vector_norm(weight, dim=1).square()
            norm: Tensor = (square + 2 * self.scale * crossed + self.scale**2 * own).clamp(min=0).sqrt()
        return self.lengths(weight) / norm

    def leave(self, y: Tensor, before: Before, share: float) -> Tensor:
        base = before.base
        assert isinstance(base, AffinePart)
        weight = base.matrix()
        factors, x = self.factors(weight), self.dropped(before.x)
        if self.dropout is None or not self.training:
            plain = before.y if base.bias is None else before.y - base.bias
        else:
            plain = F.linear(x.to(weight.dtype), weight)
        turned = factors * (plain + F.linear(self.narrow(x, 1.0), self.b).to(plain.dtype)) - plain
        return y + (turned if share == 1.0 else share * turned).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None, before: Before, share: float) -> Merged:
        _, own, plain = before
        a, b = self.a.to(own.dtype), self.b.to(own.dtype)
        turned = self.factors(own).to(own.dtype)[:, None] * torch.addmm(plain, b, a, alpha=self.scale)
        return weight + share * (turned - plain), bias


class IA3Part(AdapterPart):
    """y [..., O] -> l · y, or x [..., I] -> l · x."""

    spec: IA3

    def __init__(self, spec: IA3) -> None:
        super().__init__(spec)
        self.factors = nn.Parameter(torch.ones(spec.width))
        self.side = spec.side

    def shared(self, share: float) -> Tensor:
        """Return the factors, for a share of 0 all 1."""
        return self.factors if share == 1.0 else 1 + share * (self.factors - 1)

    def enter(self, x: Tensor, share: float) -> Tensor:
        return x * self.shared(share).to(x.dtype) if self.side == "inputs" else x

    def leave(self, y: Tensor, before: Before, share: float) -> Tensor:
        return y if self.side == "inputs" else y * self.shared(share).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None, before: Before, share: float) -> Merged:
        if self.side == "inputs":
            return weight, bias
        factors = self.shared(share).to(weight.dtype)
        return weight * factors[:, None], None if bias is None else bias * factors.to(bias.dtype)


class WholePart(AdapterPart):
    """y [..., O] -> the answer of the part itself."""

    part: Part
    spec: Whole

    def leave(self, y: Tensor, before: Before, share: float) -> Tensor:
        own = self.part(before.x, None)
        return own if share == 1.0 else torch.lerp(y, own, share)

    def merged(self, weight: Tensor, bias: Tensor | None, before: Before, share: float) -> Merged:
        assert isinstance(self.part, AffinePart)
        own, other = self.part.matrix().to(weight.dtype), self.part.bias
        if share == 1.0:
            return own, other
        return torch.lerp(weight, own, share), None if bias is None or other is None else torch.lerp(bias, other, share)


class AdaptedPart(Mixing):
    """x [..., I] -> [..., O], or whatever the base makes of what."""

    base: Part
    adapters: nn.ModuleList
    spec: Adapted

    def acting(self, mix: Mix | None) -> Acting:
        """Return the adapters that act, each with its share."""
        found = []
        for part, spec in zip(self.adapters, self.spec.adapters, strict=True):
            share = self.share_of(spec, mix)
            if share:
                assert isinstance(part, AdapterPart)
                found.append((part, share))
        return found

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        mixes = () if flow is None else flow.mixes()
        acting = [self.acting(mix) for _, mix in mixes or ((0, None),)]
        around = next((part for parts in acting for part, _ in parts if part.changes_flow), None)
        if around is not None:
            if flow is None:
                raise SpecError(f"{type(around.spec).__name__} needs to know which rows there are")
            return self.base(x, around.around(flow, lambda own: self.acting(own.mix)))
        if len(mixes) > 1:
            return self._apart(x, flow, [rows for rows, _ in mixes], acting)
        if not acting[0]:
            return self.base(x, flow)
        (first, own), *others = acting[0]
        if not others and isinstance(self.base, AffinePart) and first.joins(self.base, x):
            return first.joined(self.base, x, own)
        entering = x
        for part, share in acting[0]:
            entering = part.enter(entering, share)
        return _left(acting[0], Before(self.base, x, self.base(entering, flow)))

    def _apart(self, x: Tensor, flow: Flow | None, rows: Sequence[int], acting: Sequence[Acting]) -> Tensor:
        """Ask the base once for all rows, and for each run of them the adapters that act on it."""
        if sum(rows) != x.shape[-2 if x.is_floating_point() else -1]:
            raise SpecError("rows of several adapters can't be told apart here")
        dim = -2 if x.is_floating_point() else -1
        pieces = torch.split(x, list(rows), dim)
        entering = []
        for piece, parts in zip(pieces, acting, strict=True):
            for part, share in parts:
                piece = part.enter(piece, share)
            entering.append(piece)
        together = any(a is not b for a, b in zip(entering, pieces, strict=True))
        y = self.base(torch.cat(entering, dim) if together else x, flow)
        answers = zip(acting, pieces, torch.split(y, list(rows), -2), strict=True)
        return torch.cat([_left(parts, Before(self.base, piece, own)) for parts, piece, own in answers], -2)

    @torch.no_grad()
    def merged(self, mix: Mix | None = None) -> Merged:
        """Return the matrix and the bias of a plain part that gives the same answers.

        Raises:
            SpecError: the base is no matrix.
        """
        if not isinstance(self.base, AffinePart):
            raise SpecError(f"{type(self.base.spec).__name__} can't be merged with its adapters: it is no matrix")
        acting, bias = self.acting(mix), self.base.bias
        own = self.base.matrix()
        exact = weight = own.to(torch.promote_types(own.dtype, torch.float32))
        for part, share in acting:
            weight = part.enter(weight, share)
        before = Before(self.base, exact, weight)
        for part, share in acting:
            weight, bias = part.merged(weight, bias, before, share)
        return weight.detach().to(own.dtype), None if bias is None else bias.detach()


class AfterPrefix(Spec):
    """The positions of a text behind a prefix: places are counted from the prefix's end, where it acts.

    `name` and `share` are those of the adapter whose prefix it is, and `tokens` is how long that is.
    """

    base: Spec
    name: str
    share: float
    tokens: int

    def check(self) -> None:
        known = isinstance(self.base, Position | AfterPrefix)
        self.require(known, f"{type(self.base).__name__} is no scheme of positions")
        self.require(self.length is None or self.length > 0, f"a prefix of {self.tokens} leaves no places for a text")

    @property
    def width(self) -> int:
        """That of the vectors."""
        assert isinstance(self.base, Position | AfterPrefix)
        return self.base.width

    @property
    def length(self) -> int | None:
        """How many places are left; None for any number."""
        assert isinstance(self.base, Position | AfterPrefix)
        return None if self.base.length is None else self.base.length - self.tokens

    def module(self) -> Part:
        return AfterPrefixPart(self)


class AfterPrefixPart(Mixing):
    """Vectors for `flow.positions`: [1 or B, S] -> [1 or B, S, width]."""

    base: Part
    spec: AfterPrefix

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        mixes = flow.mixes()
        shifts = [self.spec.tokens if self.share_of(self.spec, mix) else 0 for _, mix in mixes]
        if not any(shifts):
            return self.base(x, flow)
        shift: Tensor | int = shifts[0]
        if len(mixes) > 1:
            counts = torch.tensor([rows for rows, _ in mixes], device=flow.positions.device)
            shift = torch.tensor(shifts, device=flow.positions.device).repeat_interleave(counts)[None]
        return self.base(x, dataclasses.replace(flow, positions=flow.positions + shift))


@contextmanager
def mixed(model: nn.Module, mix: Mix | None) -> Iterator[None]:
    """Within this, let these adapters act in all passes whose flow doesn't say which; None changes nothing."""
    parts = [part for part in model.modules() if isinstance(part, Mixing)] if mix is not None else []
    before = [part.mix for part in parts]
    for part in parts:
        part.mix = mix
    try:
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.mix = was


def _left(acting: Acting, before: Before) -> Tensor:
    y = before.y
    for part, share in acting:
        y = part.leave(y, before, share)
    return y
