"""Which work is done with which kind of recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyformer.train.jobs import OfPairs, OfTexts, Work
from polyformer.train.recipe import Job, Recipe, TextRecipe
from polyformer.train.tuned import OfTuning
from polyformer.train.tuning import TuneRecipe

WORKS: Mapping[type[Job], type[Work[Any]]] = {Recipe: OfPairs, TextRecipe: OfTexts, TuneRecipe: OfTuning}


def work_of(recipe: Job) -> Work[Any]:
    """Return what is done with a recipe."""
    return WORKS[type(recipe)](recipe)
