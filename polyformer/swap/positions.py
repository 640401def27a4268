"""Changes of the position scheme: by which a model knows the order of its tokens."""

from __future__ import annotations

from typing import Literal

from polyformer.errors import SpecError
from polyformer.parts import (
    Add,
    Alibi,
    Attention,
    Buckets,
    Causal,
    Concatenate,
    Embed,
    Learned,
    Position,
    RelativePosition,
    Rotary,
    Shaw,
    Sinusoidal,
    TokenEmbedding,
    Transformer,
)
from polyformer.parts.positions import Table
from polyformer.spec import Record, rewrite, walk
from polyformer.swap.origins import ties_of
from polyformer.swap.swap import Swap

Scheme = Literal["none", "learned", "sinusoidal", "rotary", "alibi", "buckets", "shaw"]
ABSOLUTE: dict[str, type[Position]] = {"learned": Learned, "sinusoidal": Sinusoidal}
RELATIVE: dict[str, type[RelativePosition]] = {"rotary": Rotary, "alibi": Alibi, "buckets": Buckets, "shaw": Shaw}


class SwapPosition(Swap):
    """Another position scheme, and no other beside it: in the embeddings ("learned", "sinusoidal") or in every
    self-attention ("rotary", "alibi", "buckets", "shaw"), or nowhere ("none").

    Attributes:
        length: how many positions a model with absolute ones has; None for as many as it had.
        base: of "rotary" and "sinusoidal"; None for 10,000, or what the model has if it is of that scheme.
    """

    scheme: Scheme
    length: int | None = None
    base: float | None = None

    def check(self) -> None:
        takes = self.length is None or self.scheme in ABSOLUTE
        self.require(takes, f"'{self.scheme}' positions have no length; leave it out")
        takes = self.base is None or self.scheme in ("rotary", "sinusoidal")
        self.require(takes, f"'{self.scheme}' positions have no base; leave it out")

    def apply(self, spec: Transformer) -> Transformer:
        new = super().apply(spec)
        if self.scheme != "buckets" or any(isinstance(record, Buckets) for _, record in walk(spec)):
            return new
        return new.replace(ties=(*new.ties, *ties_of(_tables(new))))

    def rewritten(self, spec: Transformer) -> Transformer:
        sides = {name: getattr(spec, name) for name in ("source", "target") if getattr(spec, name) is not None}
        for name, embed in sides.items():
            if not isinstance(embed, Embed):
                raise SpecError(f"the {name} is {type(embed).__name__}, whose positions can't be swapped")
        inside = [path for path, record in walk(spec) if isinstance(record, Attention)]
        if self.scheme in RELATIVE and not inside:
            raise SpecError(f"this model has no self-attention that '{self.scheme}' positions could stand in")

        def change(path: str, record: Record) -> Record:
            if isinstance(record, Attention):
                return record.replace(position=self._inside(path, record))
            return self._embedding(path, record) if path in sides and isinstance(record, Embed) else record

        return rewrite(spec, change)

    def _embedding(self, path: str, embed: Embed) -> Embed:
        was = embed.positions
        wanted = ABSOLUTE.get(self.scheme)
        if wanted is None:
            if was is not None and isinstance(embed.combine, Concatenate):
                raise SpecError(f"{path}: positions stand beside the tokens, which are too narrow without them")
            return embed.replace(positions=None, combine=Add())
        length = self.length if self.length is not None or was is None else was.length
        if wanted is Learned and length is None:
            raise SpecError(f"{path}: learned positions need a length, and the model has none; say how many")
        held = wanted is Sinusoidal and isinstance(was, Table) and self.base is None  # the same, as a tensor
        stays = isinstance(was, wanted) or held
        made = was.replace(length=length) if was is not None and stays else wanted(_width(path, embed), length)
        if self.base is not None:
            made = made.replace(base=self.base)
        return embed.replace(positions=made)

    def _inside(self, path: str, attention: Attention) -> RelativePosition | None:
        wanted, was, heads = RELATIVE.get(self.scheme), attention.position, attention.heads
        if wanted is None:
            return None
        if isinstance(was, wanted):
            return was.replace(base=self.base) if self.base is not None else was
        if wanted is Rotary:
            if heads.width % 2:
                raise SpecError(f"{path}: rotary positions turn pairs, but its heads are {heads.width} wide")
            return Rotary(heads.width, 10000.0 if self.base is None else self.base)
        if wanted is Buckets:
            return Buckets(heads.count, two_sided=not _is_causal(attention))
        return Alibi(heads.count) if wanted is Alibi else Shaw(heads.width)


def _is_causal(attention: Attention) -> bool:
    return any(isinstance(rule, Causal) for _, rule in walk(attention.see))


def _width(path: str, embed: Embed) -> int:
    """Return how wide the position vectors of an embedding are."""
    if embed.positions is not None:
        return embed.positions.width
    found = [record.width for _, record in walk(embed.tokens) if isinstance(record, TokenEmbedding)]
    if len(found) != 1:
        raise SpecError(f"{path}: it can't be told how wide positions beside {type(embed.tokens).__name__} are")
    return found[0]


def _tables(spec: Transformer) -> list[list[str]]:
    """Return the tables of buckets that the layers of a stack share, as in T5 (Raffel et al. 2020, section 2.1)."""
    groups: list[list[str]] = []
    for name in ("encoder", "decoder"):
        stack, alike = getattr(spec, name), dict[Record, list[str]]()
        for path, record in walk(stack, name) if stack is not None else ():
            if isinstance(record, Attention) and record.position is not None:
                alike.setdefault(record.position, []).append(f"{path}.position.weight")
        groups += alike.values()
    return groups
