"""Prefixes and prompts in PEFT's folders: one tensor, `prompt_embeddings`, and sizes that say how it is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyformer.errors import SpecError, WeightsError
from polyformer.parts import Embed, Prefix, Prompt, Transformer, Whole
from polyformer.parts.adapters import AdaptedPart
from polyformer.parts.model import TransformerPart
from polyformer.parts.prefix import PrefixPart
from polyformer.tune.attach import AdapterSet
from polyformer.tune.changes import AddAdapters, Placed, Shared
from polyformer.tune.config import PeftConfig
from polyformer.tune.prompts import attentions_of, tokens_of
from polyformer.tune.targets import bases, standing

NAME = "prompt_embeddings"


def read_virtual(config: PeftConfig, name: str, model: TransformerPart, table: Tensor | None) -> AdapterSet | None:
    """Return the prefix or prompt of a file's one tensor; None where the file is of another method.

    Raises:
        WeightsError: the tensor lacks, shouldn't be there, or is of another size than this model's.
        SpecError: a model that can have no such thing.
    """
    spec, wanted = model.spec, config.kind in ("PREFIX_TUNING", "PROMPT_TUNING")
    assert isinstance(spec, Transformer)
    if (table is not None) != wanted:
        raise WeightsError(f"the adapter's file {'lacks' if wanted else 'should not hold'} {NAME}")
    if table is None:
        return None
    if table.ndim != 2 or config.tokens < 1 or len(table) not in (config.tokens, 2 * config.tokens):
        raise WeightsError(f"{NAME} has shape {list(table.shape)}, but there should be {config.tokens} tokens")
    table = table[: config.tokens]  # behind an encoder's prompt PEFT keeps one for the decoder, which it never uses
    if config.kind == "PREFIX_TUNING":
        return _read_prefix(name, spec, table)
    path, tokens, first = tokens_of(spec)
    _refuse_size(table, tokens.width, "its embedding's width")
    prompt = Prompt(name, 1.0, len(table), tokens.width, first)
    return AdapterSet(AddAdapters((Placed(path, prompt),)), {f"{path}.weight": table / _scale(spec, path)})


def write_virtual(model: TransformerPart, own: AdapterSet) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensor of a prefix or prompt.

    A prefix that is made by a network is written as what it makes: PEFT does so too.

    Raises:
        SpecError: something else stands beside it under the same name, or the prefixes don't stand in all layers;
            or PEFT would give one prefix to two layers, as it does in decoders behind an encoder.
    """
    spec, placed = model.spec, [one for one in own.parts.placed if not isinstance(one.adapter, Whole)]
    assert isinstance(spec, Transformer)
    first = placed[0].adapter
    if len({type(one.adapter) for one in placed}) > 1:
        raise SpecError("one folder of PEFT's holds one method: a prefix, a prompt or adapters of matrices")
    if isinstance(first, Prompt):
        sizes = {"num_virtual_tokens": first.tokens, "token_dim": first.width, "num_transformer_submodules": 1}
        table = own.tensors[f"{placed[0].path}.weight"].detach() * _scale(spec, placed[0].path)
        return {"peft_type": "PROMPT_TUNING", **sizes, **_depth(spec)}, {NAME: table}
    assert isinstance(first, Prefix)
    layers = attentions_of(spec)
    if [one.path for one in placed] != list(layers):
        raise SpecError("PEFT's prefixes stand in every layer of the decoder, or of an encoder alone; this one doesn't")
    pairs = [_pair(model, one) for one in placed]
    attention = next(iter(layers.values()))
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": first.tokens,
        "token_dim": first.width,
        "num_attention_heads": attention.heads.groups,
        "num_layers": len(layers),
        "num_transformer_submodules": 1 if spec.encoder is None or spec.decoder is None else 2,
        "prefix_projection": False,
    }
    return config, {NAME: _laid_out(pairs, _places(spec, len(layers)))}


