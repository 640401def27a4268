"""Verbs that change models and compare them: convert and drift."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyformer.cli.common import AsJson, Force, Model, app, load_model
from polyformer.errors import DataError, RunError, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polyformer.loaded import Loaded
    from polyformer.swap import Drift

DTYPES = ("float32", "bfloat16", "float16")
Texts = Annotated[Path | None, typer.Option("--data", metavar="FILE", help="Texts, one to a line, to compare on.")]


@app.command(
    epilog="Example: polyformer convert gpt2 --set position=rotary --set norm=rms --set groups=4 --out gpt2-rotary"
)
def convert(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder that is written.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="depth, groups, position, window, kernel, norm, placement, tied, residuals or fuse; repeatable.",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; as it is if not given.")] = None,
    data: Texts = None,
    from_pickle: Annotated[
        bool, typer.Option("--from-pickle", help="Read weights that are only there as a pickle.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Save a model in another form: other parts, another precision, safetensors in place of GGUF or a pickle.

    What becomes of each tensor is reported, and with --data how far the answers drift.
    """
    import torch

    from polyformer.loaded import load, save
    from polyformer.swap import Conversion, transplant
    from polyformer.train.reading import apply_setting

    if dtype is not None and dtype not in DTYPES:
        raise RunError(f"there is no dtype '{dtype}' to convert to; choose one of {', '.join(DTYPES)}")
    asked: dict[str, Any] = {}
    for setting in settings or []:
        apply_setting(asked, setting)
    conversion = Conversion.from_data(asked, "--set")
    loaded = load(model, dtype=None if dtype is None else getattr(torch, dtype), pickled=from_pickle)
    told: dict[str, Any] = {"out": str(out)}
    changed, report = loaded, None
    if asked:
        made, report = transplant(loaded.model, conversion)
        changed = dataclasses.replace(loaded, model=made)
        told["report"] = report.to_data()
    before = load(model, pickled=from_pickle) if data is not None and dtype is not None else loaded
    differ = None if data is None else _drift(before, changed, data)
    if differ is not None:
        told["drift"] = differ.to_data()
    save(changed, out, force)
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False))
        return
    for part in (report, differ, f"saved in {out}"):
        if part is not None:
            typer.echo(f"{part}\n" if part is report else str(part))


@app.command(epilog="Example: polyformer drift gpt2 gpt2-rotary --data texts.txt")
def drift(
    a: Model,
    b: Annotated[Path, typer.Argument(metavar="OTHER", help="The model that it is compared with.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Texts, one to a line.")],
    as_json: AsJson = False,
) -> None:
    """Measure how far two models' answers are apart: logits, KL divergence, the first different token."""
    found = _drift(load_model(a), load_model(b), data)
    typer.echo(json.dumps(found.to_data(), ensure_ascii=False) if as_json else str(found))


def _drift(a: Loaded, b: Loaded, file: Path) -> Drift:
    from polyformer.swap import drift as measured

    return measured(a.model, b.model, _inputs(a, list(_lines(file))))


def _inputs(loaded: Loaded, lines: list[str]) -> Iterator[dict[str, Tensor]]:
    """Return the inputs of a model for some texts; an encoder–decoder reads "source <tab> target" lines."""
    import torch

    from polyformer.swap import batches_of

    if loaded.model.encoder is None or loaded.model.decoder is None:
        yield from batches_of(lines, loaded.texts.encode)
        return
    for line in lines:
        source, tab, target = line.partition("\t")
        if not tab:
            raise DataError(f"an encoder-decoder model is compared on source, tab, target, unlike '{line[:40]}'")
        pairs = loaded.pairs
        written = [pairs.bos_id, *pairs.encode_target(target)[:-1]]
        yield {
            "input_ids": torch.tensor([pairs.encode_source(source)]),
            "decoder_input_ids": torch.tensor([written]),
        }


def _lines(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}") from None
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise SpecError(f"{file} has no texts in it")
    yield from found
