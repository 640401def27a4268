"""The command `polyformer`: thin verbs over the rooms. Each imports what it needs only when it is called."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyformer.cli import bench as bench
from polyformer.cli import compare as compare
from polyformer.cli import convert as convert
from polyformer.cli import models as models
from polyformer.cli import tune as tune
from polyformer.cli import writing as writing
from polyformer.cli.common import (
    INTERRUPTED,
    Adapter,
    AsJson,
    Beam,
    Force,
    Language,
    Model,
    RecipeFile,
    RunFolder,
    Settings,
    Weights,
    app,
    fail,
    lines_of_input,
    load_model,
)
from polyformer.cli.opening import Opening
from polyformer.errors import DataError, RunError, SpecError

if TYPE_CHECKING:
    from polyformer.data.pairs import Pair
    from polyformer.generate import Search
    from polyformer.loaded import Loaded


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"polyformer {version('polyformer')}")
        raise typer.Exit


@app.callback()
def polyformer(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version.")
    ] = False,
) -> None:
    """Train, use and look into Transformers. `polyformer VERB --help` shows an example of each."""


@app.command(epilog="Example: polyformer train recipes/own-pairs.toml --set train.budget.count=10 --out runs/mine")
def train(
    recipe: RecipeFile,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder; runs/NAME if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in DIR stopped.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a model by a recipe, into a run folder."""
    from polyformer.cli.progress import TrainingDisplay
    from polyformer.train.reading import read_recipe
    from polyformer.train.run import train as train_run

    if resume and force:
        raise RunError("--resume goes on with a run and --force replaces it; choose one")
    read = read_recipe(recipe, settings or [])
    folder = out or Path("runs") / read.name
    with TrainingDisplay() as display:
        outcome = train_run(read, folder, resume, force, (display,))
    if not outcome.finished:
        fail(f"stopped and saved; to go on, say the same again with --out {folder} --resume", INTERRUPTED)
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    report = (folder / "report.md").read_text(encoding="utf-8")
    typer.echo(json.dumps({"run": str(folder), "scores": scores}, ensure_ascii=False) if as_json else report)


@app.command(epilog='Example: polyformer translate runs/default "Save the file" --nbest 3')
def translate(
    run: RunFolder,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Standard input, line by line, if none.")
    ] = None,
    beam: Beam = None,
    nbest: Annotated[int, typer.Option(min=1, help="Translations of each text, with their scores.")] = 1,
    to: Language = None,
    adapter: Adapter = None,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """Translate texts, or the lines of standard input."""
    loaded = Opening(adapter, weights).loaded(run)
    settings = _search(loaded, beam, nbest)
    for some in [texts] if texts else lines_of_input():
        for text, found in zip(some, loaded.translate(some, settings, to), strict=True):
            if as_json:
                told = {"source": text, "translations": [one.to_data() for one in found]}
                typer.echo(json.dumps(told, ensure_ascii=False))
                continue
            for one in found:
                line = " ".join(one.text.splitlines())
                typer.echo(line if nbest == 1 else f"{one.score:.4f}\t{line}")


@app.command(epilog="Example: polyformer evaluate runs/default --data pairs.tsv --direction en-de")
def evaluate(
    run: RunFolder,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Pairs (.tsv, .jsonl, .po, …) or texts; RUN's test split if none."),
    ] = None,
    direction: Annotated[
        str | None, typer.Option(metavar="XX-YY", help="What FILE's columns are, such as en-de.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many pairs or texts.")] = None,
    beam: Beam = None,
    adapter: Adapter = None,
    as_json: AsJson = False,
) -> None:
    """Judge a model: on sentence pairs by BLEU, chrF, loss and perplexity, on texts by loss and bits per byte."""
    from polyformer.cli.progress import counting
    from polyformer.cli.texts import evaluate_language_model
    from polyformer.judge.evaluate import evaluate as judge

    loaded = load_model(run, adapter)
    if loaded.model.encoder is None or loaded.model.decoder is None:
        if direction is not None or beam is not None:
            raise RunError("--direction and --beam are for translation models; this is a language model")
        evaluate_language_model(run, loaded, data, limit, as_json)
        return
    pairs = _pairs(run, loaded, data, direction)[:limit]
    settings = _search(loaded, beam)
    with counting(len(pairs), "translating") as progress:
        judged = judge(loaded.model, loaded.pairs, pairs, settings, progress)
    if as_json:
        typer.echo(json.dumps(judged.to_data(), ensure_ascii=False))
        return
    for one in judged.directions:
        typer.echo(f"{one.name}, {len(one.pairs):,} pairs, {settings.beams} beams, {judged.seconds:.1f} s")
        for score in (one.bleu, one.chrf):
            typer.echo(f"  {score.name:<11}{score.value:8.2f}  {score.signature}")
        typer.echo(f"  {'loss':<11}{one.held_out.loss:8.3f}  nats a token, of {one.held_out.tokens:,}")
        typer.echo(f"  {'perplexity':<11}{one.held_out.perplexity:8.2f}")


