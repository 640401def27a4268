"""Longformer and BigBird against the reference library, where the parity suite does not look: what is global where a
batch does not say, which blocks are drawn, long texts, and what can not be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polyformer as pf
from polyformer.errors import SpecError
from polyformer.families import read_family
from polyformer.parts import RandomBlocks
from polyformer.parts.blocks import draw
from tests.families.cases import CASES, Case
from tests.families.parity import assert_same, load, mine, real, reference, theirs, transformers

BY_NAME = {case.name: case for case in CASES}


def both(case: Case, data: dict[str, Tensor], training: bool = False) -> float:
    """Return the largest difference between our answers and the reference's."""
    model, loaded = reference(case)[0], load(case)
    try:
        with torch.no_grad():
            found, wanted = mine(loaded.model.train(training), data), theirs(model.train(training), data)
    finally:
        model.eval()
    found, wanted = real(found, data), real(wanted, data)
    assert_same(found, wanted, case.tolerance)
    return max(float((found[name] - one).abs().max()) for name, one in wanted.items())


class TestWhichTokensAreGlobal:
    def test_the_first_where_a_sequence_is_judged(self) -> None:
        case = BY_NAME["longformer-sequence"]
        data = {name: one for name, one in case.inputs().items() if name != "global_attention_mask"}
        both(case, data)

    def test_the_question_where_an_answer_is_looked_for(self) -> None:
        case = BY_NAME["longformer-span"]
        data = {name: one for name, one in case.inputs().items() if name != "global_attention_mask"}
        with pytest.raises(SpecError, match="by the first 2 of each row, which one row has not"):
            load(case).model(**data)
        data["input_ids"][:, [3, 4, 6]] = 2
        both(case, data)

    def test_none_elsewhere(self) -> None:
        case = BY_NAME["longformer"]
        data = {name: one for name, one in case.inputs().items() if name != "global_attention_mask"}
        both(case, data)
        none = data | {"global_attention_mask": torch.zeros_like(data["input_ids"])}
        model = load(case).model
        assert torch.equal(model(**none).hidden, model(**data).hidden)

    def test_padding_never_is(self) -> None:
        case = BY_NAME["longformer"]
        data = case.inputs()
        more = dict(data, global_attention_mask=data["global_attention_mask"] | (1 - data["attention_mask"]))
        model = load(case).model
        assert_same(real(mine(model, more), data), real(mine(model, data), data), 1e-7)
        both(case, more)

    def test_all_of_them(self) -> None:
        case = BY_NAME["longformer-mlm"]
        both(case, dict(case.inputs(), global_attention_mask=torch.ones(3, 23, dtype=torch.long)))

    def test_a_mask_of_another_shape(self) -> None:
        case = BY_NAME["longformer"]
        data = dict(case.inputs(), global_attention_mask=torch.ones(3, 5))
        with pytest.raises(SpecError, match=r"global_attention_mask has shape \[3, 5\], but the rows \[3, 23\]"):
            load(case).model(**data)

    def test_a_model_without_them(self) -> None:
        with pytest.raises(SpecError, match="nothing in this model can take global_attention_mask"):
            load(BY_NAME["big_bird"]).model(torch.ones(1, 5).long(), global_attention_mask=torch.ones(1, 5))


