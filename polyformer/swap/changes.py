"""Ready changes of attention, depth and ties, and all changes together as a recipe or `--set` names them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from polyformer.errors import SpecError
from polyformer.families.blocks import Placement
from polyformer.families.mixers import NAMED, named
from polyformer.generate.search import positions_of
from polyformer.parts import (
    Attention,
    Causal,
    CrossAttention,
    Embed,
    Everyone,
    Kernel,
    LayerNorm,
    Linear,
    LMHead,
    Norm,
    PerHead,
    Retention,
    Rotary,
    Rule,
    Stack,
    TokenEmbedding,
    Transformer,
    Window,
)
from polyformer.parts.kernels.kernel import rules_of
from polyformer.parts.rules import All
from polyformer.spec import Record, Spec, rewrite, walk
from polyformer.swap.fuse import FuseProjections
from polyformer.swap.norms import NormKind, PlaceNorms, SwapNorms
from polyformer.swap.origins import Joins, Moves, tied_groups, ties_of
from polyformer.swap.positions import Scheme, SwapPosition
from polyformer.swap.residuals import SwapResiduals
from polyformer.swap.swap import Swap, Swaps


class SwapKernel(Swap):
    """Another kernel in every attention, cross-attention too; sizes that it leaves open are those of the model.

    Where the new kernel leaves a field at its default that the old one has as well (`scale`, `dropout`), it takes
    the old one's value, so that a model trained with scores of another scale is not scaled anew by accident.
    """

    kernel: Kernel

    def rewritten(self, spec: Transformer) -> Transformer:
        sides = {"encoder": spec.source, "decoder": spec.target}
        lengths = {name: None if side is None else positions_of(side) for name, side in sides.items()}

        def change(path: str, record: Record) -> Record:
            if not isinstance(record, Attention | CrossAttention):
                return record
            read = "encoder" if isinstance(record, CrossAttention) else path.partition(".")[0]
            fitted = self.kernel.fitted(record.heads.width, lengths.get(read))
            return record.replace(kernel=_inheriting(fitted, record.kernel))

        return rewrite(spec, change)


class Retain(Swap):
    """Retention in the place of every self-attention, which must be causal (Sun et al. 2023).

    Queries, keys, values and the output keep their matrices; gates are new, and so are the decays, one for each head.
    """

    def rewritten(self, spec: Transformer) -> Transformer:
        def change(path: str, record: Record) -> Record:
            return _retention(path, record) if isinstance(record, Attention) else record

        return rewrite(spec, change)

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        were = dict(walk(old))
        places = [
            path
            for path, record in walk(new)
            if isinstance(record, Retention) and isinstance(were.get(path), Attention)
        ]
        return {f"{path}.{name}": f"{path}.{name}" for path in places for name in "qkvo"}


class LimitWindow(Swap):
    """Self-attention sees keys less than `width` places away only (`Window`); 0 takes such a limit away."""

    width: int

    def check(self) -> None:
        self.require(self.width >= 0, "width can't be negative; 0 takes the window away")

    def rewritten(self, spec: Transformer) -> Transformer:
        limit: Rule = Window(self.width) if self.width else Everyone()

        def change(path: str, record: Record) -> Record:
            if not isinstance(record, Attention):
                return record
            rules: tuple[Rule, ...] = record.see.rules if isinstance(record.see, All) else (record.see,)
            kept = [rule for rule in rules if not isinstance(rule, Window)]
            return record.replace(see=functools.reduce(Rule.__and__, [*kept, limit]))

        return rewrite(spec, change)


class GroupHeads(Swap):
    """Another number of key/value heads in every attention: as many as query heads are multi-head attention, 1 is
    multi-query (Shazeer 2019), between them grouped-query (Ainslie et al. 2023)."""

    groups: int

    def check(self) -> None:
        self.require(self.groups > 0, "groups must be at least 1")

    def rewritten(self, spec: Transformer) -> Transformer:
        def change(path: str, record: Record) -> Record:
            if not isinstance(record, Attention | CrossAttention):
                return record
            heads = record.heads
            if isinstance(record, Attention) and record.qkv is not None:
                raise SpecError(f"{path}: queries, keys and values are fused; heads can be grouped before that only")
            if heads.count % self.groups:
                raise SpecError(f"{path}: {heads.count} heads can't share {self.groups} key/value heads evenly")
            if heads.groups == self.groups:
                return record
            sizes = heads.groups * heads.width, self.groups * heads.width
            k, v = (_resized(f"{path}.{name}", getattr(record, name), *sizes) for name in "kv")
            return record.replace(heads=heads.replace(groups=self.groups), k=k, v=v)

        return rewrite(spec, change)


class TieHead(Swap):
    """The matrix before the softmax and the token embedding as one (Press and Wolf 2017), or each for itself."""

    tied: bool

    def apply(self, spec: Transformer) -> Transformer:
        side = "source" if spec.target is None else "target"
        embed, head = getattr(spec, side), spec.head
        tokens = embed.tokens if isinstance(embed, Embed) else None
        matrix = head.projection if isinstance(head, LMHead) else None
        if not isinstance(tokens, TokenEmbedding) or not isinstance(matrix, Linear):
            raise SpecError("tying needs a token embedding and a head over the vocabulary that is one matrix")
        if (matrix.outputs, matrix.inputs) != (tokens.vocabulary, tokens.width):
            raise SpecError(
                f"a head of {matrix.outputs} tokens, {matrix.inputs} wide, can't be tied to the embedding of "
                f"{tokens.vocabulary} tokens, {tokens.width} wide"
            )
        own, other = "head.projection.weight", f"{side}.tokens.weight"
        groups = tied_groups(spec.ties)
        if any(own in group and other in group for group in groups) == self.tied:
            return spec
        if self.tied:
            joined = [name for group in groups if other in group or own in group for name in group]
            rest = [group for group in groups if own not in group and other not in group]
            return spec.replace(ties=ties_of([*rest, list(dict.fromkeys((*joined, other, own)))]))
        return spec.replace(ties=ties_of([[name for name in group if name != own] for group in groups]))


class KeepBlocks(Swap):
    """Fewer blocks, other ones, or some more than once: for each stack, those to keep, counted from 0, or how many.

    A number keeps blocks that are spread evenly, the first and the last among them, as Shleifer and Rush (2020,
    section 3.2) make students of summarisation models.
    """

    encoder: int | tuple[int, ...] | None = None
    decoder: int | tuple[int, ...] | None = None

    def check(self) -> None:
        self.require(() not in (self.encoder, self.decoder), "at least one block must be kept")

    def rewritten(self, spec: Transformer) -> Transformer:
        changed = {}
        for name, kept in self._kept(spec).items():
            stack = getattr(spec, name)
            changed[name] = stack.replace(blocks=tuple(stack.blocks[i] for i in kept))
        return spec.replace(**changed)

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        kept = self._kept(old).items()
        return {f"{name}.blocks.{i}": f"{name}.blocks.{was}" for name, those in kept for i, was in enumerate(those)}

    def _kept(self, spec: Transformer) -> dict[str, list[int]]:
        found = {}
        for name in ("encoder", "decoder"):
            asked, stack = getattr(self, name), getattr(spec, name)
            if asked is None:
                continue
            if not isinstance(stack, Stack):
                raise SpecError(f"this model has no {name}" if stack is None else f"its {name} is no stack of blocks")
            found[name] = _chosen(asked, len(stack.blocks), name)
        return found


class Conversion(Swap):
    """What can be changed of a model, by the keys that a command names; None leaves a thing as it is.

    `norm` is the kind of norm and `placement` where norms stand, `groups` the number of key/value heads, `tied` says
    whether the head's matrix is the embedding's, `fuse` that queries, keys and values be one product. `kernel` is
    one, or the name of one ("performer"), or "retention" for that in attention's place. The changes are made in the
    order of the fields.
    """

    depth: KeepBlocks | None = None
    groups: int | None = None
    position: Scheme | SwapPosition | None = None
    window: int | None = None
    kernel: str | Kernel | None = None
    norm: NormKind | None = None
    placement: Placement | None = None
    tied: bool | None = None
    residuals: Literal["none"] | None = None
    fuse: Literal["projections"] | None = None

    def swaps(self) -> Swaps:
        """Return the changes that are asked for."""
        position = SwapPosition(self.position) if isinstance(self.position, str) else self.position
        asked = (
            self.depth,
            None if self.groups is None else GroupHeads(self.groups),
            position,
            None if self.window is None else LimitWindow(self.window),
            None if self.kernel is None else _kernel_swap(self.kernel),
            None if self.norm is None else SwapNorms(self.norm),
            None if self.placement is None else PlaceNorms(self.placement),
            None if self.tied is None else TieHead(self.tied),
            None if self.residuals is None else SwapResiduals(self.residuals),
            None if self.fuse is None else FuseProjections(),
        )
        return Swaps(tuple(swap for swap in asked if swap is not None))

    def apply(self, spec: Transformer) -> Transformer:
        return self.swaps().apply(spec)

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        return self.swaps().moves(old, new)

    def joins(self, old: Transformer, new: Transformer) -> Joins:
        return self.swaps().joins(old, new)


def _kernel_swap(kernel: str | Kernel) -> Swap:
    """Return the swap that a kernel or a name asks for."""
    found = kernel if isinstance(kernel, Kernel) else named(kernel)
    if isinstance(found, Kernel):
        return SwapKernel(found)
    if found is NAMED["retention"]:
        return Retain()
    hint = "; set window to its width" if kernel == "window" else ""
    raise SpecError(f"'{kernel}' is no kernel that attention of another model could be given{hint}")


def _retention(path: str, record: Attention) -> Retention:
    heads = record.heads
    if heads.groups != heads.count:
        raise SpecError(f"{path}: retention has a key for each query head; set groups={heads.count} too")
    if Causal() not in rules_of(record.see):
        raise SpecError(f"{path}: retention reads forwards only, and this attention reads both ways")
    matrices = [one for _, one in walk(record.q) if isinstance(one, Linear)]
    if not matrices:
        raise SpecError(f"{path}: {type(record.q).__name__} has no matrix that a gate could be made like")
    kept = record.position if isinstance(record.position, Rotary) else None
    return Retention(
        q=record.q,
        k=record.k,
        v=record.v,
        gate=Linear(matrices[0].inputs, heads.count * heads.width, bias=False),
        o=record.o,
        norm=PerHead(LayerNorm(heads.width, gain=False, bias=False)),
        decays=tuple(1 - 2.0 ** -(5 + head) for head in range(heads.count)),
        position=kept or Rotary(heads.width, layout="interleaved"),
        see=record.see,
    )


def _inheriting(kernel: Kernel, was: Kernel) -> Kernel:
    """Return a kernel with what the old one says in the fields that it leaves at their defaults."""
    silent = [one.name for one in dataclasses.fields(kernel) if getattr(kernel, one.name) == one.default]
    return kernel.replace(**{name: getattr(was, name) for name in silent if hasattr(was, name)})


def _resized(path: str, projection: Spec, size: int, wanted: int) -> Spec:
    """Return the projection to keys or values with another number of outputs, and the norm over all of them."""
    were = dict(walk(projection))

    def change(path: str, record: Record) -> Record:
        if isinstance(record, PerHead):
            return were[path]
        if isinstance(record, Linear) and record.outputs == size:
            return record.replace(outputs=wanted)
        return record.replace(width=wanted) if isinstance(record, Norm) and record.width == size else record

    resized = rewrite(projection, change)
    if resized is projection:
        raise SpecError(f"{path}: {type(projection).__name__} has no matrix of {size} outputs that could be cut anew")
    return resized


def _chosen(asked: int | tuple[int, ...], count: int, name: str) -> list[int]:
    """Return which of `count` blocks are kept."""
    if isinstance(asked, tuple):
        wrong = [i for i in asked if not 0 <= i < count]
        if wrong:
            raise SpecError(f"the {name} has no block {wrong[0]}; its {count} blocks are counted from 0")
        return list(asked)
    if not 1 <= asked <= count:
        raise SpecError(f"{asked} of the {name}'s {count} blocks can't be kept; name a number from 1 to {count}")
    return [round(i * (count - 1) / max(asked - 1, 1)) for i in range(asked)]
