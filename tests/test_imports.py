"""The house's rules, read from the source: imports point down, extras are optional, files and signatures are small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "polyformer"

# From the ground up; a room may import rooms of its own floor and of those below. A new room must be put here.
FLOORS = [
    {"spec", "errors", "exports"},
    {"parts"},
    {"families", "weights"},
    {"data"},
    {"native"},
    {"generate", "explain", "swap", "shrink", "tune"},
    {"answer"},
    {"loaded"},
    {"train", "judge", "bench"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

# Imported only inside the function that needs them: extras that may be missing, and what takes long to import.
INSIDE_ONLY = {"matplotlib", "tensorboard", "sentencepiece", "sacrebleu", "polib", "rich", "tomli_w"} | {
    "PIL",
    "gguf",
    "jinja2",
}
NEVER = {"transformers", "ctranslate2", "pytest", "hypothesis", "jsonschema"}

FILES = sorted(PACKAGE.rglob("*.py"))
files = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


def room_of(file: Path) -> str:
    """Return the first part of a file's path in the package, without `.py`."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def for_types_only(node: ast.AST) -> bool:
    """Tell whether this is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST, inside: bool = True) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of what is imported; without `inside`, only what importing the file itself runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif for_types_only(node):
            continue
        elif inside or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, inside)


def test_the_reader_sees_what_runs() -> None:
    source = """
import typing, torch.nn
from polyformer.parts import model
if TYPE_CHECKING:
    import rich
try:
    import polib
except ImportError:
    pass
class A:
    import tomli_w
    def late(self):
        from matplotlib import pyplot
"""
    outside = ["typing", "torch.nn", "polyformer.parts.model", "polib", "tomli_w"]
    assert [name for name, _ in imports(ast.parse(source), inside=False)] == outside
    assert [name for name, _ in imports(ast.parse(source))] == [*outside, "matplotlib.pyplot"]


def test_every_room_has_a_floor() -> None:
    assert {room_of(file) for file in FILES} <= FLOOR.keys()


@files
def test_imports_point_down(file: Path) -> None:
    own = FLOOR[room_of(file)]
    for name, line in imports(ast.parse(file.read_text("utf-8"))):
        package, _, inner = name.partition(".")
        if package != "polyformer":
            continue
        other = inner.split(".")[0]
        assert other in FLOOR, f"{file}:{line} imports {name}; a room imports another's files, not the public face"
        assert FLOOR[other] <= own, f"{file}:{line} imports {name}, which is on a higher floor"


@files
def test_extras_are_imported_where_they_are_used(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    for name, line in imports(tree, inside=False):
        assert name.split(".")[0] not in INSIDE_ONLY, f"{file}:{line} imports {name} for everyone"
        assert not name.startswith("torch.utils.tensorboard"), f"{file}:{line} imports {name} for everyone"
    for name, line in imports(tree):
        assert name.split(".")[0] not in NEVER, f"{file}:{line} imports {name}, which is for tests and benchmarks"


@files
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text("utf-8").splitlines()) <= 500


@files
def test_functions_are_small(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            asked = node.args
            names = [one.arg for one in (*asked.posonlyargs, *asked.args, *asked.kwonlyargs)]
            own = [name for name in names if name not in ("self", "cls")]
            assert len(own) <= 8, f"{file}:{node.lineno} {node.name} has {len(own)} parameters"
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{file}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("what", ["polyformer", "polyformer.cli", "polyformer.spec"])
def test_importing_it_imports_no_torch(what: str) -> None:
    code = f"import sys, {what}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "numpy", "tokenizers", "safetensors", *(INSIDE_ONLY - {"rich"}), *NEVER}
