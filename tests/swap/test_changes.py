"""Ready changes: what they make of a spec, that they can be data, and what they refuse."""

from __future__ import annotations

import re

import pytest

from polyformer.errors import SpecError
from polyformer.families.blocks import block
from polyformer.parts import (
    Alibi,
    Attention,
    BatchNorm,
    Branches,
    Buckets,
    Capped,
    Causal,
    Chain,
    CrossAttention,
    Embed,
    FeedForward,
    Heads,
    LayerNorm,
    Learned,
    Linear,
    LMHead,
    Norm,
    PerHead,
    PowerNorm,
    Repeat,
    Residual,
    RMSNorm,
    Rotary,
    SameDocument,
    Shaw,
    Sinusoidal,
    Softmax,
    Stack,
    Tie,
    TokenEmbedding,
    Transformer,
    Window,
)
from polyformer.parts.positions import Table
from polyformer.spec import Record, rewrite, walk
from polyformer.swap import (
    Conversion,
    GroupHeads,
    KeepBlocks,
    LimitWindow,
    PlaceNorms,
    Swap,
    SwapKernel,
    SwapNorms,
    SwapPosition,
    Swaps,
    TieHead,
)
from tests.parts.models import SHAPES, Shape, decoder, encoder, translator
from tests.swap.models import LENGTH, VOCABULARY, WIDTH, gpt, olmo, t5

PLACEMENTS = ["post", "pre", "sandwich", "output"]
SCHEMES = ["none", "learned", "sinusoidal", "rotary", "alibi", "buckets", "shaw"]


def all_of(spec: Transformer, kind: type[Record]) -> list:
    return [record for _, record in walk(spec) if isinstance(record, kind)]


def changed(spec: Transformer, kind: type[Record], **values: object) -> Transformer:
    """Replace values in every record of a type."""
    return rewrite(spec, lambda path, record: record.replace(**values) if isinstance(record, kind) else record)


def every_change() -> list[Swap]:
    schemes = [SwapPosition(scheme, 9 if scheme in ("learned", "sinusoidal") else None) for scheme in SCHEMES]
    return [
        SwapKernel(Capped(50.0)),
        LimitWindow(5),
        LimitWindow(0),
        GroupHeads(1),
        TieHead(True),
        TieHead(False),
        KeepBlocks(decoder=1),
        *schemes,
        *map(SwapNorms, ("layer", "rms", "batch", "power")),
        *map(PlaceNorms, PLACEMENTS),
        Swaps((GroupHeads(2), SwapPosition("rotary"))),
        Conversion(KeepBlocks(decoder=(0,)), 2, "rotary", 4, Capped(50.0), "rms", "sandwich", False),
    ]


changes = pytest.mark.parametrize("change", every_change(), ids=repr)


class TestEveryChange:
    @changes
    def test_is_data(self, change: Swap) -> None:
        assert Swaps.from_json(Swaps((change,)).to_json()).steps == (change,)
        assert Swaps.from_toml(Swaps((change,)).to_toml()).steps == (change,)

    @changes
    @pytest.mark.parametrize("spec", [gpt(2), translator(Shape("sinusoidal", "pre", 2, 2))], ids=["gpt", "translator"])
    def test_gives_a_model_that_can_be_built(self, change: Swap, spec: Transformer) -> None:
        change.apply(spec).build("meta")

    @changes
    def test_made_twice_is_made_once(self, change: Swap) -> None:
        once = change.apply(gpt(1))
        assert change.apply(once) == once


class TestKernel:
    def test_everywhere(self) -> None:
        kernels = [record.kernel for record in all_of(translator(Shape()), Attention | CrossAttention)]
        found = SwapKernel(Capped(30.0)).apply(translator(Shape()))
        assert [record.kernel for record in all_of(found, Attention | CrossAttention)] == [Capped(30.0)] * len(kernels)

    def test_scale_and_dropout_are_the_old_ones_unless_they_are_named(self) -> None:
        spec = changed(gpt(), Attention, kernel=Softmax(scale=1.0, dropout=0.2))
        (kernel,) = set(all_of(SwapKernel(Capped(30.0)).apply(spec), Capped))
        assert kernel == Capped(30.0, 1.0, 0.2)
        (kernel,) = set(all_of(SwapKernel(Capped(30.0, 0.5)).apply(spec), Capped))
        assert kernel == Capped(30.0, 0.5, 0.2)


