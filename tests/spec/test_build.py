"""Building: on the meta device as for real, in a dtype, and only what can be built."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import Linear, Stack
from polyformer.parts.residual import Residual
from polyformer.spec import Spec
from tests.spec.trees import SAMPLES, buildable, translator


class Drawing(Spec):
    """Describes something that is no module."""

    size: int = 1


@pytest.mark.parametrize("cls", buildable(), ids=lambda cls: cls.__name__)
def test_meta_has_the_names_shapes_and_dtypes_of_the_real_thing(cls: type[Spec]) -> None:
    meta, real = SAMPLES[cls].build("meta"), SAMPLES[cls].build()
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert not any(tensor.is_meta for tensor in real.state_dict().values())
    described = [{name: (tuple(t.shape), t.dtype) for name, t in built.state_dict().items()} for built in (meta, real)]
    assert described[0] == described[1]
    assert [n for n, _ in meta.named_parameters()] == [n for n, _ in real.named_parameters()]


@pytest.mark.parametrize("cls", buildable(), ids=lambda cls: cls.__name__)
def test_every_fresh_tensor_is_finite_and_seeded(cls: type[Spec]) -> None:
    torch.manual_seed(3)
    first = SAMPLES[cls].build().state_dict()
    torch.manual_seed(3)
    second = SAMPLES[cls].build().state_dict()
    for name, tensor in first.items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, second[name]), name


def test_dtype() -> None:
    built = translator().build(dtype=torch.float64)
    assert {p.dtype for p in built.parameters()} == {torch.float64}
    assert {b.dtype for b in built.buffers()} <= {torch.float64}
    assert next(Linear(1, 1).build().parameters()).dtype == torch.float32


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(SpecError, match="Drawing describes data and can't be built"):
        Residual(Drawing()).build()


def test_a_module_knows_its_spec() -> None:
    spec = translator()
    assert spec.build("meta").spec is spec


def test_specs_can_be_copied_and_pickled() -> None:
    spec = translator()
    assert copy.deepcopy(spec) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_blocks_of_one_spec_are_modules_of_their_own() -> None:
    built = Stack((Linear(2, 2),) * 2).build()
    first, second = (p for n, p in built.named_parameters() if n.endswith("weight"))
    assert first is not second
    assert not torch.equal(first, second)
