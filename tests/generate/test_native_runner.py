"""The engine over native programs: the same answers as in PyTorch, with company, little memory, and guesses."""

from __future__ import annotations

import pytest
import torch

from polyformer.generate import Capacity, Engine, PromptLookup, Request, Sampling, Speculation, TorchRunner
from polyformer.native.library import library
from polyformer.native.machine import Machine
from polyformer.native.runner import runner
from tests.generate.models import BOS
from tests.generate.writers import requests, writer

pytestmark = pytest.mark.skipif(library() is None, reason="the native runtime is not compiled here")


@pytest.mark.parametrize("kind", ["dense", "windowed", "encoder-decoder", "learned"])
def test_the_same_answers(kind: str) -> None:
    torch.manual_seed(0)
    model = writer(kind).float()
    asked = [
        Request(one.prompt if one.source is None else [BOS], Sampling(limit=12), one.ends, one.source)
        for one in requests(kind, 12)
    ]
    wanted = [Engine(TorchRunner(model, 1)).submit(one).result() for one in asked]
    native = runner(model, machine=Machine(4, 64, 1))
    memory = 5 * max(native.bytes_for(len(one.prompt) + 12, len(one.source or ())) for one in asked) // 2
    engine = Engine(native, Capacity(memory=memory, rows=16), PromptLookup(), Speculation(3, 10**6))
    handles = [engine.submit(one) for one in asked]
    engine.work()
    assert [one.result().ids for one in handles] == [one.ids for one in wanted]
    engine.forget()
    assert all(native.length(slot) == 0 for slot in range(4))