class TestWindow:
    def test_joins_and_leaves_the_rule(self) -> None:
        limited = LimitWindow(7).apply(gpt())
        assert {record.see for record in all_of(limited, Attention)} == {Causal() & SameDocument() & Window(7)}
        other = LimitWindow(9).apply(limited)
        assert {record.see for record in all_of(other, Attention)} == {Causal() & SameDocument() & Window(9)}
        assert LimitWindow(0).apply(limited) == gpt()

    def test_refused(self) -> None:
        with pytest.raises(SpecError, match="width can't be negative; 0 takes the window away"):
            LimitWindow(-1)


class TestHeads:
    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_groups(self, groups: int) -> None:
        found = GroupHeads(groups).apply(gpt())
        assert found == changed(
            gpt(),
            Attention,
            heads=Heads(4, groups, 4),
            k=Linear(WIDTH, groups * 4),
            v=Linear(WIDTH, groups * 4),
        )

    def test_cross_attention_too(self) -> None:
        found = GroupHeads(2).apply(translator(Shape()))
        assert {record.heads.groups for record in all_of(found, Attention | CrossAttention)} == {2}

    def test_a_norm_over_all_keys_gets_their_width(self) -> None:
        found = GroupHeads(2).apply(olmo())
        assert {record.k for record in all_of(found, Attention)} == {Chain((Linear(16, 8, False), RMSNorm(8)))}

    def test_a_norm_in_each_head_stays(self) -> None:
        whole = Chain((Linear(8, 8), PerHead(RMSNorm(8))))
        attention = Attention(whole, whole, Linear(8, 8), Linear(8, 8), Heads(1, 1, 8), Causal())
        wide = attention.replace(q=Linear(8, 16), o=Linear(16, 8), heads=Heads(2, 1, 8))
        spec = Transformer(target=Embed(TokenEmbedding(5, 8)), decoder=Stack((wide,)))
        found = all_of(GroupHeads(2).apply(spec), Attention)[0]
        assert found.k == Chain((Linear(8, 16), PerHead(RMSNorm(8))))

    @pytest.mark.parametrize(
        ("spec", "groups", "message"),
        [
            (gpt(1), 3, "decoder.blocks.0.steps.0.op: 4 heads can't share 3 key/value heads evenly"),
            (
                changed(gpt(1), Attention, k=Repeat(Softmax(), 1)),
                2,
                "decoder.blocks.0.steps.0.op.k: Repeat has no matrix of 16 outputs that could be cut anew",
            ),
        ],
    )
    def test_refused(self, spec: Transformer, groups: int, message: str) -> None:
        with pytest.raises(SpecError, match=re.escape(message)):
            GroupHeads(groups).apply(spec)

    def test_no_heads_at_all(self) -> None:
        with pytest.raises(SpecError, match="groups must be at least 1"):
            GroupHeads(0)


class TestTies:
    def test_tie_and_untie(self) -> None:
        assert TieHead(False).apply(gpt()) == gpt(tied=False)
        assert TieHead(True).apply(gpt(tied=False)) == gpt()
        assert TieHead(True).apply(gpt()) == gpt()

    def test_an_encoders_head(self) -> None:
        spec = encoder(Shape()).replace(head=LMHead.of_width(12, 17))
        assert TieHead(True).apply(spec).ties == (Tie("head.projection.weight", "source.tokens.weight"),)

    def test_others_stay_tied(self) -> None:
        spec = translator(Shape())
        shared, head = "source.tokens.weight", "head.projection.weight"
        both = TieHead(True).apply(spec)
        assert set(both.ties) == {Tie("target.tokens.weight", shared), Tie(head, shared)}
        both.build("meta")
        assert TieHead(False).apply(both) == spec

    def test_a_change_of_other_parts_leaves_ties_as_they_are_written(self) -> None:
        ties = (
            Tie("head.projection.weight", "target.tokens.weight"),
            Tie("source.tokens.weight", "target.tokens.weight"),
        )
        spec = translator(Shape()).replace(ties=ties[::-1])
        assert SwapNorms("rms").apply(spec).ties == ties[::-1]
        chained = (Tie("target.tokens.weight", "source.tokens.weight"), Tie("head.projection.weight", ties[0].to))
        assert SwapNorms("rms").apply(spec.replace(ties=chained)).ties == chained

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (encoder(Shape()), "tying needs a token embedding and a head over the vocabulary that is one matrix"),
            (
                gpt().replace(head=LMHead.of_width(WIDTH, 20), ties=()),
                "a head of 20 tokens, 16 wide, can't be tied to the embedding of 23 tokens, 16 wide",
            ),
            (
                decoder(Shape("concatenated")),
                "a head of 17 tokens, 12 wide, can't be tied to the embedding of 17 tokens, 7 wide",
            ),
        ],
    )
    def test_refused(self, spec: Transformer, message: str) -> None:
        with pytest.raises(SpecError, match=message):
            TieHead(True).apply(spec)


