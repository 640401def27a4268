"""Reformer beyond the parity suite: lengths that chunks don't divide, what is kept for gradients, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polyformer as pf
from polyformer.errors import SpecError
from polyformer.families import read_family
from polyformer.families.config import keys
from polyformer.families.reformer import Reformer
from polyformer.loaded import Loaded
from polyformer.parts import Chunks, Hashing, Local, Reversible
from polyformer.parts.flow import GrowingCache, start_flow
from polyformer.parts.reversible import ReversiblePart, Walk
from polyformer.spec import walk
from tests.families.cases.reformer import DECODER, LOCAL, LSH, MIXED, REFORMER, ROUNDS, UNEQUAL
from tests.families.parity import transformers
from tests.parts.kept import kept_by_autograd

LONG = REFORMER | {"axial_pos_shape": [8, 9], "max_position_embeddings": 72, "num_attention_heads": 3}
IMPLIED = {"pad_token_id": 0, "eos_token_id": 2}


def made(folder: Path, changes: dict[str, Any]) -> tuple[Any, Loaded]:
    """The reference's model, every weight far from its start, and ours of its folder."""
    torch.manual_seed(1)
    model = transformers.ReformerModel(transformers.ReformerConfig(**LONG | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    return model, pf.load(folder)


def lay(length: int, side: str) -> tuple[Tensor, Tensor | None]:
    """Three texts, two of them shorter; without padding, the whole rows."""
    ids = torch.randint(3, 49, (3, length), generator=torch.Generator().manual_seed(length))
    if not side:
        return ids, None
    real = torch.tensor([length, max(length // 2, 1), max(length - 3, 1)])
    return ids, (torch.arange(length) < real[:, None]).long()


SHAPES: dict[str, dict[str, Any]] = {
    "local": LOCAL | DECODER,
    "local, both ways": LOCAL,
    "local, on both sides": LOCAL | {"local_num_chunks_after": 1},
    "local, far back": LOCAL | DECODER | {"local_num_chunks_before": 3},
    "hashing": LSH | DECODER,
    "hashing, both ways, in rounds": LSH | ROUNDS,
    "hashing, in rounds": LSH | DECODER | {"num_hashes": 4},
    "mixed": MIXED | DECODER | {"num_hashes": 2},
    "mixed, unequal chunks": MIXED | UNEQUAL | {"num_hashes": 2},
    "mixed, unequal chunks, one way": MIXED | DECODER | UNEQUAL,
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_any_length_with_and_without_padding(tmp_path: Path, changes: dict[str, Any]) -> None:
    """At every length the reference settles on a number of buckets anew, as a fresh one does."""
    model, loaded = made(tmp_path, changes)
    layers = [layer.attention.self_attention for layer in model.encoder.layers]
    worst = 0.0
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 13, 24, 37, 64):
        for side in ("", "right"):
            for layer in layers:
                layer.num_buckets = (LONG | changes).get("num_buckets")
            ids, mask = lay(length, side)
            with torch.no_grad():
                wanted = model(ids, attention_mask=mask).last_hidden_state
                found = loaded.model(ids, mask).hidden
            real = torch.ones_like(ids).bool() if mask is None else mask.bool()
            worst = max(worst, float((found - wanted)[real].abs().max()))
    assert worst < 1e-4


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    _, loaded = made(tmp_path, MIXED)
    before = torch.get_rng_state()
    loaded.model(lay(37, "")[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_places_may_be_read_piece_by_piece_in_local_layers_only(tmp_path: Path) -> None:
    _, loaded = made(tmp_path / "local", LOCAL | DECODER)
    ids, _ = lay(37, "")
    cache = GrowingCache()
    with torch.no_grad():
        found = torch.cat([loaded.model.decode(piece, cache=cache) for piece in ids.split((9, 1, 1, 20, 6), 1)], 1)
        torch.testing.assert_close(found, loaded.model(ids).hidden, rtol=1e-5, atol=1e-5)
    _, loaded = made(tmp_path / "mixed", MIXED | DECODER)
    with pytest.raises(SpecError, match="Hashing can't be cached: rows share chunks with rows behind them"):
        loaded.model(ids, cache=GrowingCache())


# ---------------------------------------------------------------------------------------------------------------
# Gradients


def stack(layers: int, dropout: float, seed: int | None) -> ReversiblePart:
    """A family's layers in double precision, hashing every second time, their feed-forward networks in chunks."""
    family = Reformer(
        hidden_size=16,
        num_attention_heads=2,
        attention_head_size=8,
        feed_forward_size=32,
        attn_layers=("local", "lsh") * (layers // 2),
        num_hashes=2,
        hash_seed=seed,
        lsh_attn_chunk_length=8,
        local_attn_chunk_length=8,
        chunk_size_feed_forward=16,
        hidden_dropout_prob=dropout,
        lsh_attention_probs_dropout_prob=dropout,
        local_attention_probs_dropout_prob=dropout,
        is_decoder=True,
    )
    torch.manual_seed(0)
    part = family.stack().build(dtype=torch.float64)
    assert isinstance(part, ReversiblePart)
    return part


def gradients(part: ReversiblePart, x: Tensor, plain: bool) -> list[Tensor]:
    torch.manual_seed(3)
    flow = start_flow(x, (torch.arange(x.shape[1]) < torch.tensor([[64], [50]])).long())
    out = part.plainly(x, flow) if plain else part(x, flow)
    out = part.norm(out, flow) if plain and part.norm is not None else out
    loss = (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).square().sum()
    return [out.detach(), *torch.autograd.grad(loss, [x, *part.parameters()])]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("seed", [None, 4])
def test_gradients_are_those_of_the_plain_computation(seed: int | None, dropout: float) -> None:
    """Rows are turned at random, and dropped out: in the second walk as in the first, though buckets are known then."""
    part = stack(4, dropout, seed).train()
    x = torch.randn(2, 64, 16, dtype=torch.float64, requires_grad=True)
    for found, wanted in zip(gradients(part, x, False), gradients(part, x, True), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


def test_a_second_walk_keeps_to_the_buckets_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are the same to rounding only, by which a vector between two buckets could change over."""
    from polyformer.parts import hashing

    calls = []
    once = hashing._hash
    monkeypatch.setattr(hashing, "_hash", lambda *given: (calls.append(1), once(*given))[1])
    part = stack(4, 0.0, 4).train()
    x = torch.randn(1, 64, 16, dtype=torch.float64, requires_grad=True)
    part(x, start_flow(x)).sum().backward()
    assert len(calls) == 2  # for two layers


def test_what_is_kept_does_not_grow_with_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve layers keep little more than two: their buckets, at two bytes each."""
    walks: list[Walk] = []
    forth = Walk.forth
    monkeypatch.setattr(Walk, "forth", lambda self, *rows: (walks.append(self), forth(self, *rows))[1])
    peaks = []
    for layers in (2, 12):
        part = stack(layers, 0.1, None).train().float()
        x = torch.randn(2, 512, 16, requires_grad=True)
        with kept_by_autograd(part) as kept:
            part(x, start_flow(x)).sum().backward()
        peaks.append(kept.peak + sum(buckets.nbytes for buckets in walks[-1].choices.values()))
    assert peaks[1] / peaks[0] < 1.5


# ---------------------------------------------------------------------------------------------------------------
# Files


def test_the_defaults_are_the_reference_s() -> None:
    config = transformers.ReformerConfig().to_dict()
    for key in set(keys(Reformer)) - IMPLIED.keys():
        assert getattr(Reformer(), key) == (tuple(config[key]) if isinstance(config[key], list) else config[key]), key
    assert read_family(json.loads(transformers.ReformerConfig().to_json_string(use_diff=False)), "x").spec()
    assert read_family({"model_type": "reformer", "is_decoder": True}, "x") == Reformer(**IMPLIED, is_decoder=True)


def test_keys_of_published_files_are_understood() -> None:
    """As google/reformer-crime-and-punishment has them, among them some that nothing reads."""
    config = {
        **{"model_type": "reformer", "architectures": ["ReformerModelWithLMHead"], "is_decoder": True},
        **{"attention_probs_dropout_prob": 0.1, "intermediate_size": 3072, "output_past": True, "num_hidden_layers": 6},
        **{"num_chunks_before": 1, "num_chunks_after": 0, "sinusoidal_pos_embds": False, "num_attention_heads": 2},
        **{"axial_pos_shape": [512, 1024], "max_position_embeddings": 524288, "num_buckets": [64, 128]},
    }
    spec = read_family(config, "config.json").spec()
    found = [one for _, one in walk(spec)]
    assert {one.chunks for one in found if isinstance(one, Hashing)} == {Chunks(64, ends="joined")}
    assert {one.chunks for one in found if isinstance(one, Local)} == {Chunks(64)}
    assert {one.hashes.buckets for one in found if isinstance(one, Hashing)} == {(64, 128)}
    assert isinstance(spec.decoder, Reversible)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_buckets": 5}, "a number of buckets must be even, half of them opposite to the others, not 5"),
        ({"num_hashes": 0}, "rounds must be at least 1, not 0"),
        ({"lsh_attn_chunk_length": 0}, "chunks must have at least 1 row, not 0"),
        ({"local_attn_chunk_length": -1}, "chunks must have at least 1 row, not -1"),
        ({"attn_layers": []}, "0 layers are not between 1 and 4096"),
        ({"attn_layers": ["lsh", "global"]}, r"attn_layers\[1\] should be one of 'local', 'lsh', not 'global'"),
        ({"num_hidden_layers": 5}, "num_hidden_layers = 5, but 2 attn_layers"),
        ({"axial_pos_embds_dim": [6, 9]}, "axial_pos_embds_dim make 15 values, not 16"),
        ({"axial_pos_shape": [8, 0]}, "must have a number above 0 for each axis"),
        ({"is_decoder": False}, "ReformerModelWithLMHead can't have is_decoder = False"),
        ({"architectures": ["ReformerForMaskedLM"]}, "ReformerForMaskedLM can't have is_decoder = True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True; only False is supported"),
        ({"attn_layer": []}, "has a key 'attn_layer' that the family reformer does not know .did you mean"),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {"model_type": "reformer", "architectures": ["ReformerModelWithLMHead"]} | LONG | LSH | DECODER | changes
    with pytest.raises(SpecError, match=message):
        read_family(config, "config.json").spec()


def test_a_text_longer_than_the_grid_of_positions(tmp_path: Path) -> None:
    _, loaded = made(tmp_path, MIXED)
    with pytest.raises(SpecError, match="a sequence of 73 tokens is longer than the model's 72 positions"):
        loaded.model(torch.ones(1, 73, dtype=torch.long))
