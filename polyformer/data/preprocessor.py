"""Where a checkpoint says how images or sound are prepared for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyformer.weights import strict_json
from polyformer.weights.folders import member

OWN, SHARED = "preprocessor_config.json", "processor_config.json"


def find_preprocessor(folder: Path) -> tuple[Mapping[str, Any], str] | None:
    """Return what a checkpoint's folder says about images or sound, and what to call it in messages; None if nothing.

    Newer folders may have it in `processor_config.json`, beside what they say about text.

    Raises:
        WeightsError: a damaged file, or a link out of the folder.
    """
    if (folder / OWN).exists():
        return strict_json.read(member(folder, OWN)), str(folder / OWN)
    if (folder / SHARED).exists():
        whole = strict_json.read(member(folder, SHARED))
        for key in ("image_processor", "feature_extractor"):
            if isinstance(whole.get(key), Mapping):
                return whole[key], f"{folder / SHARED}: {key}"
    return None


def save_preprocessor(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `preprocessor_config.json` into a folder."""
    (folder / OWN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
