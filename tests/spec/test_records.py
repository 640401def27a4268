"""Records: what they take, what they refuse and in which words, and that they stay as they are."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from polyformer.errors import SpecError, suggest
from polyformer.parts import Attention, Causal, Dropout, Everyone, Heads, LayerNorm, Linear, Softmax, Stack
from polyformer.parts.feedforward import FeedForward
from polyformer.spec import Record, Spec, field_types, json_schema
from tests.spec.trees import SAMPLES, buildable, translator


class Sizes(Record):
    """Holds a value of every plain kind."""

    count: int
    share: float = 0.5
    name: str = "plain"
    on: bool = False
    mode: Literal["quick", "careful"] = "quick"
    level: Literal[1, 2] = 1
    many: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    twice: tuple[Linear, Linear] | None = None


class Plain(Record):
    """One of two records without a common base but `Record`."""

    a: int = 1


class Other(Record):
    """The other of the two."""

    a: int = 1


class Choice(Record):
    """Holds either."""

    one: Plain | Other
    many: tuple[Plain | Other, ...] = ()


class TestValues:
    def test_whole_numbers_become_floats_and_lists_tuples(self) -> None:
        made = Sizes(3, share=1, many=[1, 2], pair=[3, 4])
        assert made == Sizes(3, share=1.0, many=(1, 2), pair=(3, 4.0))
        assert isinstance(made.share, float)
        assert isinstance(made.pair[1], float)
        assert hash(made) == hash(Sizes(3, share=1.0, many=(1, 2), pair=(3, 4.0)))

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"count": "3"}, "Sizes.count should be a whole number, not '3'"),
            ({"count": 3.0}, "Sizes.count should be a whole number, not 3.0"),
            ({"count": True}, "Sizes.count should be a whole number, not True"),
            ({"count": None}, "Sizes.count should be a whole number, not None"),
            ({"count": 1, "share": "half"}, "Sizes.share should be a number, not 'half'"),
            ({"count": 1, "share": True}, "Sizes.share should be a number, not True"),
            ({"count": 1, "name": 7}, "Sizes.name should be text, not 7"),
            ({"count": 1, "on": 1}, "Sizes.on should be true or false, not 1"),
            ({"count": 1, "mode": "carefull"}, "not 'carefull' (did you mean 'careful'?)"),
            ({"count": 1, "mode": 1}, "Sizes.mode should be one of 'quick', 'careful', not 1"),
            ({"count": 1, "level": True}, "Sizes.level should be one of 1, 2, not True"),
            ({"count": 1, "many": (1, "x")}, "Sizes.many[1] should be a whole number, not 'x'"),
            ({"count": 1, "many": 7}, "Sizes.many should be a list of a whole number, not 7"),
            ({"count": 1, "pair": (1,)}, "Sizes.pair should have 2 entries, not 1"),
            ({"count": 1, "limit": "none"}, "Sizes.limit should be a whole number, not 'none'"),
        ],
    )
    def test_wrong_kinds_are_named(self, fields: dict[str, object], sentence: str) -> None:
        with pytest.raises(SpecError) as caught:
            Sizes(**fields)
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 10**400])
    def test_numbers_that_no_file_can_hold_are_refused(self, value: float) -> None:
        with pytest.raises(SpecError, match="share should be a number"):
            Sizes(1, share=value)

    def test_an_argument_of_no_field_is_a_type_error(self) -> None:
        with pytest.raises(TypeError, match="unexpected keyword"):
            Sizes(1, cuont=2)

    def test_records_in_the_wrong_place_are_named_by_type(self) -> None:
        with pytest.raises(SpecError, match=r"Stack.blocks\[1\] should be Spec, not Everyone"):
            Stack((Linear(1, 1), Everyone()))
        with pytest.raises(SpecError, match=r"Attention.see should be Rule, not Linear"):
            SAMPLES[Attention].replace(see=Linear(1, 1))

    def test_an_optional_field_must_default_to_none(self) -> None:
        class Wrong(Record):
            limit: int | None = 3

        try:
            with pytest.raises(TypeError, match="default must be None"):
                field_types(Wrong)
        finally:
            del Record.registry["Wrong"]

    def test_two_types_of_one_name_are_refused(self) -> None:
        with pytest.raises(TypeError, match="two record types are named Linear"):
            type("Linear", (Record,), {"__module__": __name__, "__annotations__": {}})
        assert Record.registry["Linear"] is Linear


class TestChecks:
    @pytest.mark.parametrize(
        ("make", "sentence"),
        [
            (lambda: Linear(0, 1), "Linear: inputs and outputs must be at least 1"),
            (lambda: Dropout(1.0), "Dropout: rate must be in [0, 1), not 1.0"),
            (lambda: Softmax(dropout=-0.1), "Softmax: dropout must be in [0, 1), not -0.1"),
            (lambda: LayerNorm(0), "LayerNorm: width must be at least 1"),
            (lambda: Heads(6, 4, 8), "Heads: 6 heads can't share 4 key/value heads evenly"),
            (lambda: Heads.of_width(10, 3), "a width of 10 can't be cut into 3 heads evenly"),
            (lambda: translator().replace(encoder=None), "source and encoder go together"),
            (lambda: translator().replace(target=None), "target and decoder go together"),
        ],
    )
    def test_values_that_do_not_fit_together(self, make, sentence: str) -> None:
        with pytest.raises(SpecError) as caught:
            make()
        assert sentence in str(caught.value)


class TestImmutability:
    @pytest.mark.parametrize("cls", buildable(), ids=lambda cls: cls.__name__)
    def test_no_field_can_be_set_or_deleted(self, cls: type[Spec]) -> None:
        sample = SAMPLES[cls]
        for name in (*field_types(cls), "brand_new"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(sample, name, 1)
        for name in field_types(cls):
            with pytest.raises(dataclasses.FrozenInstanceError):
                delattr(sample, name)

    def test_a_list_handed_in_is_not_kept(self) -> None:
        blocks = [Linear(1, 1)]
        stack = Stack(blocks)
        blocks.append(Linear(1, 1))
        assert len(stack.blocks) == 1

    def test_replace_copies_and_checks(self) -> None:
        old = Linear(3, 5)
        assert old.replace(outputs=7) == Linear(3, 7)
        assert old == Linear(3, 5)
        with pytest.raises(SpecError, match=r"Linear has no field 'output' \(did you mean 'outputs'\?\)"):
            old.replace(output=7)
        with pytest.raises(SpecError, match="at least 1"):
            old.replace(outputs=0)


class TestEquality:
    def test_by_value_and_by_type(self) -> None:
        assert translator() == translator()
        assert hash(translator()) == hash(translator())
        assert translator() != translator(3)
        assert Plain() != Other()
        assert Everyone() != Causal()
        assert len({Linear(1, 2), Linear(1, 2, True), Linear(1, 2, False)}) == 2

    def test_a_change_far_below_is_seen(self) -> None:
        deep = translator()
        ties = (deep.ties[0], deep.ties[1].replace(to="target.tokens.weight"))
        assert deep.replace(ties=ties) != deep


class TestUnions:
    """Fields that may hold one of several types without a base in between."""

    @pytest.mark.parametrize("one", [Plain(2), Other(2), Plain(), Other()])
    def test_round_trip(self, one: Plain | Other) -> None:
        choice = Choice(one, (Plain(), Other(), Plain(), Other(), Other(5)))
        assert Choice.from_json(choice.to_json()) == choice
        assert Choice.from_toml(choice.to_toml()) == choice

    def test_the_type_must_be_one_of_them(self) -> None:
        with pytest.raises(SpecError, match=r"Choice.one: there is no Plain or Other of type 'Othr' .*'Other'"):
            Choice.from_data({"one": {"type": "Othr"}})

    def test_repeats_of_them_are_in_the_schema(self) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        choice = Choice(Other(), (Plain(), Other()) * 4)
        jsonschema.Draft202012Validator(json_schema(Choice)).validate(choice.to_data())

    def test_pairs_of_records(self) -> None:
        sizes = Sizes(1, twice=(Linear(1, 2), Linear(1, 2)))
        assert Sizes.from_json(sizes.to_json()) == sizes


def test_activations_are_suggested() -> None:
    with pytest.raises(SpecError, match=r"did you mean 'gelu'"):
        FeedForward.of_widths(2, 4, "gellu")


def test_suggest_lists_all_when_none_is_near() -> None:
    assert suggest("zzz", ["alpha", "beta"]) == " (known: alpha, beta)"
    assert suggest("alpa", ["alpha", "beta"]) == " (did you mean 'alpha'?)"
    assert suggest("x", []) == ""
