"""Families that the reference library lacks, held against packages that the field uses: their tensors, their logits.

In double precision, so that what is left of a difference has a cause. Performer's package adds a small number to every
feature; without it the answers are the same, but for its tables of positions, which are in single precision.
"""

from __future__ import annotations

import pytest
import torch

from polyformer.errors import WeightsError
from tests.families.packages import (
    GATED,
    GENERALISED,
    LENGTH,
    OTHERS,
    PEERS,
    SOFTMAX,
    VOCABULARY,
    Peer,
    apart,
    ids,
    package,
    pair,
    without_eps,
)


@pytest.mark.parametrize("peer", OTHERS, ids=str)
def test_the_same(peer: Peer) -> None:
    assert apart(peer) < 1e-12


@pytest.mark.parametrize("peer", [*SOFTMAX, *GENERALISED], ids=str)
def test_performers_are_the_same(peer: Peer) -> None:
    """Without the small numbers, whatever is subtracted from exponents cancels out."""
    with without_eps():
        assert apart(peer) < (1e-12 if "learned" in peer.kind else 1e-5)


@pytest.mark.parametrize("peer", [*SOFTMAX, *GENERALISED], ids=str)
def test_performers_as_the_package_is(peer: Peer) -> None:
    """What the small numbers change, with weights near the package's start: 1e-4 a feature, 1e-6 a sum of keys.

    Where the largest exponents lie far above the others, as in trained models, the 1e-4 is no longer small.
    """
    assert apart(peer, noise=0.02) < (1e-4 if peer in GENERALISED else 2e-2)


@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_in_single_precision(peer: Peer) -> None:
    with without_eps():
        assert apart(peer, torch.float32) < 1e-4


def test_the_gradients_of_a_performer() -> None:
    with without_eps():
        theirs, ours = pair(SOFTMAX[2])
        towards = torch.randn(2, LENGTH, VOCABULARY, dtype=torch.float64)
        (theirs(ids()) * towards).sum().backward()
    (ours(ids()).logits * towards).sum().backward()
    embedding = ours.get_parameter("target.tokens.weight").grad
    torch.testing.assert_close(embedding, theirs.token_emb.weight.grad)
    query = ours.get_parameter("decoder.blocks.0.steps.0.op.q.weight").grad
    torch.testing.assert_close(query, theirs.performer.net.layers[0][0].fn.to_q.weight.grad)


def test_what_a_family_does_not_know_is_named() -> None:
    theirs = package("g-mlp-pytorch").gMLP(num_tokens=VOCABULARY, dim=12, depth=1, seq_len=LENGTH, attn_dim=4)
    with pytest.raises(WeightsError, match=r"'layers.0.fn.fn.fn.attn.to_qkv.weight' belongs to no part of this model"):
        GATED.names().to_ours(theirs.state_dict())
