"""What a `config.json` says of rotary positions: `rope_parameters`, or the older keys in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import Dynamic, Interpolated, Llama3, Rotary, Scaling, Yarn
from polyformer.spec import Record


class RopeParameters(Record):
    """The keys of `rope_parameters`; which of them are needed depends on `rope_type`."""

    rope_theta: float
    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"]
    partial_rotary_factor: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def check(self) -> None:
        needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        for key in needed.get(self.rope_type, ("factor",)):
            self.require(getattr(self, key) is not None, f"the rope_type '{self.rope_type}' needs {key}")
        self.require(self.rope_theta > 0, f"rope_theta must be positive, not {self.rope_theta}")
        self.require(self.factor is None or self.factor > 0, f"factor must be positive, not {self.factor}")

    def rotary(self, head: int, length: int) -> Rotary:
        """Return the position scheme.

        Args:
            head: the width of a head, of which a part may be turned.
            length: that of the texts the model was made for (max_position_embeddings).
        """
        width = int(head * (1.0 if self.partial_rotary_factor is None else self.partial_rotary_factor))
        return Rotary(width, self.rope_theta, scaling=self._scaling(length))

    def _scaling(self, length: int) -> Scaling | None:
        if self.rope_type == "default":
            return None
        factor, trained = self.factor or 1.0, self.original_max_position_embeddings or length
        if self.rope_type == "linear":
            return Interpolated(factor)
        if self.rope_type == "dynamic":
            return Dynamic(factor, length)
        if self.rope_type == "llama3":
            return Llama3(factor, self.low_freq_factor or 1.0, self.high_freq_factor or 4.0, trained)
        fast, slow, whole = self.beta_fast or 32.0, self.beta_slow or 1.0, self.truncate is not False
        return Yarn(factor, trained, fast, slow, self._strength(factor), whole)

    def _strength(self, factor: float) -> float | None:
        """YaRN's factor on turned queries and keys; None where the paper's is meant."""
        if self.attention_factor is not None or not self.mscale or not self.mscale_all_dim or factor <= 1:
            return self.attention_factor
        return (0.1 * self.mscale * math.log(factor) + 1) / (0.1 * self.mscale_all_dim * math.log(factor) + 1)


def modern_rope(
    data: Mapping[str, Any], where: str, theta: float = 10000.0, share: float | None = None
) -> dict[str, Any]:
    """Return a file's content with `rope_parameters` in place of `rope_theta`, `rope_scaling` and the like.

    Args:
        theta: the family's base where the file names none.
        share: the part of a head that is turned where the file is silent; None for all of it.
    Raises:
        SpecError: both spellings at once, or a scaling that is no table.
    """
    old = {"rope_theta": theta, "rotary_emb_base": theta, "partial_rotary_factor": share, "rotary_pct": share}
    said = {key: data[key] for key in old if data.get(key) is not None}
    given = [data[key] for key in ("rope_parameters", "rope_scaling") if data.get(key)]
    if len(given) > 1:
        raise SpecError(f"{where} has both rope_parameters and rope_scaling, which may not agree; remove one of them")
    rope = given[0] if given else {}
    if not isinstance(rope, Mapping):
        raise SpecError(f"{where} should have a table of numbers as rope_parameters, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise SpecError(f"{where} scales positions by the type {rope['type']!r}, but by the rope_type {kind!r}")
    found = {
        "rope_type": kind,
        "rope_theta": said.get("rope_theta", said.get("rotary_emb_base", theta)),
        "partial_rotary_factor": said.get("partial_rotary_factor", said.get("rotary_pct", share)),
        **{key: value for key, value in rope.items() if key != "type" and value is not None},
    }
    others = {key: value for key, value in data.items() if key not in old and key != "rope_scaling"}
    return {**others, "rope_parameters": found}


def is_frequencies(table: Tensor, rotary: Rotary) -> bool:
    """Tell whether a table of frequencies, which older files hold, is the one that is computed here."""
    expected = rotary.plain() if rotary.scaling is None else rotary.scaling.frequencies(rotary, 0)
    return table.shape == expected.shape and torch.allclose(table.float(), expected, rtol=0.01, atol=1e-6)
