"""Published architectures: one file each, listed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyformer.errors import SpecError, suggest
from polyformer.families.config import Family, read_config
from polyformer.families.marian import Marian
from polyformer.families.transformer import Transformer2017

FAMILIES: tuple[type[Family], ...] = (Marian,)
"""The families that are read from a `config.json`. `Transformer2017` is made from a recipe instead."""

__all__ = ["FAMILIES", "Family", "Marian", "Transformer2017", "family_of", "read_family"]


def family_of(model_type: str) -> type[Family]:
    """Return the family that a `config.json` calls so; raises `SpecError`, naming the near one, if there is none."""
    known = {family.model_type: family for family in FAMILIES}
    if model_type not in known:
        raise SpecError(f"there is no family '{model_type}'{suggest(model_type, known)}")
    return known[model_type]


def read_family(data: Mapping[str, Any], where: str) -> Family:
    """Read a `config.json` of any family; raises `SpecError` as `family_of` and `read_config` do."""
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise SpecError(f"{where} has no model_type, so it can't be told what model it describes")
    return read_config(family_of(model_type), data, where)
