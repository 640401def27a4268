"""One random checkpoint of a family, and what is given to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["text", "pairs", "pixels", "features", "captions", "sound"]


@dataclass(frozen=True)
class Case:
    """A model of the reference library with small random weights.

    Attributes:
        name: what the test is called.
        model, config: names of its classes in the reference library; `keys` go to the configuration.
        given: what it reads: "text"; "pairs" of texts; "pixels" (images); "features" (log-mel) and text; "captions"
            (images and text); "sound" (a waveform, for an encoder alone).
        sizes: shapes of non-text inputs, without the batch.
        vocabulary: ids are drawn from 3 to this.
        extra: further inputs [B, S] and the number of their values, such as {"token_type_ids": 2}.
        ends: each text ends with this token, where the head needs one.
        padding: what stands behind the mask; ordinary tokens if None.
        lengths: of the three texts.
        untied: gives the head over words a matrix of its own, which some files have against their configuration.
        cached: whether the model can be read token by token.
        tolerance: the largest difference of logits and hidden rows that is let pass.
        noise: how far parameters are moved from their start.
    """

    name: str
    model: str
    config: str
    keys: dict[str, Any] = field(hash=False)
    given: Kind = "text"
    sizes: tuple[int, ...] = ()
    vocabulary: int = 49
    extra: dict[str, int] = field(default_factory=dict, hash=False)
    ends: int | None = None
    padding: int | None = None
    lengths: tuple[int, int, int] = (7, 4, 1)
    untied: bool = False
    cached: bool = False
    tolerance: float = 1e-5
    noise: float = 0.1

    def __str__(self) -> str:
        return self.name

    @property
    def main(self) -> str:
        """The name of the main input."""
        names = {"pixels": "pixel_values", "captions": "pixel_values", "features": "input_features"}
        return names.get(self.given, "input_values" if self.given == "sound" else "input_ids")

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Three sequences of odd lengths (or images), padded on the right with ordinary tokens."""
        chance = torch.Generator().manual_seed(seed)

        def ids(length: int, count: int = self.vocabulary, low: int = 3) -> Tensor:
            return torch.randint(low, count, (3, length), generator=chance)

        def mask(length: int, rows: tuple[int, ...]) -> Tensor:
            return (torch.arange(length) < torch.tensor(rows)[:, None]).long()

        found: dict[str, Tensor] = {}
        if self.given in ("text", "pairs"):
            length = max(self.lengths)
            found = {"input_ids": ids(length), "attention_mask": mask(length, self.lengths)}
            found |= {name: ids(length, count, 0) for name, count in self.extra.items()}
        else:
            found = {self.main: torch.randn((3, *self.sizes), generator=chance)}
        if self.given in ("pairs", "features", "captions"):
            found |= {"decoder_input_ids": ids(5), "decoder_attention_mask": mask(5, (3, 5, 2))}
        if self.ends is not None:
            for side in ("", "decoder_"):
                if f"{side}input_ids" in found:
                    last = found[f"{side}attention_mask"].sum(1) - 1
                    found[f"{side}input_ids"][torch.arange(3), last] = self.ends
        if self.padding is not None:
            found["input_ids"].masked_fill_(found["attention_mask"] == 0, self.padding)
        return found
