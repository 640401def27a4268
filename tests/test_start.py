"""Writing from a file by its plan: the same texts as through PyTorch, without it, and nothing believed that is kept."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from polyformer.errors import DataError, PolyformerError, SpecError
from polyformer.generate import MinP, RepetitionPenalty, Sampling
from polyformer.loaded import Loaded, Writer, kept, load, load_to_write, open_writer
from polyformer.loaded.own import save_own
from polyformer.native.machine import processors
from polyformer.native.plan import Plan
from polyformer.weights.folders import staged_folder
from polyformer.weights.gguf import read_gguf
from tests.answer.models import SIZES, bert
from tests.native.cases import compiled
from tests.native.test_files import HEADS, WIDTH, WORDS, file_of
from tests.test_cli_models import run, sentence, writer
from tests.weights.gguf_writer import plain

pytestmark = compiled

LETTERS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", *"0123456789", "th", "<s>", "</s>"]
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": LETTERS,
    "tokenizer.ggml.merges": ["t h"],
    "tokenizer.ggml.bos_token_id": WORDS - 2,
    "tokenizer.ggml.eos_token_id": WORDS - 1,
}
DRAWN = Sampling(temperature=2.0, top_k=20, limit=12, seed=5, processors=(MinP(0.01), RepetitionPenalty(1.2)))


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    place = tmp_path / "cache" / "polyformer" / "plans"
    monkeypatch.setattr("polyformer.loaded.kept.folder", lambda: place)
    return place


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small model that can write, in 8 bits and 4."""
    return file_of("llama", ("Q8_0", "Q4_1"), tmp_path / "small.gguf", TOKENIZER)


def written(opened: Writer | Loaded, settings: Sampling) -> list[tuple[list[int], str, float]]:
    """Return what is written for two texts at once."""
    engine = opened.engine(2)
    answers = [handle.result() for handle in [engine.submit(one) for one in opened.requests(["the", "a b"], settings)]]
    return [(one.ids, one.text, one.log_probability) for one in answers]


def opened(path: Path) -> Writer:
    """Open what has a plan, and wait for its weights: the tests write other files in the place of this one."""
    found = open_writer(path)
    assert isinstance(found, Writer)
    assert found.packing.done() is not None
    return found


@pytest.mark.parametrize("settings", [Sampling(limit=12, shown=3), DRAWN], ids=["greedy", "drawn"])
def test_a_writer_writes_what_a_loaded_model_writes(plans: Path, file: Path, settings: Sampling) -> None:
    wanted = written(load_to_write(file), settings)
    assert written(opened(file), settings) == wanted
    assert len(list(plans.iterdir())) == 1
    assert written(opened(file), settings) == wanted  # by the plan that was kept
    assert opened(file).native == "as stored"


def test_the_second_process_needs_no_pytorch(plans: Path, file: Path) -> None:
    first = run("generate", file, "the", "--max-tokens", "6")
    assert first.exit_code == 0, first.output
    code = (
        "import sys\nfrom polyformer.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\nprint('torch' in sys.modules)"
    )
    ask = [sys.executable, "-c", code, "generate", str(file), "the", "--max-tokens", "6"]
    cache = {"XDG_CACHE_HOME": str(plans.parent.parent)}
    done = subprocess.run(ask, capture_output=True, text=True, check=True, env={**os.environ, **cache})
    assert done.stdout == f"{first.output}False\n"


