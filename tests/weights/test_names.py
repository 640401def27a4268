"""One table serves both ways: whatever goes through it comes back bit for bit, and nothing is lost on the way."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polyformer.errors import WeightsError
from polyformer.weights.files import TensorMap
from polyformer.weights.names import Names, Operation, Permute, Reshape, Row, Split, Transpose, rows_below


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, bytes(tensor.clone(memory_format=torch.contiguous_format).untyped_storage())


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


ATTENTION = Names(
    [
        Row([f"blocks.{{i}}.{p}.{{w}}" for p in "qkv"], "layers.{i}.in_proj_{w}", Split(3)),
        *rows_below("blocks.{i}", "layers.{i}", {"o": "out_proj"}),
        Row("blocks.{i}.experts.{j}.up", "layers.{i}.moe.{j}.w", Transpose()),
        Row("bias", "final_bias", Reshape(disk=(1, -1), ours=(-1,))),
    ]
)


def test_names_and_values_go_both_ways() -> None:
    disk = {
        "layers.0.in_proj_weight": some(6, 2),
        "layers.0.in_proj_bias": some(6),
        "layers.0.out_proj.weight": some(2, 2),
        "layers.11.moe.3.w": some(4, 5),
        "final_bias": some(1, 7),
    }
    ours = ATTENTION.to_ours(disk)
    assert set(ours) == {
        *(f"blocks.0.{p}.{w}" for p in "qkv" for w in ("weight", "bias")),
        "blocks.0.o.weight",
        "blocks.11.experts.3.up",
        "bias",
    }
    assert ours["blocks.0.k.weight"].equal(disk["layers.0.in_proj_weight"][2:4])
    assert ours["blocks.11.experts.3.up"].shape == (5, 4)
    assert ours["bias"].shape == (7,)
    back = ATTENTION.to_disk(ours)
    assert set(back) == set(disk)
    assert all(bits(back[name]) == bits(disk[name]) for name in disk)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[Operation, ...], tuple[int, ...]]:
    """Operations that fit one after the other, and the shape on disk that they start from."""
    first = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    shape: tuple[int, ...] = first
    operations: list[Operation] = []
    for kind in draw(st.lists(st.sampled_from(["permute", "transpose", "reshape", "split"]), max_size=4)):
        if kind == "permute":
            dims = tuple(draw(st.permutations(range(len(shape)))))
            operations.append(Permute(dims))
            shape = tuple(shape[d] for d in dims)
        elif kind == "transpose":
            operations.append(Transpose())
            shape = (*shape[:-2], *reversed(shape[-2:]))
        elif kind == "reshape":
            new = (*shape[:-2], -1) if draw(st.booleans()) else (1, *shape)
            operations.append(Reshape(disk=shape, ours=new))
            shape = tuple(torch.empty(shape).reshape(new).shape)
        else:
            dim = draw(st.integers(0, len(shape) - 1))
            cut = draw(st.integers(0, shape[dim]))
            operations.append(Split((cut, shape[dim] - cut), dim))
            break
    return tuple(operations), first


@given(chains(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64]))
def test_any_chain_of_operations_is_undone_bit_for_bit(
    chain: tuple[tuple[Operation, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    operations, shape = chain
    ours = ("a", "b") if operations and isinstance(operations[-1], Split) else ("a",)
    table = Names([Row(ours, "x", *operations)])
    tensor = (torch.randn(shape) * 100).to(dtype)
    held = dict(table.to_ours({"x": tensor}))
    assert set(held) == set(ours)
    assert sum(part.numel() for part in held.values()) == tensor.numel()
    assert bits(table.to_disk(held)["x"]) == bits(tensor)


def test_nothing_is_read_before_it_is_asked_for() -> None:
    reads: list[str] = []

    def reader(name: str) -> Tensor:
        reads.append(name)
        return some(6, 2)

    names = ("layers.0.in_proj_weight", "layers.1.in_proj_weight")
    ours = ATTENTION.to_ours(TensorMap({name: functools.partial(reader, name) for name in names}))
    assert len(ours) == 6
    assert reads == []
    assert ours["blocks.1.q.weight"].shape == (2, 2)
    assert reads == ["layers.1.in_proj_weight"]


def test_left_over_tensors_are_named() -> None:
    with pytest.raises(WeightsError, match=r"layers\.0\.surprise.*belongs to no part"):
        ATTENTION.to_ours({"layers.0.surprise": some(1)})
    with pytest.raises(WeightsError, match=r"blocks\.x\.q\.weight.*belongs to no part"):
        ATTENTION.to_disk({"blocks.x.q.weight": some(1)})


def test_a_part_of_a_fused_tensor_is_not_enough() -> None:
    with pytest.raises(WeightsError, match=r"'blocks\.0\.v\.weight' is missing.*'blocks\.0\.q\.weight'"):
        ATTENTION.to_disk({"blocks.0.q.weight": some(2, 2), "blocks.0.k.weight": some(2, 2)})


def test_a_shape_that_can_not_be_cut_is_named() -> None:
    ours = ATTENTION.to_ours({"layers.0.in_proj_weight": some(7, 2)})
    with pytest.raises(WeightsError, match=r"layers\.0\.in_proj_weight.*\[7, 2\]"):
        ours["blocks.0.q.weight"]


def test_several_names_of_one_tensor() -> None:
    table = Names([Row("embedding", "shared"), Row("embedding", "encoder.embedding")])
    one = some(3, 2)
    assert table.to_ours({"shared": one})["embedding"].equal(one)
    assert table.to_ours({"encoder.embedding": one})["embedding"].equal(one)
    assert table.to_ours({"encoder.embedding": one, "shared": one.clone()})["embedding"].equal(one)
    assert set(table.to_disk({"embedding": one})) == {"shared"}
    with pytest.raises(WeightsError, match=r"'shared' and 'encoder\.embedding' should be equal"):
        table.to_ours({"encoder.embedding": one, "shared": one + 1})["embedding"]


def test_computed_tensors_are_checked_and_dropped() -> None:
    table = Names([Row("a", "a")], computed={"layers.{i}.mask": lambda tensor: bool((tensor == 1).all())})
    assert set(table.to_ours({"a": some(1), "layers.3.mask": torch.ones(2)})) == {"a"}
    with pytest.raises(WeightsError, match=r"layers\.3\.mask.*not what is computed"):
        table.to_ours({"a": some(1), "layers.3.mask": torch.zeros(2)})


def test_a_missing_tensor_is_called_by_its_name_on_disk() -> None:
    ours = ATTENTION.to_ours({"layers.0.out_proj.weight": some(2, 2)})
    assert ours.called("blocks.4.k.bias") == "'layers.4.in_proj_bias'"
    assert ours.called("unknown") == "'unknown'"
