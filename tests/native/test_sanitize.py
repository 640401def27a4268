"""Builds the native side with the address and undefined-behaviour sanitizers, and lets random programs run on it.

python -m tests.native.test_sanitize [ROUNDS [SEED]]
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from polyformer.native.lowering import lower
from polyformer.native.words import words_of
from tests.native.cases import LOWERED, ROOM, load

SOURCES = Path(__file__).parent.parent.parent / "polyformer" / "native" / "src"
FLAGS = ("-std=c++17", "-O1", "-g", "-pthread", "-Wno-psabi", "-fsanitize=address,undefined")
NAMES = (
    "llama",
    "gpt2",
    "t5",
    "falcon-rw",
    "gemma2",
    "bloom",
    "marian",
    "mistral",
    "mixtral",
    "qwen2_moe",
    "switch_transformers",
)


def fuzz(folder: Path, rounds: int, seed: int) -> str:
    """Build and run; return what it says. Raises `CalledProcessError` at the first fault."""
    program = folder / "fuzz"
    sources = [str(Path(__file__).parent / "fuzz.cpp"), *map(str, sorted(SOURCES.glob("*.cpp")))]
    stop = ("-fno-sanitize-recover=all", "-o", str(program))
    subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, *stop, *sources], check=True)
    files = []
    for case in (case for case in LOWERED if case.name in NAMES):
        words = words_of(lower(load(case).spec), ROOM)
        files.append(folder / case.name)
        files[-1].write_bytes(struct.pack(f"<{len(words)}q", *words))
    options = {"ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=2048"}
    command = [str(program), str(rounds), str(seed), *map(str, files)]
    done = subprocess.run(command, env=os.environ | options, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_random_programs_do_no_harm(tmp_path: Path) -> None:
    assert "were refused" in fuzz(tmp_path, 5000, 0)


if __name__ == "__main__":
    given = [int(one) for one in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as where:
        print(fuzz(Path(where), *(given + [20000, 0][len(given) :])))
