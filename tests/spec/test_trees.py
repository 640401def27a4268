"""Walking and rewriting: order, paths, and that nothing is copied without need."""

from __future__ import annotations

import pytest
from hypothesis import given
from torch import nn

from polyformer.parts import Attention, Causal, Dropout, LayerNorm, Linear, Residual, RMSNorm, Stack
from polyformer.spec import Record, Spec, children, rewrite, walk
from tests.spec.trees import SAMPLES, block, buildable, translator, trees


def specs_below(tree: Record, path: str = "") -> list[tuple[str, Spec]]:
    """Return the specs that become modules: those reached through specs alone."""
    found = [(path, tree)] if isinstance(tree, Spec) else []
    for name, child in children(tree):
        if isinstance(child, Spec):
            found += specs_below(child, f"{path}.{name}" if path else name)
    return found


class TestWalk:
    def test_parents_first_in_the_order_of_fields(self) -> None:
        paths = [path for path, _ in walk(block())]
        assert paths[:6] == ["", "steps.0", "steps.0.op", "steps.0.op.q", "steps.0.op.k", "steps.0.op.v"]
        for i, path in enumerate(paths):
            parent = path.rpartition(".")[0]
            if parent and not parent.endswith("steps"):
                assert parent in paths[:i]

    @given(trees())
    def test_paths_lead_to_their_records(self, tree: Record) -> None:
        for path, record in walk(tree):
            at: object = tree
            for step in path.split(".") if path else []:
                at = at[int(step)] if isinstance(at, tuple) else getattr(at, step)
            assert at is record

    @pytest.mark.parametrize("cls", buildable(), ids=lambda cls: cls.__name__)
    def test_the_path_of_a_spec_is_the_path_of_its_module(self, cls: type[Spec]) -> None:
        sample = SAMPLES[cls]
        built = sample.build("meta")
        found = specs_below(sample)
        for path, spec in found:
            assert built.get_submodule(path).spec == spec
        modules = {path for path, module in built.named_modules() if not isinstance(module, nn.ModuleList)}
        assert modules == {path for path, _ in found}


class TestRewrite:
    @given(trees())
    def test_changing_nothing_copies_nothing(self, tree: Record) -> None:
        assert rewrite(tree, lambda path, record: record) is tree

    @given(trees())
    def test_equal_records_put_in_give_an_equal_tree(self, tree: Record) -> None:
        again = rewrite(tree, lambda path, record: record.replace())
        assert again == tree
        assert hash(again) == hash(tree)
        assert again.to_json() == tree.to_json()

    @given(trees())
    def test_it_goes_bottom_up_over_the_paths_of_walk(self, tree: Record) -> None:
        seen: list[str] = []

        def look(path: str, record: Record) -> Record:
            seen.append(path)
            return record

        rewrite(tree, look)
        assert sorted(seen) == sorted(path for path, _ in walk(tree))
        place = {path: i for i, path in enumerate(seen)}
        for path in seen:
            for other in seen:
                if other != path and (path == "" or other.startswith(path + ".")):
                    assert place[other] < place[path]

    def test_a_parent_sees_its_new_children(self) -> None:
        def change(path: str, record: Record) -> Record:
            if isinstance(record, LayerNorm):
                return RMSNorm(record.width)
            if isinstance(record, Residual):
                assert isinstance(record.pre, RMSNorm)
            return record

        new = rewrite(block(), change)
        assert not any(isinstance(record, LayerNorm) for _, record in walk(new))

    def test_one_path_changes_alone(self) -> None:
        def change(path: str, record: Record) -> Record:
            return Dropout(0.5) if path == "blocks.1.steps.0.post" else record

        old = Stack((block(),) * 3)
        new = rewrite(old, change)
        assert new.blocks[0] is old.blocks[0]
        assert new.blocks[2] is old.blocks[2]
        assert new.blocks[1] == block().replace(steps=(block().steps[0].replace(post=Dropout(0.5)), *block().steps[1:]))

    def test_plain_records_are_rewritten_too(self) -> None:
        def forget(path: str, record: Record) -> Record:
            return record.replace(see=record.see & Causal()) if isinstance(record, Attention) else record

        assert all(r.see == Causal() for _, r in walk(rewrite(translator(), forget)) if isinstance(r, Attention))
        widths = rewrite(block(), lambda _, r: r.replace(inputs=8) if isinstance(r, Linear) else r)
        assert widths == rewrite(block(), lambda path, r: r.replace(inputs=8) if isinstance(r, Linear) else r)

    def test_the_root_can_be_replaced(self) -> None:
        assert rewrite(Linear(1, 2), lambda path, record: Dropout(0.5)) == Dropout(0.5)
