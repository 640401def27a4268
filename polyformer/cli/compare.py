"""The verb that compares variants of a recipe under one budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyformer.cli.common import INTERRUPTED, AsJson, Force, RecipeFile, Settings, app, fail
from polyformer.errors import RunError


@app.command(
    epilog="Example: polyformer compare recipes/small-lm.toml --vary model.attention=softmax,window,performer "
    "--set 'train.budget={type=\"Steps\", count=300}' --out runs/compared --plot compared.png"
)
def compare(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the run folders.")],
    vary: Annotated[
        list[str], typer.Option(metavar="KEY=A,B,…", help="What differs; the first is the control. Repeatable.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each, with train.seed counted up.")] = 1,
    settings: Settings = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the losses.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train variants of a recipe in turn, with the same data, budget and seeds; one table, and one picture.

    Runs that are finished in DIR already are not run again, and one that was interrupted is gone on with.
    """
    from polyformer.cli.progress import TrainingDisplay
    from polyformer.train.compare import compare as compared
    from polyformer.train.compare import draw, variants

    if plot is not None and plot.exists() and not force:
        raise RunError(f"{plot} exists; replace it with --force, or choose another --plot")
    runs = variants(recipe, vary, seeds, settings or [])
    with TrainingDisplay() as display:
        found = compared(runs, out, (display,))
    if found is None:
        fail("stopped and saved; to go on, say the same again", INTERRUPTED)
        return
    if plot is not None:
        draw(found, plot)
    typer.echo(json.dumps(found.to_data(), ensure_ascii=False) if as_json else str(found))