class TestDepth:
    @pytest.mark.parametrize(
        ("count", "kept"), [(1, [0]), (2, [0, 11]), (3, [0, 6, 11]), (6, [0, 2, 4, 7, 9, 11]), (12, [*range(12)])]
    )
    def test_a_number_is_spread_evenly(self, count: int, kept: list[int]) -> None:
        change, spec = KeepBlocks(decoder=count), gpt(12)
        assert change.apply(spec) == gpt(count)
        moves = change.moves(spec, gpt(count))
        assert moves == {f"decoder.blocks.{i}": f"decoder.blocks.{was}" for i, was in enumerate(kept)}

    def test_a_list_may_repeat_and_reorder(self) -> None:
        plain = gpt(3)
        blocks = tuple(
            rewrite(one, lambda path, record, i=i: LayerNorm(WIDTH, 0.1 + i) if isinstance(record, Norm) else record)
            for i, one in enumerate(plain.decoder.blocks)
        )
        spec = plain.replace(decoder=Stack(blocks))
        found = KeepBlocks(decoder=(2, 0, 0)).apply(spec)
        assert found.decoder.blocks == (blocks[2], blocks[0], blocks[0])

    def test_a_shared_table_goes_on_with_the_first_that_is_left(self) -> None:
        found = KeepBlocks(encoder=(1, 2)).apply(t5())
        table = "encoder.blocks.{}.steps.0.op.position.weight"
        assert found.ties == (Tie(table.format(1), table.format(0)),)
        found.build("meta")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (KeepBlocks(decoder=5), "5 of the decoder's 4 blocks can't be kept; name a number from 1 to 4"),
            (KeepBlocks(decoder=0), "0 of the decoder's 4 blocks can't be kept"),
            (KeepBlocks(decoder=(0, 4)), "the decoder has no block 4; its 4 blocks are counted from 0"),
            (KeepBlocks(encoder=1), "this model has no encoder"),
        ],
    )
    def test_refused(self, change: KeepBlocks, message: str) -> None:
        with pytest.raises(SpecError, match=message):
            change.apply(gpt())

    def test_no_block_at_all(self) -> None:
        with pytest.raises(SpecError, match="at least one block must be kept"):
            KeepBlocks(decoder=())

    def test_a_decoder_that_is_no_stack(self) -> None:
        spec = gpt(1)
        with pytest.raises(SpecError, match="its decoder is no stack of blocks"):
            KeepBlocks(decoder=1).apply(spec.replace(decoder=spec.decoder.blocks[0], ties=()))


