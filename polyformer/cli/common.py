"""What all verbs share: one sentence for whatever goes wrong, and the options that several of them have."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from polyformer.errors import DataError, PolyformerError

if TYPE_CHECKING:
    from polyformer.loaded import Loaded

INTERRUPTED = 130


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn what can go wrong into a sentence and an exit status; `POLYFORMER_TRACEBACK=1` shows where it did."""
    if os.environ.get("POLYFORMER_TRACEBACK"):
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit fails once more
        fail("nobody reads the output any more")
    except PolyformerError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def fail(sentence: str, status: int = 1) -> None:
    """Say one sentence on the error stream and end with a status."""
    typer.echo(f"polyformer: {sentence}", err=True)
    raise typer.Exit(status)


class Verbs(TyperGroup):
    """The group of all verbs; what any of them raises becomes one sentence."""

    def invoke(self, ctx: Any) -> Any:
        with one_sentence():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of ours, or a Hugging Face folder.")]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="KIND",
        help="How matrices are held where the model runs natively: as stored (in a GGUF file; the default of one), "
        "fp32 (of all else), q8, q4; or pytorch, to run there.",
    ),
]
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a GGUF file, a run folder of ours, or smollm2.")
]
Guess = Annotated[
    str | None,
    typer.Option(
        "--guess",
        metavar="WAY",
        help="Guess tokens, and judge several in one pass: lookup (in the text itself), early=N (by so many first "
        "blocks), or draft=MODEL (by a smaller model of the same vocabulary). Left off by itself where it doesn't pay.",
    ),
]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", metavar="DIR", help="An adapter for MODEL, in PEFT's layout.")
]
Beam = Annotated[int | None, typer.Option("--beam", min=1, help="Hypotheses at a time; what RUN recommends, or 4.")]
Language = Annotated[
    str | None, typer.Option("--to", metavar="LANG", help="The target language, if RUN knows several.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what stands there.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, in TOML.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe; repeatable.")
]


def load_model(path: Path, adapter: Path | None = None) -> Loaded:
    """Load a model, with an adapter if one is named; what it needs is imported only then."""
    from polyformer.loaded import load

    if adapter is None:
        return load(path)
    from polyformer.loaded.adapted import with_adapter

    return with_adapter(load(path), adapter)


def lines_of_input() -> Iterator[list[str]]:
    """Yield the lines of standard input, each time as many as have come, so that a person is answered at once."""
    rest, number = b"", 0
    stream: Any = sys.stdin.buffer
    while chunk := stream.read1(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield [_decoded(line, number + i) for i, line in enumerate(lines, 1)]
            number += len(lines)
    if rest:
        yield [_decoded(rest, number + 1)]


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input, line {number}: not UTF-8 at byte {error.start + 1} of the line") from None
