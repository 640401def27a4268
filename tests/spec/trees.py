"""Spec trees for tests: one sample of every part, whole models, and random trees made from the annotations."""

from __future__ import annotations

import typing

from hypothesis import strategies as st

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.parts import (
    Attention,
    BatchNorm,
    Causal,
    Concatenate,
    CrossAttention,
    Dropout,
    Embed,
    FeedForward,
    Gate,
    LayerNorm,
    Learned,
    Linear,
    LMHead,
    RMSNorm,
    SameDocument,
    Sinusoidal,
    Softmax,
    Stack,
    Tie,
    TokenEmbedding,
    Transformer,
)
from polyformer.parts.embeddings import Add
from polyformer.parts.residual import Chain, Residual
from polyformer.shrink import Linear4
from polyformer.spec import Record, Spec, field_types

WIDTH = 8

ROOMS = ("polyformer.parts.", "polyformer.shrink.")
"""Where parts of models are at home."""


def block(width: int = WIDTH, cross: bool = False) -> Chain:
    """Return a pre-norm block with every slot of its residuals filled somewhere."""
    attention = Residual(Attention.of_width(width, 2, Causal()), LayerNorm(width), Dropout(0.1))
    looking = Residual(CrossAttention.of_width(width, 2), LayerNorm(width), LayerNorm(width), LayerNorm(width))
    feeding = Residual(FeedForward.gated(width, 2 * width), RMSNorm(width), Dropout(0.1))
    return Chain((attention, looking, feeding) if cross else (attention, feeding))


def hashing(**fields: object) -> parts.Hashing:
    """Return attention by hashing into 4 buckets, whose answers padding and other documents don't change."""
    rule = Causal() & SameDocument()
    hashes = parts.Hashes(buckets=(4,), seed=1)
    return parts.Hashing.of_width(WIDTH, parts.Heads(2, 2, 4), parts.Chunks(2), rule, hashes).replace(**fields)


def coupling(width: int = WIDTH) -> parts.Coupling:
    """Return a reversible block of attention and a feed-forward network, with dropout in both."""
    attention = Chain((LayerNorm(width), Attention.of_width(width, 2, Causal() & SameDocument()), Dropout(0.1)))
    feeding = FeedForward.of_widths(width, 2 * width).replace(dropout=Dropout(0.1))
    return parts.Coupling(attention, Chain((LayerNorm(width), feeding)))


def translator(layers: int = 2, width: int = WIDTH) -> Transformer:
    """Return an encoder–decoder model whose three matrices are tied."""
    return Transformer(
        source=Embed(TokenEmbedding(11, width), Sinusoidal(width), scale=width**0.5, dropout=Dropout(0.1)),
        encoder=Stack((block(width),) * layers, LayerNorm(width)),
        target=Embed(TokenEmbedding(11, width), Learned(width, 32), Gate.of_width(width)),
        decoder=Stack((block(width, cross=True),) * layers, LayerNorm(width)),
        head=LMHead.of_width(width, 11),
        ties=(
            Tie("target.tokens.weight", "source.tokens.weight"),
            Tie("head.projection.weight", "source.tokens.weight"),
        ),
    )


