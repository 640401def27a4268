"""What the parity tests share: a checkpoint of the reference library on disk, and both models' answers."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polyformer as pf
from polyformer.loaded import Loaded
from tests.families.cases import Case

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="polyformer-parity-")


@functools.lru_cache(maxsize=4)
def reference(case: Case) -> tuple[Any, Path]:
    """Make the reference's model, every tensor (biases and norms too) far from its start, and save it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = getattr(transformers, case.config)(**case.keys)
        model = getattr(transformers, case.model)(config).eval()
        if case.untied:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * case.noise)
            for name, buffer in model.named_buffers():
                if name.endswith(("final_logits_bias", "running_mean")):
                    buffer.normal_()
    folder = Path(_folder().name) / case.name
    if not folder.exists():
        model.save_pretrained(folder)
    return model, folder


def load(case: Case) -> Loaded:
    """Load the case's checkpoint here."""
    return pf.load(reference(case)[1])


def theirs(model: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the reference's answers under our names."""
    out = model(**data)
    found = {}
    if "start_logits" in out:
        found["logits"] = torch.stack((out.start_logits, out.end_logits), -1)
    for key, ours in (
        ("logits", "logits"),
        ("prediction_logits", "logits"),
        ("seq_relationship_logits", "pooled"),
        ("sop_logits", "pooled"),
        ("last_hidden_state", "hidden"),
        ("pooler_output", "pooled"),
        ("encoder_last_hidden_state", "encoder_hidden"),
    ):
        if out.get(key) is not None:
            found[ours] = out[key]
    return found


def mine(model: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our answers."""
    out = model(**data)
    return {name: one for name, one in vars(out).items() if one is not None}


def real(answers: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep the rows of real tokens: all that padding may not change."""
    own = data.get("decoder_attention_mask", data.get("attention_mask"))
    masks = {"logits": own, "hidden": own, "encoder_hidden": data.get("attention_mask")}
    found = {}
    for name, answer in answers.items():
        mask = masks.get(name)
        rows = mask is not None and answer.shape[:2] == mask.shape
        found[name] = answer[mask.bool()] if rows and mask is not None else answer
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Every answer that the reference gives must be found, and be the same."""
    assert wanted
    for name, tensor in wanted.items():
        assert name in found, f"there is no {name}"
        closely = {"atol": tolerance, "rtol": tolerance}
        torch.testing.assert_close(found[name], tensor, **closely, msg=lambda told, name=name: f"{name}: {told}")
