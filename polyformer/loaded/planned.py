"""Makes the plan of a model on disk, for which its spec is read, and lowered."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from polyformer.families import Family, read_family
from polyformer.families.generation import Generation
from polyformer.families.gguf import gguf_config
from polyformer.loaded.layouts import CONFIG, GENERATION, SPEC
from polyformer.loaded.own import read_own_spec
from polyformer.native.given import gguf_tables
from polyformer.native.plan import Plan, Store
from polyformer.native.planning import plan_of
from polyformer.weights import strict_json
from polyformer.weights.files import read_tensors
from polyformer.weights.folders import member
from polyformer.weights.gguf import GgufFile


def plan_at(kind: Literal["gguf", "own", "reference"], path: Path, store: Store) -> Plan | None:
    """Return the plan of a model, None if a plan can't say it (`plan_of`).

    Args:
        kind: what lies at the path.
        store: its tensors.
    Raises:
        LoweringError, SpecError, WeightsError: as `load_to_write` does.
    """
    if kind == "gguf":
        assert isinstance(store, GgufFile)
        config = gguf_config(store)
        family = read_family(config, str(path))
        plan = plan_of(family.spec(), store, store.tensors, gguf_tables(family, config))
        return _with_ends(plan, family, Generation.read(config, {}, str(path)))
    generation_file, tensors = member(path, GENERATION), read_tensors(path)
    said = strict_json.read(generation_file) if generation_file.exists() else {}
    if kind == "own":
        plan = plan_of(read_own_spec(path / SPEC), store, tensors)
        return _with_ends(plan, None, Generation.read({}, said, str(generation_file)))
    config_file = member(path, CONFIG)
    config = strict_json.read(config_file)
    family = read_family(config, str(config_file)).seeing(tensors)
    plan = plan_of(family.spec(), store, tensors, (family.names(),))
    return _with_ends(plan, family, Generation.read(config, said, str(generation_file if said else config_file)))


def _with_ends(plan: Plan | None, family: Family | None, generation: Generation) -> Plan | None:
    """Note what is known of texts beside the program."""
    if plan is None:
        return None
    context = getattr(family, "max_position_embeddings", None)
    end = generation.eos_token_id
    ends = None if end is None else (end,) if isinstance(end, int) else end
    return plan.replace(context=context if isinstance(context, int) else None, ends=ends)
