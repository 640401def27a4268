"""What every test has: a fixed seed, PyTorch's defaults put back, a cache of its own, hypothesis without a clock."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("polyformer", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("polyformer")

# The models here are so small that a second thread only waits for the first: four times as slow with two.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    kept = torch.get_default_dtype()
    yield
    torch.set_default_dtype(kept)


@pytest.fixture(autouse=True, scope="session")
def _own_plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    place = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polyformer.loaded.kept.folder", lambda: place)
        yield