SAMPLES: dict[type[Spec], Spec] = {
    type(sample): sample
    for sample in (
        Linear(3, 5),
        Linear4(WIDTH, 5),
        LayerNorm(WIDTH),
        RMSNorm(WIDTH),
        BatchNorm(WIDTH),
        Dropout(0.25),
        Sinusoidal(7, layout="halves"),
        Learned(WIDTH, 9),
        TokenEmbedding(11, WIDTH),
        Add(),
        Concatenate(),
        Gate.of_width(WIDTH),
        Embed(TokenEmbedding(11, WIDTH), Learned(WIDTH, 9), norm=LayerNorm(WIDTH), dropout=Dropout(0.1)),
        parts.Passages(TokenEmbedding(11, WIDTH), Learned(WIDTH, 40)),
        parts.Fused(),
        FeedForward.gated(WIDTH, 12),
        Softmax(),
        parts.Tiled(3, 2),
        parts.Sliding(2),
        parts.Flex(form="eager"),
        parts.LinearAttention(),
        parts.Performer(WIDTH // 2, 5),
        parts.Linformer(9, 3),
        parts.AttentionFree(),
        parts.BlockSparse(2),
        parts.Repeats(parts.BlockWindow(2) | parts.Edges(2), parts.RandomBlocks(2, 1, 2)),
        parts.GlobalAttention(
            Attention.of_width(WIDTH, 2, (parts.Window(2) | parts.Marked()) & SameDocument()),
            *(Linear(WIDTH, WIDTH),) * 3,
            absent=parts.FirstToken(),
        ),
        parts.Local(parts.Chunks(3)),
        hashing(),
        parts.Axial.of_axes((5, 8), (3, 5)),
        parts.Retention.of_width(WIDTH, 2, Causal()),
        Attention.of_width(WIDTH, 4, Causal() & SameDocument()),
        CrossAttention.of_width(WIDTH, 4),
        Residual(Linear(WIDTH, WIDTH), RMSNorm(WIDTH), Dropout(0.1), LayerNorm(WIDTH)),
        block(),
        Stack((block(), block(cross=True)), LayerNorm(WIDTH)),
        LMHead.of_width(WIDTH, 11),
        translator(),
        parts.DropPath(0.1),
        parts.Scale(0.5),
        parts.Table(WIDTH, 9),
        parts.TransformerXL.of_width(WIDTH, 2),
        parts.Turned(parts.Rotary(WIDTH // 2), 2),
        parts.Token(WIDTH),
        parts.GridPositions(WIDTH, (2, 3), before=1),
        parts.Patches((2, 2), 3, Linear(12, WIDTH), (parts.Token(WIDTH),), norm=LayerNorm(WIDTH)),
        parts.GridBias(2, 3, 3),
        parts.Windows(Attention.of_width(WIDTH, 2, SameDocument()), 3, 1),
        parts.PatchMerging.of_width(WIDTH),
        parts.Pyramid((Stack((block(),)), Stack((block(2 * WIDTH),))), (parts.PatchMerging.of_width(WIDTH),)),
        parts.Convolution(WIDTH, WIDTH, 3, padding=1, groups=2),
        parts.ChannelNorm(WIDTH),
        parts.GatedConvolution.of_width(WIDTH, 3),
        parts.Frames(parts.Convolution(1, WIDTH, 3), positions=Sinusoidal(WIDTH), dropout=Dropout(0.1)),
        parts.MaskedSpans(WIDTH, 0.1),
        parts.Idle(((2, 3), ())),
        parts.PowerNorm(WIDTH),
        parts.Alibi(3),
        parts.Buckets(2, 8, 16),
        parts.Shaw(WIDTH // 2, 3),
        parts.Rotary(WIDTH // 2, scaling=parts.Yarn(4.0, 32)),
        parts.PerHead(RMSNorm(WIDTH // 2)),
        parts.Lookup("token_type_ids", 2, WIDTH),
        parts.Halves("token_type_ids", 2, WIDTH, token=5),
        parts.BehindFirst(5),
        parts.Experts.of(FeedForward.of_widths(WIDTH, 12), WIDTH, 3, 2),
        parts.Gated(FeedForward.of_widths(WIDTH, 12), Linear(WIDTH, 1)),
        parts.Capped(30.0),
        parts.Nth(),
        parts.Last(),
        parts.LastOf(2),
        parts.Mean(),
        parts.Max(),
        parts.Normalise(),
        parts.Activate("tanh"),
        parts.Squeeze(),
        parts.Clip(3.0),
        parts.MeanOfHeads((Linear(WIDTH, 2), Linear(WIDTH, 2))),
        parts.Identity(),
        parts.Branches((Linear(WIDTH, WIDTH), LayerNorm(WIDTH))),
        parts.Repeat(block(), 3),
        parts.Coupling(FeedForward.of_widths(WIDTH // 2, 6), Linear(WIDTH // 2, WIDTH // 2)),
        parts.Reversible((coupling(),) * 2, LayerNorm(2 * WIDTH)),
        parts.Chunked(FeedForward.of_widths(WIDTH, 12), 2),
        parts.SpatialGating.of_width(WIDTH, 12, Causal() & SameDocument()),
        parts.LoRA("one", 1.0, WIDTH, 5, 2, 4.0, dropout=Dropout(0.1)),
        parts.DoRA("one", 0.5, WIDTH, 5, 3, 4.0, "root"),
        parts.IA3("one", 1.0, WIDTH, "inputs"),
        parts.Whole("one", 1.0, Linear(WIDTH, 5)),
        parts.Prefix("one", 1.0, 3, WIDTH),
        parts.MadePrefix.of_widths("one", 3, WIDTH, 4, 5),
        parts.AfterPrefix(Learned(WIDTH, 43), "one", 1.0, 3),
        parts.Prompt("one", 1.0, 3, WIDTH, 11),
        parts.Adapted(Linear(WIDTH, 5), (parts.LoRA("one", 1.0, WIDTH, 5, 2, 4.0), parts.IA3("two", 0.5, 5))),
    )
}


BLOCKS = (
    parts.BlockWindow(2),
    parts.Edges(2),
    parts.RandomBlocks(2, 1, 4),
    parts.Beyond(3, parts.BlockWindow(2)),
)


def of_the_package(cls: type[Record]) -> bool:
    """Tell the records of which models are made from those that tests make."""
    return cls.__module__.startswith(ROOMS)


def buildable() -> list[type[Spec]]:
    """Return every part's spec that can be built."""
    known = [cls for cls in Record.registry.values() if issubclass(cls, Spec) and of_the_package(cls)]
    return [cls for cls in known if cls.module is not Spec.module]


def concrete(base: type[Record]) -> list[type[Record]]:
    """Return the records of the package that are a `base` and stand for something themselves."""
    known = [cls for cls in Record.registry.values() if issubclass(cls, base) and of_the_package(cls)]
    return [cls for cls in known if not cls.abstract]


@st.composite
def trees(draw: st.DrawFn, base: type[Record] = Spec, depth: int = 3) -> Record:
    """Draw a record of any type that is a `base`, its fields filled by their annotations."""
    options = concrete(base)
    if depth <= 0:
        leaves = [cls for cls in options if not _has_records(cls)]
        options = leaves or options
    cls = draw(st.sampled_from(options))
    fields = {name: draw(_values(kind, depth - 1)) for name, kind in field_types(cls).items()}
    try:
        return cls(**fields)
    except SpecError:
        return SAMPLES.get(cls, Linear(2, 2)) if issubclass(cls, Spec) else draw(_valid(cls))


def _valid(cls: type[Record]) -> st.SearchStrategy[Record]:
    both = Causal() & SameDocument()
    rules = (both, parts.Window(3), parts.Either((parts.Window(3), parts.Edges(1))), *BLOCKS)
    scalings = (parts.Llama3(), parts.Yarn(4.0, 32), parts.Dynamic(2.0, 16))
    known = (*rules, *scalings, parts.Heads(4, 2, 2), parts.RouterLosses(), parts.Chunks(3), parts.Hashes())
    return st.just({type(one).__name__: one for one in known}[cls.__name__])


def _has_records(cls: type[Record]) -> bool:
    return any("Record" in str(_mro(kind)) for kind in field_types(cls).values())


def _mro(kind: typing.Any) -> list[typing.Any]:
    if isinstance(kind, type):
        return list(kind.__mro__)
    return [_mro(inner) for inner in typing.get_args(kind)]


def _values(kind: typing.Any, depth: int) -> st.SearchStrategy[typing.Any]:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(arguments)
    if typing.get_origin(kind) is tuple:
        return _tuples(arguments, depth)
    if arguments:
        return st.one_of([_values(option, depth) for option in arguments])
    if issubclass(kind, Record):
        return trees(kind, depth)
    plain: dict[type, st.SearchStrategy[typing.Any]] = {
        bool: st.booleans(),
        int: st.integers(-3, 10**6),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(max_size=12),
        type(None): st.none(),
    }
    return plain[kind]


def _tuples(kinds: tuple[typing.Any, ...], depth: int) -> st.SearchStrategy[tuple[typing.Any, ...]]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        few = st.lists(_values(kinds[0], depth), max_size=3)
        return st.tuples(few, st.integers(1, 3)).map(lambda drawn: tuple(drawn[0]) * drawn[1])
    return st.tuples(*(_values(kind, depth) for kind in kinds))
