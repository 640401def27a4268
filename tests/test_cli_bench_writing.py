"""`polyformer bench generate`: what it prints, and one sentence for what can't be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_cli_models import run, sentence, writer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    writer(folder)
    return folder


def test_rates(model: Path) -> None:
    flags = ("--prompt", "8", "--max-tokens", "9", "--rounds", "2", "--together", "1,3")
    told = json.loads(run("bench", "generate", model, *flags, "--json").output)
    assert [rate["together"] for rate in told["rates"]] == [1, 3]
    assert all(rate["read"] > 0 < rate["written"] for rate in told["rates"])
    assert told["rates"][1]["cache"] == 3 * told["rates"][0]["cache"] > 0
    guessed = json.loads(run("bench", "generate", model, *flags, "--guess", "early=1", "--json").output)
    assert 0 <= guessed["acceptance"] <= 1 <= guessed["gain"]
    shown = run("bench", "generate", model, *flags, "--guess", "lookup")
    assert shown.exit_code == 0, shown.output
    assert "times one" in shown.output
    assert "guesses were right" in shown.output


def test_what_can_not_be(model: Path) -> None:
    assert "--together wants numbers" in sentence(run("bench", "generate", model, "--together", "1,a"))
    assert "together must be numbers between 1 and 1024" in sentence(run("bench", "generate", model, "--together", "0"))
    assert "tokens are guessed by lookup, early=BLOCKS or draft=MODEL, not 'luck'" in sentence(
        run("bench", "generate", model, "--guess", "luck")
    )
    assert "9 of 2 can't be taken" in sentence(run("bench", "generate", model, "--guess", "early=9", "--prompt", "3"))
    assert "more than the model's 24 positions" in sentence(run("bench", "generate", model))
