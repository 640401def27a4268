"""Every part keeps the invariance contract, or breaks it exactly as it declares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import (
    CLAUSES,
    Convolution,
    CrossAttention,
    Differs,
    FeedForward,
    Kernel,
    Linear,
    Mean,
    Refuses,
    Rule,
    Stack,
    Within,
    contract_of,
)
from polyformer.parts.contract import Clause
from polyformer.parts.flow import start_flow
from polyformer.parts.part import Part
from polyformer.spec import Spec
from tests.parts.clauses import NotPosedError, allowed, measure
from tests.parts.models import SHAPES, encoder, translator
from tests.parts.subjects import BOTH_WAYS, CAUSAL, EVERY, RULES, Subject, attention, unable
from tests.parts.table import reasons
from tests.spec.trees import WIDTH, buildable

every = pytest.mark.parametrize("subject", EVERY, ids=str)


def hold_to(subject: Subject, clause: Clause) -> None:
    """Measure a clause, and compare with what the subject declares."""
    clash = contract_of(subject.spec).get(clause)
    try:
        if clash is not None and isinstance(clash.term, Refuses):
            with pytest.raises(SpecError, match=rf"{clash.part} can't be {clause}: "):
                measure(subject, clause)
            return
        measured = measure(subject, clause)
    except NotPosedError:
        pytest.skip(f"{clause} has no meaning for {subject.feed}")
    tolerance = allowed(subject, clause, CLAUSES[clause].tolerance)
    if clash is not None and isinstance(clash.term, Differs):
        assert measured > 1e-6, f"{clash.part} declares that it differs, but holds: {clash.term.why}"
    else:
        assert measured <= tolerance, f"{subject} is not the same {clause}: {measured:.1e}"


@every
@pytest.mark.parametrize("clause", [clause for clause in CLAUSES if clause != "compiled"])
def test_a_part_keeps_what_it_signs(subject: Subject, clause: Clause) -> None:
    hold_to(subject, clause)


COMPILED = ("Attention, plain causal", "FeedForward", "Residual, sandwich")


@pytest.mark.parametrize("subject", [one for one in EVERY if str(one) in COMPILED], ids=str)
def test_compiled_is_eager(subject: Subject) -> None:
    hold_to(subject, "compiled")


@pytest.mark.slow
@every
def test_all_compiled_is_eager(subject: Subject) -> None:
    hold_to(subject, "compiled")


def test_every_part_is_put_through() -> None:
    assert {subject.part for subject in EVERY} == set(buildable())
    assert len({str(subject) for subject in EVERY}) == len(EVERY)


class LooksBack(Kernel):
    """A kernel for the tests, which knows one direction only."""

    def unable(self, see: Rule) -> str:
        return "it only ever looks back" if see.looks_ahead else ""


def test_a_kernel_that_can_not_follow_a_rule_makes_no_attention() -> None:
    assert attention(CAUSAL, kernel=LooksBack()).kernel == LooksBack()
    with pytest.raises(SpecError, match=r"LooksBack can't follow SameDocument\(\): it only ever looks back"):
        attention(BOTH_WAYS, kernel=LooksBack())
    with pytest.raises(SpecError, match=r"LooksBack can't follow Everyone\(\)"):
        CrossAttention.of_width(WIDTH, 2).replace(kernel=LooksBack())
    for kernel, rule in unable():
        with pytest.raises(SpecError, match=f"{type(kernel).__name__} can't follow"):
            attention(RULES[rule], kernel=kernel)


def test_the_page_is_up_to_date() -> None:
    page = (Path(__file__).parents[2] / "docs" / "parts.md").read_text(encoding="utf-8")
    missing = [str(subject) for subject in EVERY if f"`{subject}`" not in page]
    missing += [reason for reason in reasons() if reason not in page]
    assert not missing, "docs/parts.md is old; make it anew: python -m tests.parts.table --write docs/parts.md"
    assert "BROKEN" not in page


class Averaging(Spec):
    """A part for the tests, which hears padding and other documents; what it says of that is up to `says`."""

    says: str = "nothing"

    def breaks(self) -> dict[Clause, Differs | Refuses | Within]:
        terms = {"differs": Differs("it does"), "refuses": Refuses("it says so"), "within": Within(1e3, "widely")}
        return {"packed": terms[self.says]} if self.says in terms else {}

    def module(self) -> Part:
        return AveragingPart(self)


class AveragingPart(Part):
    """x + the mean over all rows; but for "refuses asked", it forgets to refuse."""

    def forward(self, x: torch.Tensor, flow: object) -> torch.Tensor:
        return x + x.mean(1, keepdim=True)


class Exact(Averaging):
    """A part for the tests that holds everything."""

    def module(self) -> Part:
        return Linear(WIDTH, WIDTH).module()


class TestTheHarnessCanFail:
    @pytest.mark.parametrize("clause", ["padded on the right", "padded on the left", "cached", "packed"])
    def test_a_leak_that_is_not_declared(self, clause: Clause) -> None:
        with pytest.raises(AssertionError, match=f"Averaging is not the same {clause}"):
            hold_to(Subject(Averaging, "", Averaging()), clause)

    def test_a_leak_that_is_declared(self) -> None:
        hold_to(Subject(Averaging, "", Averaging("differs")), "packed")
        hold_to(Subject(Averaging, "", Averaging("within")), "packed")

    def test_a_refusal_that_never_comes(self) -> None:
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
            hold_to(Subject(Averaging, "", Averaging("refuses")), "packed")

    def test_a_declaration_that_is_out_of_date(self) -> None:
        with pytest.raises(AssertionError, match="Exact declares that it differs, but holds"):
            hold_to(Subject(Exact, "", Exact("differs")), "packed")


class TestDeclarations:
    def test_a_tree_breaks_what_is_in_it(self) -> None:
        tree = Stack((FeedForward.of_widths(WIDTH, 4), Convolution(WIDTH, WIDTH, 3, padding=1)))
        assert {clause: clash.part for clause, clash in contract_of(tree).items()} == {
            "cached": "Convolution",
            "packed": "Convolution",
        }
        assert not contract_of(FeedForward.of_widths(WIDTH, 4))

    def test_a_refusal_stands_above_a_difference(self) -> None:
        for order in ((Averaging("differs"), Mean()), (Mean(), Averaging("differs"))):
            assert contract_of(Stack(order))["packed"].part == "Mean"
        wide = contract_of(Stack((Averaging("within"), Averaging("differs"))))["packed"]
        assert isinstance(wide.term, Differs)

    def test_an_encoder_need_not_be_read_from_a_cache(self) -> None:
        clash = contract_of(encoder(SHAPES["2017"]))["cached"]
        assert clash.part == "Transformer"
        whole = contract_of(translator(SHAPES["2017"]))
        assert "cached" not in whole  # though its encoder sees everyone
        assert whole["packed"].part == "Attention"

    def test_a_part_refuses_in_the_words_of_its_declaration(self) -> None:
        x = torch.zeros(1, 4, WIDTH)
        with pytest.raises(SpecError, match="Mean can't be packed: it gives one vector a row, not one a document"):
            Mean().build()(x, start_flow(x, documents=torch.tensor([[0, 0, 1, 1]])))
