"""Kernels for processors that this machine may not have, emulated by SIMDe, against the portable ones.

SIMDe is a collection of headers (Debian: libsimde-dev) in which every instruction is a function of plain C. The same
source is compiled against them in place of the compiler's own headers; nothing of them is shipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.test_sanitize import SOURCES

HEADERS = {
    "immintrin.h": ("simde/x86/avx2.h", "simde/x86/avx512.h", "simde/x86/f16c.h"),
    "arm_neon.h": ("simde/arm/neon.h",),
}
# Sums of products must not be joined into one instruction on one side and not on the other.
FLAGS = ("-std=c++17", "-O1", "-Wno-psabi", "-ffp-contract=off", "-DEMULATED", "-DSIMDE_ENABLE_NATIVE_ALIASES")
COMPILER = os.environ.get("CXX", "g++")


def has_simde() -> bool:
    """Return whether the compiler is there and finds SIMDe."""
    if shutil.which(COMPILER) is None:
        return False
    asked = [COMPILER, "-fsyntax-only", "-x", "c++", "-"]
    return not subprocess.run(
        asked, input=b"#include <simde/simde-common.h>", capture_output=True, check=False
    ).returncode


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx512", "neon", "neon_dot"])
def test_emulated_kernels_are_the_portable_ones_bit_for_bit(name: str, tmp_path: Path) -> None:
    if not has_simde():
        pytest.skip("there is no C++ compiler that finds SIMDe's headers (Debian: libsimde-dev)")
    for header, files in HEADERS.items():
        (tmp_path / header).write_text("".join(f"#include <{file}>\n" for file in files))
    program = tmp_path / "emulated"
    sources = (
        Path(__file__).parent / "emulated.cpp",
        SOURCES / f"kernels_{name}.cpp",
        SOURCES / "kernels_portable.cpp",
    )
    chosen = (f"-I{tmp_path}", f"-DTABLE={name}_kernels", "-o", str(program))
    subprocess.run([COMPILER, *FLAGS, *chosen, *map(str, sources)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "8700 results are the same" in done.stdout