def _scale(spec: Transformer, path: str) -> float:
    """Return by what the reference's own embedding multiplies a token's vector, which PEFT doesn't do to a prompt's."""
    embed = getattr(spec, path.partition(".")[0])
    return embed.scale if isinstance(embed, Embed) else 1.0


def noted(model: TransformerPart) -> list[str]:
    """Return the matrices by whose numbers the base of a prefix or prompt is told."""
    assert isinstance(model.spec, Transformer)
    known = list(bases(model.spec))
    return [*known[:2], *known[-2:]]


def _read_prefix(name: str, spec: Transformer, table: Tensor) -> AdapterSet:
    layers = attentions_of(spec)
    widths = {one.heads.groups * one.heads.width for one in layers.values()}
    if len(widths) > 1:
        raise SpecError("a prefix of PEFT's is of one width in all layers, and this model's keys aren't")
    (width,) = widths
    _refuse_size(table, 2 * len(layers) * width, f"keys and values of {len(layers)} layers, {width} wide")
    rows = table.view(len(table), 2 * len(layers), width)
    places, tensors = _places(spec, len(layers)), dict[str, Tensor]()
    together: dict[int, list[str]] = {}
    for path, place in zip(layers, places, strict=True):
        tensors |= {f"{path}.keys": rows[:, place], f"{path}.values": rows[:, place + 1]}
        together.setdefault(place, []).append(path)
    groups = [tuple(paths) for paths in together.values() if len(paths) > 1]
    shared = tuple(Shared(paths, one) for paths in groups for one in ("keys", "values"))
    placed = tuple(Placed(path, Prefix(name, 1.0, len(table), width)) for path in layers)
    return AdapterSet(AddAdapters(placed, shared), tensors)


def _places(spec: Transformer, layers: int) -> list[int]:
    """Return where in PEFT's tensor each layer's keys stand; its values stand behind them.

    For a decoder behind an encoder, PEFT puts the whole list twice in a row and gives each layer the first two of
    four: so every layer takes one that is further on, and of an even number of layers two have the same.
    """
    if spec.encoder is None or spec.decoder is None:
        return [2 * i for i in range(layers)]
    return [4 * i % (2 * layers) for i in range(layers)]


def _laid_out(pairs: Sequence[tuple[Tensor, Tensor]], places: Sequence[int]) -> Tensor:
    found: list[Tensor | None] = [None] * (2 * len(pairs))
    for pair, place in zip(pairs, places, strict=True):
        for i, one in enumerate(pair):
            was = found[place + i]
            if was is not None and not was.equal(one):
                raise SpecError(
                    "PEFT gives two layers of such a decoder one prefix, and these differ; tie them, or save "
                    "the whole model"
                )
            found[place + i] = one
    blank = torch.zeros_like(pairs[0][0])
    return torch.cat([blank if one is None else one for one in found], 1)


def _pair(model: TransformerPart, placed: Placed) -> tuple[Tensor, Tensor]:
    assert isinstance(model.spec, Transformer)
    part = model.get_submodule(standing(model.spec)[placed.path])
    assert isinstance(part, AdaptedPart)
    own = part.adapters[part.spec.adapters.index(placed.adapter)]
    assert isinstance(own, PrefixPart)
    keys, values = own.pair()
    return keys.detach(), values.detach()


def _depth(spec: Transformer) -> dict[str, int]:
    """Return sizes that PEFT's configuration has of every model, though a prompt doesn't depend on them."""
    layers = attentions_of(spec, "decoder" if spec.encoder is None else "encoder")
    first = next(iter(layers.values()))
    return {"num_layers": len(layers), "num_attention_heads": first.heads.count}


def _refuse_size(table: Tensor, needed: int, told: str) -> None:
    if table.shape[1] != needed:
        raise WeightsError(f"{NAME} has rows of {table.shape[1]} values, but this model needs {needed}: {told}")
