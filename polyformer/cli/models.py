"""Verbs that ask a published model: write, embed, fill, classify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyformer.cli.common import AsJson, Model, app, lines_of_input, load_model
from polyformer.errors import RunError

if TYPE_CHECKING:
    from polyformer.generate import Sampling
    from polyformer.loaded import Loaded

Texts = Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Standard input, line by line, if none.")]
Count = Annotated[int, typer.Option("--top", min=1, help="How many to show.")]


@app.command(epilog='Example: polyformer generate SmolLM2-135M-Instruct.Q4_1.gguf "The capital of France is"')
def generate(
    model: Model,
    prompts: Texts = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="How many tokens are written at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the chance.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="top_k or top_p: what is drawn among.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each text is a message, put in the model's chat template.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Continue texts, or answer them with an encoder-decoder model."""
    from polyformer.generate import Sampling
    from polyformer.train.recipe import apply_setting

    asked: dict[str, Any] = {"temperature": temperature, "limit": max_tokens, "seed": seed}
    for setting in settings or []:
        apply_setting(asked, setting)
    sampling = Sampling.from_data(asked, "--set")
    loaded = load_model(model)
    answers = chat or (loaded.model.encoder is not None and loaded.model.decoder is not None)
    for some in [prompts] if prompts else lines_of_input():
        for prompt, text in zip(some, _written(loaded, some, sampling, chat), strict=True):
            told = json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False)
            typer.echo(told if as_json else text if answers else prompt + text)


def _written(loaded: Loaded, prompts: list[str], settings: Sampling, chat: bool) -> list[str]:
    from polyformer.generate import Limit

    if chat:
        return loaded.chat([[{"role": "user", "content": prompt}] for prompt in prompts], settings)
    if loaded.model.encoder is None or loaded.model.decoder is None:
        return loaded.generate(prompts, settings)
    if settings.temperature:
        raise RunError("an encoder-decoder model is searched, not sampled: leave --temperature at 0")
    search = loaded.recommended().replace(limit=Limit(settings.limit))
    return [found[0].text for found in loaded.translate(prompts, search)]


@app.command(epilog='Example: polyformer embed all-MiniLM-L6-v2 "A man is eating." "Someone eats." "It rains."')
def embed(
    model: Model,
    texts: Texts = None,
    pooling: Annotated[
        str | None, typer.Option(help="mean, first, last or max row; what MODEL says, or mean, if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn texts into vectors, and show the cosines between them; --json prints the vectors."""
    from polyformer.parts import Chain, Last, Max, Mean, Normalise, Nth

    pools = {"mean": Mean(), "first": Nth(0), "last": Last(), "max": Max()}
    if pooling is not None and pooling not in pools:
        raise RunError(f"there is no pooling '{pooling}'; choose one of {', '.join(pools)}")
    loaded = load_model(model)
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
    as_json: AsJson = False,
) -> None:
    """Fill the masks of a text with a masked language model."""
    for mask in load_model(model).fill(text, top):
        for one in mask:
            shown = f"{one.probability:.4f}\t{one.token}\t{one.text}"
            typer.echo(json.dumps(one.to_data(), ensure_ascii=False) if as_json else shown)


@app.command(epilog="Example: polyformer classify vit-base-patch16-224 cat.png")
def classify(
    model: Model,
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Texts, or files of images.")],
    top: Count = 5,
    as_json: AsJson = False,
) -> None:
    """Label texts or images, the likeliest label first."""
    loaded = load_model(model)
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