class TestPosition:
    @pytest.mark.parametrize("shape", [shape for shape in SHAPES if "concatenated" not in shape])
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_there_is_one_scheme_afterwards(self, scheme: str, shape: str) -> None:
        kinds = {"learned": Learned, "sinusoidal": Sinusoidal}
        inside = {"rotary": Rotary, "alibi": Alibi, "buckets": Buckets, "shaw": Shaw}
        change = SwapPosition(scheme, 9 if scheme == "learned" else None)
        found = change.apply(translator(SHAPES[shape].replace(heads=2, groups=2)))
        embeddings, attentions = all_of(found, Embed), all_of(found, Attention)
        assert [type(one.positions) for one in embeddings] == [kinds.get(scheme, type(None))] * 2
        assert [type(one.position) for one in attentions] == [inside.get(scheme, type(None))] * len(attentions)
        found.build("meta")

    def test_of_each_size(self) -> None:
        position = {scheme: all_of(SwapPosition(scheme).apply(gpt(1)), Attention)[0].position for scheme in SCHEMES}
        assert position["rotary"] == Rotary(4)
        assert position["alibi"] == Alibi(4)
        assert position["buckets"] == Buckets(4, two_sided=False)
        assert position["shaw"] == Shaw(4)

    def test_an_encoder_looks_to_both_sides(self) -> None:
        found = SwapPosition("buckets").apply(translator(Shape()))
        assert [one.position.two_sided for one in all_of(found, Attention)] == [True, True, False, False]

    def test_layers_of_a_stack_share_their_buckets(self) -> None:
        found = SwapPosition("buckets").apply(translator(Shape()))
        tables = [f"{side}.blocks.{{}}.steps.0.op.position.weight" for side in ("encoder", "decoder")]
        assert found.ties[1:] == tuple(Tie(table.format(1), table.format(0)) for table in tables)

    def test_ties_go_with_what_was_tied(self) -> None:
        assert SwapPosition("rotary").apply(t5()).ties == ()
        assert SwapPosition("buckets").apply(t5()) == t5()

    def test_length_and_base(self) -> None:
        def embedded(change: SwapPosition, spec: Transformer | None = None) -> object:
            return all_of(change.apply(spec or gpt(1)), Embed)[0].positions

        assert embedded(SwapPosition("learned", 9)) == Learned(WIDTH, 9)
        assert embedded(SwapPosition("learned")) == Learned(WIDTH, LENGTH)
        assert embedded(SwapPosition("sinusoidal")) == Sinusoidal(WIDTH, LENGTH)
        assert embedded(SwapPosition("sinusoidal", base=100.0)) == Sinusoidal(WIDTH, LENGTH, base=100.0)
        held = changed(gpt(1), Embed, positions=Table(WIDTH, 9, layout="halves"))
        assert embedded(SwapPosition("sinusoidal"), held) == Table(WIDTH, 9, layout="halves")
        assert embedded(SwapPosition("sinusoidal", base=100.0), held) == Sinusoidal(WIDTH, 9, base=100.0)

    def test_what_it_has_already_it_keeps(self) -> None:
        partial = Rotary(2, 500.0, "interleaved")
        spec = changed(SwapPosition("rotary").apply(gpt(1)), Attention, position=partial)
        assert SwapPosition("rotary").apply(spec) == spec
        assert all_of(SwapPosition("rotary", base=9.0).apply(spec), Rotary) == [partial.replace(base=9.0)]

    @pytest.mark.parametrize(
        ("spec", "change", "message"),
        [
            (decoder(Shape("concatenated")), SwapPosition("rotary"), "target: positions stand beside the tokens"),
            (
                decoder(Shape("without", heads=4)),
                SwapPosition("rotary"),
                "decoder.blocks.0.steps.0.op: rotary positions turn pairs, but its heads are 3 wide",
            ),
            (decoder(Shape()), SwapPosition("learned"), "target: learned positions need a length"),
            (
                changed(gpt(1), Chain, steps=(FeedForward.of_widths(WIDTH, 4),)),
                SwapPosition("alibi"),
                "this model has no self-attention that 'alibi' positions could stand in",
            ),
            (
                gpt(1).replace(target=Linear(WIDTH, WIDTH), ties=()),
                SwapPosition("alibi"),
                "the target is Linear, whose positions can't be swapped",
            ),
            (
                changed(decoder(Shape("without")), Embed, tokens=Repeat(Linear(2, 2), 1)),
                SwapPosition("learned", 9),
                "target: it can't be told how wide positions beside Repeat are",
            ),
        ],
    )
    def test_refused(self, spec: Transformer, change: SwapPosition, message: str) -> None:
        with pytest.raises(SpecError, match=re.escape(message)):
            change.apply(spec)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"scheme": "rotary", "length": 5}, "'rotary' positions have no length; leave it out"),
            ({"scheme": "learned", "base": 5.0}, "'learned' positions have no base; leave it out"),
            ({"scheme": "rotory"}, "SwapPosition.scheme should be one of .* \\(did you mean 'rotary'\\?\\)"),
        ],
    )
    def test_values_refused(self, values: dict[str, object], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            SwapPosition(**values)


class TestNorms:
    @pytest.mark.parametrize(
        ("kind", "wanted"),
        [
            ("layer", LayerNorm(WIDTH, 1e-3)),
            ("rms", RMSNorm(WIDTH, 1e-3)),
            ("batch", BatchNorm(WIDTH, 1e-3)),
            ("power", PowerNorm(WIDTH, 1e-3)),
        ],
    )
    def test_kinds(self, kind: str, wanted: Norm) -> None:
        spec = changed(gpt(), LayerNorm, eps=1e-3)
        assert set(all_of(SwapNorms(kind).apply(spec), Norm)) == {wanted}

    def test_without_a_gain_it_stays_without(self) -> None:
        spec = changed(gpt(), LayerNorm, gain=False, bias=False)
        assert set(all_of(SwapNorms("rms").apply(spec), Norm)) == {RMSNorm(WIDTH, gain=False)}

    def test_those_of_heads_and_within_attention_stay(self) -> None:
        spec = olmo().replace(head=LMHead(Linear(WIDTH, VOCABULARY), before=LayerNorm(WIDTH)))
        found = SwapNorms("batch").apply(spec)
        assert found.head == spec.head
        assert {record.k for record in all_of(found, Attention)} == {record.k for record in all_of(spec, Attention)}
        assert {type(one.post) for one in all_of(found, Residual)} == {BatchNorm}
        assert found.decoder.norm == BatchNorm(WIDTH)

    def test_embeddings_too(self) -> None:
        assert SwapNorms("rms").apply(decoder(Shape("learned"))).target.norm == RMSNorm(12)


def placed(placement: str, dropout: float = 0.1) -> Transformer:
    attention, feeding = Attention.of_width(WIDTH, 4, Causal()), FeedForward.of_widths(WIDTH, 20)
    made = block(attention, feeding, norm=LayerNorm(WIDTH), placement=placement, dropout=dropout)
    final = None if placement == "post" else LayerNorm(WIDTH)
    return Transformer(target=Embed(TokenEmbedding(5, WIDTH)), decoder=Stack((made,) * 2, final))


class TestPlacement:
    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    @pytest.mark.parametrize("before", PLACEMENTS)
    @pytest.mark.parametrize("after", PLACEMENTS)
    def test_from_each_to_each(self, before: str, after: str, dropout: float) -> None:
        assert PlaceNorms(after).apply(placed(before, dropout)) == placed(after, dropout)

    def test_norms_go_where_they_normalise_what_is_read(self) -> None:
        old, new = placed("post"), placed("pre")
        steps = "decoder.blocks.{}.steps.{}"
        assert PlaceNorms("pre").moves(old, new) == {
            f"{steps.format(0, 0)}.pre": None,
            f"{steps.format(0, 1)}.pre": f"{steps.format(0, 0)}.after",
            f"{steps.format(1, 0)}.pre": f"{steps.format(0, 1)}.after",
            f"{steps.format(1, 1)}.pre": f"{steps.format(1, 0)}.after",
            "decoder.norm": f"{steps.format(1, 1)}.after",
        }

    @pytest.mark.parametrize(
        ("decoder", "message"),
        [
            (Stack((FeedForward.of_widths(WIDTH, 4),)), "this model has no residual connections"),
            (
                Stack((Residual(Branches((Chain((LayerNorm(WIDTH), Linear(WIDTH, WIDTH))),))),)),
                "decoder.blocks.0 has no norm in its slots, so there is none to place",
            ),
        ],
    )
    def test_refused(self, decoder: Stack, message: str) -> None:
        with pytest.raises(SpecError, match=message):
            PlaceNorms("pre").apply(Transformer(target=Embed(TokenEmbedding(5, WIDTH)), decoder=decoder))


class TestConversion:
    def test_nothing_asked_changes_nothing(self) -> None:
        assert Conversion().apply(gpt()) == gpt()
        assert Conversion().swaps() == Swaps(())

    def test_from_keys(self) -> None:
        data = {
            "depth": {"decoder": [0, 3]},
            "groups": 2,
            "position": "rotary",
            "window": 8,
            "kernel": {"type": "Capped", "cap": 50},
            "norm": "rms",
            "placement": "sandwich",
            "tied": False,
        }
        found = Conversion.from_data(data)
        assert found.swaps().steps == (
            KeepBlocks(decoder=(0, 3)),
            GroupHeads(2),
            SwapPosition("rotary"),
            LimitWindow(8),
            SwapKernel(Capped(50.0)),
            SwapNorms("rms"),
            PlaceNorms("sandwich"),
            TieHead(False),
        )
        assert found.apply(gpt()) == found.swaps().apply(gpt())

    def test_a_position_with_more_to_say(self) -> None:
        found = Conversion.from_data({"position": {"scheme": "rotary", "base": 500000}})
        assert found.swaps().steps == (SwapPosition("rotary", base=500000.0),)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"posiion": "rotary"}, "Conversion has an unknown key 'posiion' \\(did you mean 'position'\\?\\)"),
            ({"position": {"scheme": "x"}}, "Conversion.position.* should be one of"),
            ({"groups": "two"}, "Conversion.groups should be a whole number, not 'two'"),
            ({"placement": "middle"}, "Conversion.placement should be one of 'post', 'pre', 'sandwich', 'output'"),
        ],
    )
    def test_misspelt(self, data: dict[str, object], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            Conversion.from_data(data)
