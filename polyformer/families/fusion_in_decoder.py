"""Fusion-in-Decoder (Izacard and Grave 2021): T5 that reads each passage alone, while its decoder looks at all of them.

Any encoder–decoder model that reads token ids can be made to read passages (`reading_passages`), with the same tensors.
A T5 `config.json` of the architecture "FiDT5" is read so, with the authors' names of tensors.
"""

from __future__ import annotations

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.spec import field_types
from polyformer.weights.names import Names, Row

ARCHITECTURE = "FiDT5"


def reading_passages(spec: parts.Transformer) -> parts.Transformer:
    """Return a model that takes `input_ids` and `attention_mask` [questions, passages, tokens].

    Raises:
        SpecError: a model that has no decoder behind an encoder of token ids.
    """
    source = spec.source
    if spec.decoder is None or not isinstance(source, parts.Embed) or spec.delay is not None:
        raise SpecError("only a model that reads token ids with an encoder, and writes, can read several passages")
    if isinstance(source, parts.Passages):
        return spec
    fields = {name: getattr(source, name) for name in field_types(parts.Embed)}
    bridge = parts.Fused() if spec.bridge is None else parts.Chain((spec.bridge, parts.Fused()))
    return spec.replace(source=parts.Passages(**fields), bridge=bridge)


def wrapped(names: Names) -> Names:
    """Return T5's table with the authors' names, whose encoder and each of its blocks are wrapped into another module.

    Their version of T5 looked at a bias by distance in cross-attention too, where files have one; it must be zero.
    """
    rows = []
    for row in names.rows:
        disk = [name.replace("encoder.", "encoder.encoder.", 1) for name in row.disk if name.startswith("encoder.")]
        if disk:
            rows.append(
                Row(row.ours, [name.replace("block.{i}.", "block.{i}.module.") for name in disk], *row.operations)
            )
    return Names([*rows, *names.rows], {pattern: lambda table: not table.any() for pattern in names.computed})