def damaged(text: str) -> Iterator[bytes]:
    """Yield what a kept plan could have become."""
    data = text.encode()
    yield b""
    yield data[: len(data) // 2]
    yield data.replace(b'"eps": 1e-05', b'"eps": 1e-01')
    yield data.replace(b'"eps"', b'"\xff"')
    yield data.split(b"\n", 1)[1]


def test_what_is_damaged_is_made_anew(plans: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = written(opened(file), Sampling(limit=6))
    (plan,) = plans.iterdir()
    whole = plan.read_text()
    for wrong in damaged(whole):
        assert wrong != whole.encode()
        plan.write_bytes(wrong)
        caplog.clear()
        with caplog.at_level(logging.INFO, "polyformer"):
            assert written(opened(file), Sampling(limit=6)) == wanted
        assert str(plan) in caplog.text
        assert plan.read_text() == whole


def test_what_is_another_s_is_not_taken(plans: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(file)
    (plan,) = plans.iterdir()
    assert kept.recall(plan.stem) is not None
    (plans / f"{'0' * 64}.json").write_bytes(plan.read_bytes())
    assert kept.recall("0" * 64) is None  # another model's
    monkeypatch.setattr("polyformer.loaded.kept.LARGEST", 10)
    assert kept.recall(plan.stem) is None
    monkeypatch.undo()
    monkeypatch.setattr("polyformer.loaded.kept.folder", lambda: plans)
    if hasattr(os, "getuid"):
        monkeypatch.setattr("os.getuid", lambda: plan.stat().st_uid + 1)
        assert kept.recall(plan.stem) is None


def test_plans_are_of_one_file_and_one_version(plans: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(file)
    opened(file_of("llama", ("Q8_0", "Q4_1"), file, TOKENIZER | {"llama.rope.freq_base": 500.0}))
    assert len(list(plans.iterdir())) == 2
    monkeypatch.setattr("polyformer.loaded.kept.ROOMS", ("spec.py",))
    opened(file)
    assert len(list(plans.iterdir())) == 3
    monkeypatch.setattr("polyformer.loaded.kept.MOST", 1)
    opened(file_of("llama", ("Q8_0", "Q4_1"), file, TOKENIZER | {"llama.rope.freq_base": 700.0}))
    assert len(list(plans.iterdir())) == 1


def test_a_table_that_the_plan_follows_from_is_looked_at(plans: Path, file: Path) -> None:
    table = torch.ones(WIDTH // HEADS // 2)
    file_of("llama", ("Q8_0", "Q4_1"), file, TOKENIZER, **{"rope_freqs.weight": plain(table)})
    opened(file)
    whole, ones = file.read_bytes(), table.numpy().tobytes()
    assert whole.count(ones) == 1
    file.write_bytes(whole.replace(ones, (5 * table).numpy().tobytes()))
    with pytest.raises(PolyformerError, match="is not what is computed from the configuration"):
        open_writer(file).engine()


def test_a_cache_that_can_t_be_written_is_no_fault(plans: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    plans.parent.mkdir(parents=True)
    plans.write_text("a file in the folder's place")
    with caplog.at_level(logging.INFO, "polyformer"):
        assert written(opened(file), Sampling(limit=2))
    assert "can't be kept" in caplog.text


def test_a_plan_must_fit_itself(plans: Path, file: Path) -> None:
    plan = opened(file).plan
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(SpecError, match="need as many origins"):
        plan.replace(origins=plan.origins[1:])
    with pytest.raises(SpecError, match="an order is missing"):
        plan.replace(orders=())
    read = read_gguf(file)
    assert plan.fits(read)
    renamed = plan.origins[0].replace(tensor="another")
    assert not plan.replace(origins=(renamed, *plan.origins[1:])).fits(read)


def joined() -> None:
    """Wait for packing that was given up."""
    for thread in [one for one in threading.enumerate() if one.name == "packing"]:
        thread.join()


def test_a_broken_tokenizer_stops_the_packing(plans: Path, file: Path) -> None:
    file_of("llama", ("Q8_0", "Q4_1"), file, TOKENIZER | {"tokenizer.ggml.model": "gpt3"})
    with pytest.raises(DataError, match="did you mean"):
        open_writer(file)
    joined()
    larger = TOKENIZER | {"tokenizer.ggml.tokens": [*LETTERS, "one more"]}
    with pytest.raises(SpecError, match=f"the tokenizer has {WORDS + 1} tokens, but the model only {WORDS}"):
        open_writer(file_of("llama", ("Q8_0", "Q4_1"), file, larger))
    joined()


def test_guesses_of_a_writer(plans: Path, file: Path) -> None:
    found = opened(file)
    engine = found.engine(1, guess="lookup")
    (request,) = found.requests(["the the the the"], Sampling(limit=10))
    assert engine.submit(request).result().ids == found.engine(1).submit(request).result().ids
    with pytest.raises(SpecError, match="only lookup guesses where a model is run from its file"):
        found.engine(1, guess="early=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA in a Hugging Face folder, in two shards, with the vocabulary of the small BERT."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=3,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(place, max_shard_size="12KB")
    bert(place / "bert", "BertModel")
    (place / "bert" / "vocab.txt").rename(place / "vocab.txt")
    return place


def test_a_published_folder_is_written_from(plans: Path, folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    wanted = written(load_to_write(folder), Sampling(limit=8))
    for _ in range(2):
        found = opened(folder)
        assert found.native == "fp32"
        assert written(found, Sampling(limit=8)) == wanted
    ask = ("generate", folder, "the cat", "--max-tokens", "6")
    assert run(*ask).output == run(*ask, "--weights", "pytorch").output
    index = folder / "model.safetensors.index.json"
    said = index.read_text()
    place = json.loads(said)
    place["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
    index.write_text(json.dumps(place))
    assert "lacks model-00009-of-00009.safetensors" in sentence(run(*ask))
    index.write_text(said)


def test_a_folder_of_ours_is_written_from(plans: Path, folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    with staged_folder(tmp_path / "ours") as stage:
        save_own(loaded, stage)
    wanted = written(load_to_write(tmp_path / "ours"), Sampling(limit=8))
    assert written(opened(tmp_path / "ours"), Sampling(limit=8)) == wanted
    weights = tmp_path / "ours" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    assert "model.safetensors" in sentence(run("generate", tmp_path / "ours", "the"))


def test_matrices_that_lie_turned(plans: Path, tmp_path: Path) -> None:
    """As GPT-2's do in a folder, where those of queries, keys and values are one, too."""
    writer(tmp_path)
    plan = opened(tmp_path).plan
    assert {one.by for one in plan.origins} == {"rows", "columns"}
    assert written(opened(tmp_path), Sampling(limit=8)) == written(load_to_write(tmp_path), Sampling(limit=8))


def test_what_no_plan_can_say_is_loaded(plans: Path, tmp_path: Path) -> None:
    bert(tmp_path, "BertModel")
    assert isinstance(open_writer(tmp_path), Loaded)
    assert not plans.exists()


def test_threads_are_counted_as_pytorch_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert processors() == torch.get_num_threads()
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert processors() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "no")
    assert processors() >= 1
    if not hasattr(os, "sched_getaffinity"):
        return
    monkeypatch.setattr("os.sched_getaffinity", lambda number: {0, 1, 2, 5})
    monkeypatch.setattr("polyformer.native.machine.TOPOLOGY", f"{tmp_path}/{{}}")
    for one, siblings in ((0, "0-1"), (1, "0-1"), (2, "2")):
        (tmp_path / str(one)).write_text(siblings)
    assert processors() == 3
