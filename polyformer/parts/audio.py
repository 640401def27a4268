"""Sound as rows: convolutions over a waveform or its spectrum, masked spans in training.

Shape letters: B batch, C channels of a spectrum, T samples or frames, S rows, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.parts.flow import start_flow
from polyformer.parts.inputs import Given, InputPart
from polyformer.parts.part import Part
from polyformer.parts.positions import Position
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Frames(Spec):
    """Sound to rows: dropout(stem(sound) + positions).

    `channels` are those of a spectrum; None is for a waveform itself. Padding, on the right, is "masked", or it is
    silence that the model was trained to hear, as Whisper was; then a mask is an error.
    """

    stem: Spec
    channels: int | None = None
    positions: Position | None = None
    dropout: Spec | None = None
    padding: Literal["masked", "heard"] = "masked"

    def check(self) -> None:
        self.require(self.channels is None or self.channels > 0, "channels must be at least 1")

    def module(self) -> Part:
        return FramesPart(self)


class MaskedSpans(Spec):
    """In training, spans of rows are replaced by a trained vector, and spans of channels by zeros.

    SpecAugment (Park et al. 2019) as wav2vec 2.0 has it (Baevski et al. 2020, section 3.1): about `rate` · S / `length`
    spans of `length` rows, but at least `least`, begin at places drawn without replacement and may overlap; and
    likewise among the channels, with `channel_rate` and so on.
    """

    width: int
    rate: float
    length: int = 10
    least: int = 2
    channel_rate: float = 0.0
    channel_length: int = 10
    channel_least: int = 0

    def check(self) -> None:
        self.require(min(self.width, self.length, self.channel_length) > 0, "width and lengths must be at least 1")
        self.require(0 <= self.rate <= 1 and 0 <= self.channel_rate <= 1, "rates must be between 0 and 1")

    def module(self) -> Part:
        return MaskedSpansPart(self)


class FramesPart(InputPart):
    """A waveform [B, T] or a spectrum [B, C, T] -> [B, S, D]; the mask is [B, T]."""

    stem: Part
    positions: Part | None
    dropout: Part | None

    def __init__(self, spec: Frames) -> None:
        super().__init__(spec)
        self.main = "input_values" if spec.channels is None else "input_features"
        self.channels, self.padding = spec.channels, spec.padding

    def begin(self, given: Given) -> Flow:
        shape, wanted = list(given.input.shape), "[batch, samples]"
        fits = len(shape) == 2
        if self.channels is not None:
            fits, wanted = len(shape) == 3 and shape[1] == self.channels, f"[batch, {self.channels}, frames]"
        if not fits or not given.input.is_floating_point():
            told = f"{self.main} is of {given.input.dtype} and shape {shape}"
            raise SpecError(f"{told}; this model needs floats {wanted}")
        if given.mask is not None and self.padding == "heard":
            raise SpecError("this model hears padding as silence, so it takes no attention mask for sound")
        empty = given.input.new_empty((shape[0], shape[-1], 0))
        flow = start_flow(empty, given.mask, given.documents, given.cache)
        flow.inputs = dict(given.others)
        return flow

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        x = x.to(self.precision)
        x = self.stem(x[..., None] if self.channels is None else x.transpose(1, 2), flow)
        if self.positions is not None:
            x = x + self.positions(x, flow)
        return x if self.dropout is None else self.dropout(x, flow)


class MaskedSpansPart(Part):
    """x [B, S, D] -> the same shape; nothing in evaluation."""

    def __init__(self, spec: MaskedSpans) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.width))
        if not self.weight.is_meta:
            nn.init.uniform_(self.weight)
        self.rows = (spec.rate, spec.length, spec.least)
        self.channels = (spec.channel_rate, spec.channel_length, spec.channel_least)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        if not self.training:
            return x
        batch, length, width = x.shape
        if self.rows[0]:
            real = flow.rows_valid
            lengths = [length] * batch if real is None else real.sum(1).tolist()
            x = torch.where(_spans(lengths, length, *self.rows).to(x.device)[..., None], self.weight.to(x.dtype), x)
        if self.channels[0]:
            x = x.masked_fill(_spans([width] * batch, width, *self.channels).to(x.device)[:, None], 0.0)
        return x


def _spans(lengths: list[int], room: int, rate: float, length: int, least: int) -> Tensor:
    """Draw spans within the first so many places of each row: booleans [B, room]."""
    found = torch.zeros(len(lengths), room, dtype=torch.bool)
    rounding = float(torch.rand(()))
    for row, places in zip(found, lengths, strict=True):
        starts = places - length + 1
        count = min(max(int(rate * places / length + rounding), least), places // length, starts)
        for start in torch.randperm(max(starts, 0))[: max(count, 0)].tolist():
            row[start : start + length] = True
    return found