class TestBlocks:
    @pytest.mark.parametrize("length", [14, 15, 16, 31, 40])
    @pytest.mark.parametrize("training", [False, True])
    def test_rows_of_any_length(self, length: int, training: bool) -> None:
        case = BY_NAME["big_bird-rescaled"]
        reference.cache_clear()  # the reference doesn't come back from full attention once it has seen a short row
        both(case, {"input_ids": torch.randint(3, 49, (2, length))}, training)

    @pytest.mark.parametrize("length", [1024, 1023, 2048])
    @pytest.mark.parametrize("training", [False, True])
    def test_long_rows(self, length: int, training: bool) -> None:
        keys = BY_NAME["big_bird"].keys | {"max_position_embeddings": 2048, "block_size": 64, "num_random_blocks": 3}
        case = Case("big_bird-long", "BigBirdModel", "BigBirdConfig", keys)
        both(case, {"input_ids": torch.randint(3, 49, (1, length))}, training)

    @pytest.mark.parametrize("length", [1024, 3072, 4096, 1088, 2048, 8192])
    def test_the_drawing_is_the_reference_s(self, length: int) -> None:
        from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

        longest = max(4096, length)
        config = transformers.BigBirdConfig(max_position_embeddings=longest)
        theirs = BigBirdBlockSparseAttention(config, seed=7).train()
        np.random.seed(7)
        if length in (1024, 3072, 4096):
            rows = [theirs._bigbird_block_rand_mask(longest, longest, 64, 64, 3, last_idx=1024) for _ in range(12)]
        else:
            plan = theirs._get_rand_attn_plan(length, 64, 3)
            rows = theirs._bigbird_block_rand_mask_with_head(length, length, 64, 64, 12, *plan)
        wanted = np.stack(rows)[:, : length // 64 - 2]
        found = draw(RandomBlocks(64, 3, 12, 7, longest), length // 64)
        assert np.array_equal(found[:, 1:-1], wanted)
        assert (found[:, [0, -1]] == -1).all()

    def test_rows_longer_than_the_longest(self) -> None:
        with pytest.raises(SpecError, match="random blocks for 3072 tokens can't be drawn for 2048 at most"):
            draw(RandomBlocks(64, 3, 12, 7, 2048), 48)

    def test_an_answer_is_behind_the_question(self) -> None:
        keys = BY_NAME["big_bird-span"].keys | {"sep_token_id": 5}
        case = Case("big_bird-asked", "BigBirdForQuestionAnswering", "BigBirdConfig", keys, lengths=(23, 20, 9))
        data = case.inputs()
        data["input_ids"][data["input_ids"] == 5] = 6
        both(case, data)
        data["input_ids"][:, [4, 7]] = 5
        both(case, data)
        logits = load(case).model(**data).logits
        assert (logits[:, 1:5] < -9e5).all()
        assert (logits[:, 0].abs() < 1e3).all()


@pytest.mark.parametrize(
    ("name", "keys", "told"),
    [
        ("longformer", {"attention_window": [4]}, "attention_window names 1 windows for 2 layers"),
        ("longformer", {"attention_window": 5}, r"attention_window must be even and at least 2, not \[5, 5\]"),
        ("longformer", {"is_decoder": True}, "so is_decoder can't be true"),
        ("longformer", {"attention_mode": "tvm"}, "attention_mode = 'tvm'; only 'longformer'"),
        ("big_bird", {"attention_type": "sparse"}, "attention_type must be one of original_full, block_sparse"),
        ("big_bird", {"block_size": 0}, "block_size must be at least 1"),
        ("big_bird", {"is_decoder": True}, "is_decoder needs attention_type = original_full"),
    ],
)
def test_what_can_not_be(name: str, keys: dict[str, Any], told: str) -> None:
    data = {"model_type": name, "num_hidden_layers": 2, **keys}
    with pytest.raises(SpecError, match=told):
        read_family(data, "config.json").spec()


def test_one_window_stands_for_all() -> None:
    family = read_family({"model_type": "longformer", "num_hidden_layers": 3, "attention_window": 6}, "config.json")
    assert family.attention_window == (6, 6, 6)  # type: ignore[attr-defined]
    default = read_family({"model_type": "longformer", "num_hidden_layers": 3}, "config.json")
    assert default.attention_window == (512,) * 3  # type: ignore[attr-defined]


def test_attention_weights_are_traced() -> None:
    """The rows of global tokens are those of their own projections."""
    case = BY_NAME["longformer"]
    data, trace = case.inputs(), pf.parts.Trace()
    model = load(case).model
    model(**data, trace=trace)
    weights = trace.attention["encoder.0.steps.0.op.local"]
    out = reference(case)[0].eval()
    out.config._attn_implementation = "eager"
    sums = weights.sum(-1)
    assert torch.allclose(sums[data["attention_mask"].bool()[:, None].expand_as(sums)], torch.ones(()), atol=1e-5)
    told = out(**data, output_attentions=True).global_attentions[0]
    marked = data["global_attention_mask"].bool() & data["attention_mask"].bool()
    for b in range(3):
        own = weights[b, :, marked[b]]
        wanted = told[b, :, :23, : own.shape[1]].transpose(1, 2)
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-4)
