"""The verb that tunes a model which is there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from polyformer.cli.common import INTERRUPTED, AsJson, Force, Model, Settings, app, fail, load_model
from polyformer.errors import RunError, suggest


class Named(NamedTuple):
    """A method of the command line: the record that it stands for, and the learning rate that it begins with."""

    data: dict[str, Any]
    rate: float


METHODS: dict[str, Named] = {
    "full": Named({"type": "Full"}, 2e-5),
    "lora": Named({"type": "Adapt", "change": {"type": "LoraChange"}}, 2e-4),
    "qlora": Named({"type": "Adapt", "change": {"type": "LoraChange"}, "quantised": {}}, 2e-4),
    "dora": Named({"type": "Adapt", "change": {"type": "DoraChange"}}, 2e-4),
    "ia3": Named({"type": "Adapt", "change": {"type": "Ia3Change"}}, 3e-3),
    "prefix": Named({"type": "Adapt", "change": {"type": "PrefixChange"}}, 1e-2),
    "prompt": Named({"type": "Adapt", "change": {"type": "PromptChange"}}, 3e-2),
}

Method = Annotated[str, typer.Option(metavar="METHOD", help=f"Which weights change: {', '.join(METHODS)}.")]


@app.command(
    epilog="Example: polyformer tune smollm2 --data chats.jsonl --method full --out tuned --set train.budget.count=2"
)
def tune(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="JSON Lines of messages, prompt and completion, or text; a .tsv of two columns; or plain text.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run folder, which becomes the result.")],
    method: Method = "full",
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in DIR stopped.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Tune a model to examples of your own: what the assistant says in conversations, completions, or plain texts.

    DIR holds the tuned model in the reference library's layout, or the adapter in PEFT's, and a report.
    """
    from polyformer.cli.progress import TrainingDisplay
    from polyformer.train.reading import apply_setting, recipe_of
    from polyformer.train.run import train as train_run

    if resume and force:
        raise RunError("--resume goes on with a run and --force replaces it; choose one")
    asked = _recipe(model, data, out, method)
    for setting in settings or []:
        apply_setting(asked, setting)
    with TrainingDisplay() as display:
        outcome = train_run(recipe_of(asked, "--set"), out, resume, force, (display,))
    if not outcome.finished:
        fail("stopped and saved; to go on, say the same again with --resume", INTERRUPTED)
    if as_json:
        scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
        typer.echo(json.dumps({"out": str(out), "scores": scores}, ensure_ascii=False))
    else:
        typer.echo((out / "report.md").read_text(encoding="utf-8"))


@app.command(epilog="Example: polyformer merge smollm2 tuned --out smollm2-tuned")
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter for MODEL, in PEFT's layout.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder that is written.")],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base's matrices and save the model, which is as fast as the base.

    How far its answers are from those with the adapter apart is printed; matrices become floating-point numbers.
    """
    from polyformer.loaded import save
    from polyformer.loaded.adapted import merged

    found, drift = merged(load_model(model, adapter))
    save(found, out, force)
    if as_json:
        told = {"out": str(out)} | ({} if drift is None else {"drift": drift.to_data()})
        typer.echo(json.dumps(told, ensure_ascii=False))
        return
    if drift is not None:
        typer.echo(str(drift))
    typer.echo(f"saved in {out}")


def _recipe(model: Path, data: Path, out: Path, method: str) -> dict[str, Any]:
    """Return the recipe of a call, as data, with the learning rate that the method begins with."""
    if method not in METHODS:
        raise RunError(f"there is no method '{method}'{suggest(method, METHODS)}")
    found = METHODS[method]
    return {
        "type": "TuneRecipe",
        "name": out.name,
        "base": str(model),
        "data": {"path": str(data)},
        "method": copy.deepcopy(found.data),
        "train": {"schedule": {"type": "Cosine", "peak": found.rate, "warmup": 10}},
    }