@app.command(epilog='Example: polyformer explain runs/default "Save the file" --out attention.png --kind cross')
def explain(
    run: RunFolder,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is translated.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where the picture goes.")],
    kind: Annotated[
        list[str] | None, typer.Option(help="Only encoder, cross or decoder attention; repeatable.")
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer, counted from 1; repeatable.")] = None,
    to: Language = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Draw where a translation's attention looks, by layer and head."""
    from polyformer.explain import Picture, attention_picture

    if out.suffix.lower() != ".png":
        raise RunError(f"the picture is a PNG file, so its name should end in .png, not '{out.name}'")
    if out.exists() and not force:
        raise RunError(f"{out} exists; replace it with --force, or choose another --out")
    options = Picture.from_data({name: each for name, each in (("kinds", kind), ("layers", layer)) if each}, "explain")
    loaded = load_model(run)
    best = attention_picture(loaded.model, loaded.pairs, text, out, options, _search(loaded, None), to)
    typer.echo(json.dumps({"text": best.text, "file": str(out)}, ensure_ascii=False) if as_json else best.text)


@app.command(epilog="Example: polyformer inspect runs/default")
def inspect(
    run: Model,
    program: Annotated[bool, typer.Option("--program", help="Print what the native runtime would run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a model is made of: its spec tree, with the parameters of each part."""
    from polyformer.cli.outline import outline, table
    from polyformer.loaded import read_spec
    from polyformer.native.builder import LoweringError
    from polyformer.native.lowering import lower

    spec = read_spec(run)
    if program:
        lowered = lower(spec)
        typer.echo(lowered.to_json() if as_json else lowered.told())
        return
    model = outline(spec)
    try:
        lower(spec)
        runs, why = "native", ""
    except LoweringError as error:
        runs, why = "PyTorch", str(error)
    if as_json:
        data = {"parameters": model.parameters, "runs": runs, "outline": model.to_data()}
        data |= {"because": why} if why else {}
        data["spec"] = json.loads(spec.to_json())
        typer.echo(json.dumps(data, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    console.print(table(model))
    console.print(f"\n{model.parameters:,} parameters, {4 * model.parameters / 1e6:,.1f} MB in single precision")
    reason = f"writes in PyTorch, not natively: {why}" if why else "writes natively (its program: --program)"
    console.print(reason, markup=False, highlight=False)


@app.command(epilog="Example: polyformer recipe recipes/libreoffice-en-de.toml --set model.width=128")
def recipe(recipe: RecipeFile, settings: Settings = None) -> None:
    """Check a recipe and print it as it would be used, with its settings in place."""
    from polyformer.train.reading import read_recipe

    typer.echo(read_recipe(recipe, settings or []).to_toml(), nl=False)


@app.command(epilog="Example: polyformer schema > recipe.schema.json")
def schema(
    model: Annotated[bool, typer.Option("--model", help="Of spec.json instead of recipes.")] = False,
) -> None:
    """Print the JSON Schema of recipes, by which editors check and complete them."""
    from polyformer.parts import Transformer
    from polyformer.spec import json_schema
    from polyformer.train.reading import recipe_schema

    made = json_schema(Transformer) if model else recipe_schema()
    typer.echo(json.dumps(made, indent=1, ensure_ascii=False))


def _search(loaded: Loaded, beam: int | None, nbest: int = 1) -> Search:
    """Return the search that the model recommends, with what was asked for in its place."""
    own = loaded.recommended()
    return own.replace(beams=beam or max(own.beams, nbest), nbest=nbest)


def _pairs(run: Path, loaded: Loaded, data: Path | None, direction: str | None) -> list[Pair]:
    """Read the pairs to judge on: those of a file, or the run's own test split."""
    from polyformer.data.guess import corpus_of
    from polyformer.data.pairs import read_pairs, split_direction

    test = run / "splits" / "test.jsonl"
    if data is None or (test.exists() and data.exists() and data.samefile(test)):
        if not test.exists():
            raise RunError(f"{run} has no test split of its own; name pairs with --data FILE")
        pairs = read_pairs(test)
        return [pair for pair in pairs if direction in (None, pair.direction)]
    if direction is None:
        direction = _only_direction(loaded)
    found = list(corpus_of(data, split_direction(direction)).pairs([direction]))
    if not found:
        raise DataError(f"{data} has no pairs for {direction}")
    return found


def _only_direction(loaded: Loaded) -> str:
    sources: tuple[str, ...] = getattr(loaded.tokenizer, "source_languages", ())
    targets: tuple[str, ...] = getattr(loaded.tokenizer, "target_languages", ())
    if len(sources) != 1 or len(targets) != 1:
        known = f" (this model knows {', '.join(sources)} -> {', '.join(targets)})" if sources else ""
        raise SpecError(f"name the direction of the pairs, as in --direction en-de{known}")
    return f"{sources[0]}-{targets[0]}"


def main() -> None:
    """Run the command; text goes out as UTF-8 whatever the terminal's locale says."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    app(prog_name="polyformer")
