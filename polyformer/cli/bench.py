"""Verbs that measure what parts and models cost on this machine: `bench attention`, `bench generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyformer.cli.common import AsJson, Force, Model, app
from polyformer.cli.opening import opening
from polyformer.cli.progress import counting
from polyformer.errors import RunError, SpecError, suggest

if TYPE_CHECKING:
    from rich.table import Table

    from polyformer.bench import Curves, Settings
    from polyformer.bench.attention import Quantity
    from polyformer.bench.work import Mode

bench = typer.Typer(no_args_is_help=True, help="Measure what parts cost on this machine, beside each other.")
app.add_typer(bench, name="bench", epilog="Example: polyformer bench attention --lengths 512,1024,2048")


@bench.callback()
def group() -> None:
    """Measure what parts cost on this machine, beside each other."""


@bench.command(
    epilog="Example: polyformer bench attention --lengths 512,1024,2048,4096,8192 --plot curves.png --set threads=2"
)
def attention(
    lengths: Annotated[
        str, typer.Option(metavar="N,N,…", help="Of the texts, with commas between them.")
    ] = "512,1024,2048,4096,8192",
    only: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help="Which attentions, and sdpa beside them; all if not given.")
    ] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="heads (8), head (64, its width), batch (1), dtype (float32), level (kernel: q, k and v are given; "
            "whole: with its matrices), rounds (7), threads, memory (GB that a run may take), or clock (wall; "
            "processor: undisturbed by other programs); repeatable.",
        ),
    ] = None,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="For each attention at each length.")] = 20.0,
    fit_from: Annotated[int, typer.Option(min=1, help="The least length that counts in the fitted growth.")] = 2048,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the curves.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure attentions over the length of the text: time and peak memory, forward and in a training step.

    Told are the growth of each, from which length on it is faster than PyTorch's causal attention (sdpa), and how many
    times as fast it is as that and as PyTorch's attention with a mask of the same pattern.
    """
    from polyformer.bench import MODES, draw_curves, picture_file

    asked = _settings(lengths, only, settings or [], budget, fit_from)
    if plot is None:
        curves = _measured(asked)
    else:
        with picture_file(plot, force) as file:
            curves = _measured(asked)
            file.write(draw_curves(curves))
    if as_json:
        typer.echo(json.dumps(curves.to_data(), ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for mode in MODES:
        for title, table in (_costs(curves, mode, "seconds"), _costs(curves, mode, "bytes"), _ratios(curves, mode)):
            console.print(title, style="bold")
            console.print(table)
            console.print()
    for line in _remarks(curves):
        typer.echo(line)


@bench.command(epilog="Example: polyformer bench generate smollm2 --together 1,8 --guess lookup --json")
@opening
def generate(
    model: Model,
    opened: Any,
    together: Annotated[str, typer.Option(metavar="N,N,…", help="How many texts at once.")] = "1,8",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    written: Annotated[int, typer.Option("--max-tokens", min=2, help="Tokens that are written behind each.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Of which medians are told.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure how fast a model writes: one text, and several at once."""
    from rich.console import Console
    from rich.table import Table

    from polyformer.bench.writing import Writing, measure

    if not all(count.strip().isdigit() for count in together.split(",")):
        raise RunError(f"--together wants numbers with commas between them, not '{together}'")
    asked = Writing(prompt, written, tuple(int(count) for count in together.split(",")), rounds)
    loaded = opened.writer(model)
    rates = measure(lambda count: loaded.engine(count, guess=opened.guess), asked)
    if as_json:
        told = {"model": str(model), "weights": loaded.native or "pytorch", "asked": asked.to_data()}
        typer.echo(json.dumps(told | rates.to_data()))
        return
    table = Table("texts", "read, tokens/s", "written, tokens/s", "times one", "first token, s", "cache, MB", box=None)
    for rate in rates.rates:
        figures = (f"{rate.read:,.0f}", f"{rate.written:,.1f}", f"{rate.written / rates.rates[0].written:.2f}")
        table.add_row(str(rate.together), *figures, f"{rate.first:.2f}", f"{rate.cache / 1e6:,.1f}")
    Console().print(table)
    if opened.guess is not None:
        right = f"{rates.guesses.acceptance:.0%} of {rates.guesses.guessed:,} guesses were right"
        typer.echo(f"{right}; a pass that judged some wrote {rates.guesses.gain:.2f} tokens in the mean")


def _settings(lengths: str, only: str, settings: list[str], budget: float, fit_from: int) -> Settings:
    """Read what was asked for."""
    from polyformer.bench import Conditions, HeadSizes, Settings
    from polyformer.spec import field_types
    from polyformer.train.reading import apply_setting

    asked: dict[str, Any] = {}
    for setting in settings:
        apply_setting(asked, setting)
    sizes, conditions = field_types(HeadSizes), field_types(Conditions)
    for key in asked:
        if key not in {**sizes, **conditions} or key == "budget":
            raise SpecError(f"--set has no key '{key}' here{suggest(key, {*sizes, *conditions} - {'budget'})}")
    return Settings(
        tuple(_number(one) for one in lengths.split(",")),
        tuple(name.strip() for name in only.split(",") if name.strip()),
        fit_from,
        HeadSizes.from_data({key: value for key, value in asked.items() if key in sizes}, "--set"),
        Conditions.from_data({"budget": budget, **{k: v for k, v in asked.items() if k in conditions}}, "--set"),
    )


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RunError(f"--lengths wants whole numbers, such as 512,1024,2048, not '{text.strip()}'") from None


def _measured(settings: Settings) -> Curves:
    from polyformer.bench import MODES, bench_attention, chosen

    cells = len(chosen(settings.only)) * len(settings.lengths) * len(MODES)
    with counting(cells, "measuring") as progress:
        return bench_attention(settings, progress)


def _table(curves: Curves, *behind: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in (*(f"{n:,}" for n in curves.settings.lengths), *behind):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _costs(curves: Curves, mode: Mode, quantity: Quantity) -> tuple[str, Table]:
    """Return a table of times or of memory, with their growth, and its title."""
    from polyformer.bench import DENSE
    from polyformer.bench.picture import NAMES, TITLES, shown

    timed = quantity == "seconds"
    behind = ("grows as", "R²", "faster than sdpa from", "measured") if timed else ("grows as", "R²")
    table = _table(curves, *behind)
    for one in curves.contestants:
        points, fit = curves.points(one.name, mode, quantity), curves.fit(one.name, mode, quantity)
        row = [shown(points[n], quantity) if n in points else "–" for n in curves.settings.lengths]
        row += ["–", "–"] if fit is None else [f"n^{fit.exponent:.2f}", f"{fit.r2:.3f}"]
        if timed:
            fitted, measured = curves.crossing(one.name, mode)
            known = "" if one.name == DENSE else "–"
            row += [known if fitted is None else f"{fitted:,.0f}", known if measured is None else f"{measured:,}"]
        table.add_row(one.name, *row)
    return f"{TITLES[quantity]}, {NAMES[mode]}", table


def _ratios(curves: Curves, mode: Mode) -> tuple[str, Table]:
    """Return a table of how many times as fast each is as PyTorch's attention, and its title."""
    from polyformer.bench import DENSE
    from polyformer.bench.picture import NAMES

    table = _table(curves)
    for one in curves.contestants:
        if one.name == DENSE:
            continue
        plain, own = curves.ratios(one.name, mode, DENSE), curves.ratios(one.name, mode, one.dense)
        row = []
        for n in curves.settings.lengths:
            told = [f"{plain[n]:.2f}"] if n in plain else []
            told += [f"({own[n]:.2f})"] if n in own and one.dense not in (DENSE, one.name) else []
            row.append(" ".join(told) or "–")
        table.add_row(one.name, *row)
    return f"Times as fast as sdpa (in brackets: as sdpa with its own pattern), {NAMES[mode]}", table


def _remarks(curves: Curves) -> list[str]:
    """Say what was left out, and why."""
    remarks = [
        f"not measured: {cell.contestant}, {cell.mode}, at {cell.length:,}: {cell.skipped}"
        for cell in curves.cells
        if cell.skipped
    ]
    start, counted = curves.settings.fit_from, [n for n in curves.settings.lengths if n >= curves.settings.fit_from]
    if len(counted) < 2:
        found = f"{len(counted)} length{'s' * (len(counted) != 1)} from {start:,} on"
        remarks.append(f"no growth is fitted: that takes two lengths, and there is {found} (--fit-from)")
    return remarks
