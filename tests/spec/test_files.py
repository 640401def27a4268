"""Specs as files: both ways, short, and strict about every key."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given

from polyformer.errors import SpecError
from polyformer.parts import Attention, Causal, Embed, LayerNorm, Linear, Residual, Rule, SameDocument, Stack
from polyformer.parts.rules import All
from polyformer.spec import Record, Spec
from tests.spec.trees import SAMPLES, block, buildable, translator, trees


class TestRoundTrip:
    @given(trees())
    def test_json(self, tree: Record) -> None:
        text = tree.to_json()
        again = Record.from_json(text)
        assert again == tree
        assert type(again) is type(tree)
        assert again.to_json() == text

    @given(trees())
    def test_toml(self, tree: Record) -> None:
        again = Record.from_toml(tree.to_toml())
        assert again == tree
        assert again.to_json() == tree.to_json()

    @given(trees(Rule))
    def test_rules(self, rule: Record) -> None:
        assert Rule.from_data(json.loads(rule.to_json())) == rule

    @pytest.mark.parametrize("cls", buildable(), ids=lambda cls: cls.__name__)
    def test_every_part(self, cls: type[Spec]) -> None:
        sample = SAMPLES[cls]
        assert Spec.from_json(sample.to_json()) == sample
        assert cls.from_data(sample.to_data()) == sample
        assert Spec.from_toml(sample.to_toml()) == sample

    def test_every_part_has_a_sample(self) -> None:
        assert {cls.__name__ for cls in buildable()} == {cls.__name__ for cls in SAMPLES}

    def test_json_is_plain_json(self) -> None:
        def refuse(text: str) -> None:
            raise AssertionError(f"{text} is not JSON")

        json.loads(translator().to_json(), parse_constant=refuse)


class TestShortness:
    def test_defaults_are_left_out(self) -> None:
        assert Linear(3, 5, bias=True).to_data() == {"inputs": 3, "outputs": 5}
        assert Linear(3, 5, bias=False).to_data() == {"inputs": 3, "outputs": 5, "bias": False}

    def test_types_stand_only_where_they_are_open(self) -> None:
        data = SAMPLES[Attention].to_data()
        assert "type" not in data["heads"]
        assert data["q"]["type"] == "Linear"
        assert data["see"] == {"type": "All", "rules": [{"type": "Causal"}, {"type": "SameDocument"}]}

    def test_a_deep_model_is_as_long_as_a_shallow_one(self) -> None:
        deep, shallow = (Stack((block(),) * n, LayerNorm(8)).to_json() for n in (48, 2))
        assert len(deep.splitlines()) == len(shallow.splitlines())
        assert len(deep.splitlines()) < 100
        assert len(Stack.from_json(deep).blocks) == 48

    def test_a_translator_of_48_layers(self) -> None:
        assert len(translator(48).to_json().splitlines()) < 300

    @pytest.mark.parametrize(
        ("pattern", "written"),
        [
            ("AAAA", [4]),
            ("ABABAB", [3]),
            ("AABAABAAB", [3]),
            ("ABBBBC", ["A", 4, "C"]),
            ("AAABBB", [3, 3]),
            ("ABC", ["A", "B", "C"]),
            ("ABABA", [2, "A"]),
            ("", []),
        ],
    )
    def test_repeats_and_patterns(self, pattern: str, written: list[str | int]) -> None:
        kinds = {"A": Linear(1, 1), "B": Linear(2, 2), "C": Linear(3, 3)}
        stack = Stack(tuple(kinds[letter] for letter in pattern))
        blocks = stack.to_data()["blocks"]
        assert [item["repeat"] if "repeat" in item else "ABC"[item["inputs"] - 1] for item in blocks] == written
        assert Stack.from_data(stack.to_data()) == stack

    def test_plain_numbers_are_not_folded(self) -> None:
        from tests.spec.test_records import Sizes

        assert Sizes(1, many=(7, 7, 7)).to_data() == {"count": 1, "many": [7, 7, 7]}

    def test_many_different_blocks_are_written_quickly(self) -> None:
        stack = Stack(tuple(Linear(i + 1, 1) for i in range(600)))
        assert Stack.from_data(stack.to_data()) == stack


REFUSED = [
    ('{"type": "Linear", "inputs": 1, "outputs": 2, "bais": true}', "unknown key 'bais' (did you mean 'bias'?)"),
    ('{"type": "Linear", "inputs": 1, "outputs": 2, "qqq": 1}', "unknown key 'qqq' (known: bias, inputs, outputs)"),
    ('{"type": "Linear", "inputs": 1}', "lacks the key 'outputs' (a whole number)"),
    ('{"type": "Linear", "inputs": "1", "outputs": 2}', ".inputs should be a whole number, not '1'"),
    ('{"type": "Linaer", "inputs": 1, "outputs": 2}', "no Record of type 'Linaer' (did you mean 'Linear'?)"),
    ('{"type": 7}', "no Record of type '7'"),
    ('{"type": "LayerNorm", "width": 8, "width": 9}', "the key 'width' twice"),
    ('{"type": "LayerNorm", "width": 8, "eps": NaN}', "eps should be a number"),
    ('{"type": "Sinusoidal", "width": 8, "layout": "halfs"}', "not 'halfs' (did you mean 'halves'?)"),
    ('{"type": "Embed", "tokens": {"type": "Causal"}}', "model.json.tokens: there is no Spec of type 'Causal'"),
    ('{"type": "Embed", "tokens": {}}', "model.json.tokens lacks the key 'type'"),
    ('{"type": "Embed", "tokens": 3}', "model.json.tokens should be Spec, not 3"),
    (
        '{"type": "Residual", "op": {"type": "Linear", "inputs": 1, "outputs": 1, "x": 1}}',
        "model.json.op has an unknown",
    ),
    ('{"type": "Stack", "blocks": 5}', "blocks should be a list of Spec, not 5"),
    ('{"type": "Stack", "blocks": [5]}', "blocks[0] should be Spec, not 5"),
    ('{"type": "Stack", "blocks": [{"repeat": 2, "of": 5}]}', "blocks[0].of should be a list"),
    ('{"type": "Stack", "blocks": [{"repeat": 2, "of": []}]}', "blocks[0].of should be a list"),
    ('{"type": "Stack", "blocks": [{"repeat": 0, "of": [{"type": "Add"}]}]}', "repeat should be between 1 and 100,000"),
    ('{"type": "Stack", "blocks": [{"repeat": 1e3, "of": []}]}', "repeat should be a whole number"),
    ('{"type": "Stack", "blocks": [{"repeat": 1000000000, "of": [{"type": "Add"}]}]}', "between 1 and 100,000"),
    ('{"type": "Heads", "count": 3, "groups": 2, "width": 1}', "can't share 2 key/value heads evenly"),
    ("[1, 2]", "should be Record, not list"),
    ("null", "should be Record, not None"),
    ("{", "is not JSON"),
    ("", "is not JSON"),
    ('{"type": "Add"} x', "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("9" * 5000, "is not JSON"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED, ids=range(len(REFUSED)))
def test_json_that_can_not_be_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        Record.from_json(text, where="model.json")
    assert sentence in str(caught.value)
    assert "model.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("type = ", "recipe.toml is not TOML"),
        ('type = "Linear"\ninputs = 1\ninputs = 2', "recipe.toml is not TOML"),
        ('type = "Linear"\ninputs = 1\noutput = 2', "unknown key 'output' (did you mean 'outputs'?)"),
        ('type = "Linear"\ninputs = 1.5\noutputs = 2', "recipe.toml.inputs should be a whole number, not 1.5"),
        ('type = "LayerNorm"\nwidth = 8\neps = nan', "recipe.toml.eps should be a number"),
        ("x = " + "[" * 100_000, "recipe.toml is not TOML"),
    ],
)
def test_toml_that_can_not_be_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        Record.from_toml(text, where="recipe.toml")
    assert sentence in str(caught.value)


def test_a_file_of_another_type_is_refused() -> None:
    with pytest.raises(SpecError, match="there is no Stack of type 'Linear'"):
        Stack.from_json(Linear(1, 1).to_json())
    with pytest.raises(SpecError, match="there is no Rule of type 'LayerNorm'"):
        Rule.from_data({"type": "LayerNorm", "width": 3})


@pytest.mark.parametrize("base", ["Spec", "Record", "Norm", "Position", "Rule", "Kernel", "Combine"])
def test_a_base_is_no_type_of_its_own(base: str) -> None:
    with pytest.raises(SpecError, match=f"no Record of type '{base}'"):
        Record.from_data({"type": base, "width": 8} if base in ("Norm", "Position") else {"type": base})


def test_the_type_may_be_left_out_where_it_is_known() -> None:
    assert Linear.from_json('{"inputs": 1, "outputs": 2}') == Linear(1, 2)
    assert Embed.from_toml('tokens = {type = "Linear", inputs = 1, outputs = 2}').tokens == Linear(1, 2)


def test_errors_name_the_path() -> None:
    data = Stack((block(), block())).to_data()
    data["blocks"][0]["of"][0]["steps"][0]["op"]["q"]["outptus"] = 3
    with pytest.raises(SpecError, match=r"Stack.blocks\[0\].of\[0\].steps\[0\].op.q has an unknown key 'outptus'"):
        Stack.from_data(data)


def test_toml_reads_as_a_person_would_write_it() -> None:
    text = """
        op = {type = "Attention", heads = {count = 2, groups = 2, width = 4}, see = {type = "Causal"}, \
              q = {type = "Linear", inputs = 8, outputs = 8}, k = {type = "Linear", inputs = 8, outputs = 8}, \
              v = {type = "Linear", inputs = 8, outputs = 8}, o = {type = "Linear", inputs = 8, outputs = 8}}
        [pre]
        type = "LayerNorm"
        width = 8
    """
    assert Residual.from_toml(text) == Residual(Attention.of_width(8, 2, Causal()), LayerNorm(8))


def test_nested_all_survives() -> None:
    rule = All((All((Causal(),)), SameDocument()))
    assert Rule.from_data(tomllib.loads(rule.to_toml())) == rule
