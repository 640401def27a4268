"""Verbs that ask a published model: embed, fill, classify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyformer.cli.common import Adapter, AsJson, Model, app, lines_of_input, load_model
from polyformer.errors import RunError

Texts = Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Standard input, line by line, if none.")]
Count = Annotated[int, typer.Option("--top", min=1, help="How many to show.")]


@app.command(epilog='Example: polyformer embed all-MiniLM-L6-v2 "A man is eating." "Someone eats." "It rains."')
def embed(
    model: Model,
    texts: Texts = None,
    pooling: Annotated[
        str | None, typer.Option(help="mean, first, last or max row; what MODEL says, or mean, if not given.")
    ] = None,
    adapter: Adapter = None,
    as_json: AsJson = False,
) -> None:
    """Turn texts into vectors, and show the cosines between them; --json prints the vectors."""
    from polyformer.parts import Chain, Last, Max, Mean, Normalise, Nth

    pools = {"mean": Mean(), "first": Nth(0), "last": Last(), "max": Max()}
    if pooling is not None and pooling not in pools:
        raise RunError(f"there is no pooling '{pooling}'; choose one of {', '.join(pools)}")
    loaded = load_model(model, adapter)
    some = texts or [line for lines in lines_of_input() for line in lines]
    vectors = loaded.embed(some, None if pooling is None else Chain((pools[pooling], Normalise())))
    if as_json:
        for text, vector in zip(some, vectors.tolist(), strict=True):
            typer.echo(json.dumps({"text": text, "vector": vector}, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    table = Table("", "text", *map(str, range(1, len(some) + 1)), title=f"cosines, {vectors.shape[-1]} dimensions")
    for i, (text, row) in enumerate(zip(some, (unit @ unit.T).tolist(), strict=True), 1):
        table.add_row(str(i), text[:60], *(f"{value:.3f}" for value in row))
    Console().print(table)


@app.command(epilog='Example: polyformer fill bert-base-uncased "Paris is the [MASK] of France."')
def fill(
    model: Model,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="With the model's mask token, once or more.")],
    top: Count = 5,
    adapter: Adapter = None,
    as_json: AsJson = False,
) -> None:
    """Fill the masks of a text with a masked language model."""
    for mask in load_model(model, adapter).fill(text, top):
        for one in mask:
            shown = f"{one.probability:.4f}\t{one.token}\t{one.text}"
            typer.echo(json.dumps(one.to_data(), ensure_ascii=False) if as_json else shown)


@app.command(epilog="Example: polyformer classify vit-base-patch16-224 cat.png")
def classify(
    model: Model,
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Texts, or files of images.")],
    top: Count = 5,
    adapter: Adapter = None,
    as_json: AsJson = False,
) -> None:
    """Label texts or images, the likeliest label first."""
    loaded = load_model(model, adapter)
    if loaded.reads_images:
        missing = [name for name in inputs if not Path(name).is_file()]
        if missing:
            raise RunError(f"{missing[0]} is no file; this model classifies images")
    for given, labels in zip(inputs, loaded.classify(inputs), strict=True):
        if as_json:
            told = {"input": given, "labels": [one.to_data() for one in labels[:top]]}
            typer.echo(json.dumps(told, ensure_ascii=False))
            continue
        typer.echo(given)
        for one in labels[:top]:
            typer.echo(f"  {one.probability:.4f}  {one.label}")
