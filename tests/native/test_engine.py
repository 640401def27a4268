"""The engine on native programs: the same answers as in PyTorch, and as alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyformer.errors import RunError, SpecError
from polyformer.generate import Capacity, Engine, Request, Sampling, TorchRunner
from polyformer.loaded import load_to_write
from polyformer.native import library as compiled_side
from polyformer.native.machine import Machine
from polyformer.native.runner import runner
from tests.generate.writers import requests, writer
from tests.native.cases import compiled
from tests.native.test_files import file_of
from tests.test_cli_models import run, sentence
from tests.test_cli_models import writer as save_writer

pytestmark = compiled
KINDS = ("dense", "windowed", "alibi", "learned", "encoder-decoder")


@pytest.mark.parametrize("kind", KINDS)
def test_64_at_once_as_alone_and_as_in_pytorch(kind: str) -> None:
    """With pieces of prompts, fewer slots than requests, and so little memory that texts have to give way."""
    model = writer(kind).float()
    asked = requests(kind, 64)
    machine = Machine(slots=12, room=64)
    wanted = [Engine(runner(model, "fp32", machine)).submit(one).result() for one in asked[:8]]
    several = runner(model, "fp32", machine)
    most = max(several.bytes_for(len(one.prompt) + one.settings.limit, len(one.source or ())) for one in asked)
    engine = Engine(several, Capacity(memory=5 * most // 2, rows=24))
    found = [handle.result() for handle in [engine.submit(one) for one in asked]]
    plain = Engine(TorchRunner(model, 12))
    in_pytorch = [handle.result() for handle in [plain.submit(one) for one in asked]]
    assert [one.ids for one in found[:8]] == [one.ids for one in wanted]
    assert [one.log_probability for one in found[:8]] == [one.log_probability for one in wanted]
    assert sum(one.ids == other.ids for one, other in zip(found, in_pytorch, strict=True)) >= 63  # roundings may differ


def test_a_file_is_opened_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyformer.data.checkpoint_tokenizer.TextTokenizer.from_gguf", lambda metadata: None)
    file = file_of("llama", ("Q8_0", "Q4_1"), tmp_path / "x.gguf")
    loaded = load_to_write(file)
    assert loaded.native == "as stored"
    assert all(one.is_meta for one in loaded.model.parameters())
    assert load_to_write(file, "q8").native == "q8"


def test_what_can_t_run_natively_runs_in_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_writer(tmp_path)
    assert load_to_write(tmp_path).native == "fp32"
    for place in ("polyformer.loaded.files", "polyformer.native.library"):
        monkeypatch.setattr(f"{place}.required", _no_library)
    assert load_to_write(tmp_path).native is None
    with pytest.raises(RunError, match="is not compiled"):
        load_to_write(tmp_path, "q8")
    monkeypatch.undo()
    assert compiled_side.library() is not None


def _no_library() -> None:
    raise RunError("the native runtime is not compiled; install polyformer where there is a C++17 compiler")


def test_the_same_text_natively_and_in_pytorch(tmp_path: Path) -> None:
    save_writer(tmp_path)
    ask = ("generate", tmp_path, "the cat", "--max-tokens", "6")
    plain = run(*ask, "--weights", "pytorch")
    assert plain.exit_code == 0, plain.output
    assert run(*ask).output == run(*ask, "--weights", "fp32").output == plain.output
    assert run(*ask, "--weights", "q8").exit_code == 0
    assert "there are no weights 'q5'; choose one of" in sentence(run(*ask, "--weights", "q5"))


def test_a_model_of_another_kind_says_why(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"there is no lowering|only exact softmax"):
        runner(writer("recurrent"))


def test_cancelled_in_mid_stream_a_thousand_times() -> None:
    """Whoever listens stops listening after some tokens; nothing is held for it, and the engine goes on."""
    native = runner(writer("windowed").float(), "fp32", Machine(slots=2, room=64))
    engine = Engine(native, Capacity(memory=native.bytes_for(64)))
    asked = Request([5, 6, 7], Sampling(limit=20))
    wanted = engine.submit(asked).result().ids
    for i in range(1000):
        handle = engine.submit(Request([5, 6, 7], Sampling(limit=20)))
        for count, _ in enumerate(handle):
            if count == i % 4:
                handle.cancel()
        answer = handle.result()
        assert answer.reason == "cancelled"
        assert answer.ids == wanted[: len(answer.ids)]
        assert len(answer.ids) == i % 4 + 1
    assert engine.bytes == 0
    assert engine.submit(asked).result().ids == wanted


def test_too_little_memory_for_one_request() -> None:
    native = runner(writer("dense").float(), "fp32", Machine(slots=2, room=2048))
    engine = Engine(native, Capacity(memory=native.bytes_for(64)))
    with pytest.raises(SpecError, match=r"takes .* bytes of cache, but there are .*; lower the limit"):
        engine.submit(Request([4, 5, 6], Sampling(limit=10**9)))
    assert len(engine.submit(Request([4, 5, 6], Sampling(limit=10))).result().ids) == 10
    assert engine.bytes == 0
