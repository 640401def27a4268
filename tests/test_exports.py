"""Packages that import what they give out when it is asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import FunctionType

import pytest

import polyformer
from polyformer.exports import Exporting, import_all

PACKAGES = ("polyformer", "polyformer.data", "polyformer.generate", "polyformer.loaded")


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_given_out_and_nothing_else(name: str) -> None:
    package = importlib.import_module(name)
    assert isinstance(package, Exporting)
    assert sorted(package.homes) == sorted(package.__all__)
    import_all(name)
    for each in package.__all__:
        assert getattr(package, each) is not None
        assert each in dir(package)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        _ = package.nothing


def test_a_file_of_the_same_name_takes_no_ones_place() -> None:
    code = (
        "import polyformer.generate.search\nfrom polyformer.generate import search, translate\n"
        "import polyformer.generate.translate\nfrom polyformer import transplant\n"
        "print(*(type(one).__name__ for one in (search, translate, transplant)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {FunctionType.__name__}
    assert polyformer.__version__


@pytest.mark.parametrize("what", ["polyformer.generate.engine", "polyformer.loaded.start", "polyformer.native.runner"])
def test_what_writes_needs_no_pytorch(what: str) -> None:
    code = f"import sys, {what}; from polyformer.data.chat import encode_chat; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
