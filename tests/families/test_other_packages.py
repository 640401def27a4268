"""Families that the reference library lacks, held against packages that the field uses: their tensors, their logits.

In double precision, so that what is left of a difference has a cause. Performer's package adds a small number to every
feature; without it the answers are the same, but for its tables of positions, which are in single precision.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import WeightsError
from polyformer.families import GMLP, LinformerLM, PerformerLM
from polyformer.parts.model import TransformerPart
from polyformer.weights.assemble import assemble, disassemble

VOCABULARY, LENGTH = 23, 19


def package(name: str) -> ModuleType:
    """Import one of the packages, which warn of what they import themselves; skip where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: ModuleType = pytest.importorskip(name, reason=f"needs the package {name.replace('_', '-')}")
        return found


def moved(model: Any, dtype: torch.dtype = torch.float64, noise: float = 0.2) -> Any:
    """Return a package's model in evaluation mode, every weight far from its start."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(noise * torch.randn_like(weight))
    return model.to(dtype).eval()


def loaded(sizes: Any, theirs: Any) -> TransformerPart:
    """Return our model with the tensors of theirs; and see that they can all be given back."""
    tensors = theirs.state_dict()
    model = assemble(sizes.spec(), sizes.names().to_ours(tensors)).eval()
    assert isinstance(model, TransformerPart)
    back = sizes.names().to_disk(disassemble(model))
    for name in back:
        assert torch.equal(back[name], tensors[name]), name
    spare = {name for name in tensors.keys() - back.keys() if not name.endswith(".emb")}
    assert all(name.startswith("performer.proj_updater.") for name in spare)
    return model


def ids(length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------------
# Performer

PERFORMER = PerformerLM(VOCABULARY, LENGTH, width=24, layers=2, heads=3, head_width=8)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "forwards": ({}, {"causal": True}),
    "both ways": ({"reads": "both ways"}, {}),
    "learned positions": ({"positions": "learned"}, {"causal": True, "rotary_position_emb": False}),
    "tied": ({"reads": "both ways", "ties": "output"}, {"tie_embed": True}),
    "gated": ({"feedforward": "geglu", "features": 30}, {"causal": True, "ff_glu": True, "nb_features": 30}),
}
GENERALISED = {
    f"{function} {reads}": ({"function": function, "reads": reads}, {"generalized_attention": True, "kernel_fn": fn})
    for function, fn in (("relu", torch.nn.ReLU()), ("sigmoid", torch.sigmoid), ("abs", torch.abs))
    for reads in ("forwards", "both ways")
}


def performers(kind: str, dtype: torch.dtype = torch.float64, noise: float = 0.2) -> tuple[Any, TransformerPart]:
    torch.manual_seed(2)
    own, others = (KINDS | GENERALISED)[kind]
    sizes = PERFORMER.replace(**own)
    causal = {"causal": sizes.reads == "forwards"}
    common = {"num_tokens": VOCABULARY, "max_seq_len": LENGTH, "dim": 24, "depth": 2, "heads": 3, "dim_head": 8}
    theirs = moved(package("performer_pytorch").PerformerLM(**common | others | causal), dtype, noise)
    return theirs, loaded(sizes, theirs)


def without_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the small numbers that the package adds to features and to sums of keys."""
    module = package("performer_pytorch.performer_pytorch")
    for name in ("softmax_kernel", "causal_linear_attention_noncuda"):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), eps=0.0))


@pytest.mark.parametrize("kind", [*KINDS, *GENERALISED])
def test_performers_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without those small numbers, whatever is subtracted from exponents cancels out."""
    without_eps(monkeypatch)
    theirs, ours = performers(kind)
    for length in (LENGTH, 6, 1):
        wanted = theirs(ids(length))
        tolerance = 1e-12 if kind == "learned positions" else 1e-5
        torch.testing.assert_close(ours(ids(length)).logits, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", [*KINDS, *GENERALISED])
def test_performers_as_the_package_is(kind: str) -> None:
    """What the small numbers change, with weights near the package's start: 1e-4 a feature, 1e-6 a sum of keys.

    Where the largest exponents lie far above the others, as in trained models, the 1e-4 is no longer small.
    """
    theirs, ours = performers(kind, noise=0.02)
    wanted = theirs(ids())
    apart = float(((ours(ids()).logits - wanted).abs().max() / wanted.abs().max()).detach())
    assert apart < (1e-4 if kind in GENERALISED else 1e-3), apart


@pytest.mark.parametrize("kind", ["forwards", "both ways", "relu forwards"])
def test_performers_in_single_precision(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_eps(monkeypatch)
    theirs, ours = performers(kind, torch.float32)
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()), atol=1e-4, rtol=1e-4)


def test_the_gradients_of_a_performer(monkeypatch: pytest.MonkeyPatch) -> None:
    without_eps(monkeypatch)
    theirs, ours = performers("learned positions")
    towards = torch.randn(2, LENGTH, VOCABULARY, dtype=torch.float64)
    (theirs(ids()) * towards).sum().backward()
    (ours(ids()).logits * towards).sum().backward()
    embedding = ours.get_parameter("target.tokens.weight").grad
    torch.testing.assert_close(embedding, theirs.token_emb.weight.grad)
    query = ours.get_parameter("decoder.blocks.0.steps.0.op.q.weight").grad
    torch.testing.assert_close(query, theirs.performer.net.layers[0][0].fn.to_q.weight.grad)


# ---------------------------------------------------------------------------------------------------------------
# Linformer

LINFORMER = LinformerLM(VOCABULARY, LENGTH, width=24, layers=2, heads=3, rank=5)


def linformers(own: dict[str, Any], others: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(2)
    common = {"num_tokens": VOCABULARY, "dim": 24, "seq_len": LENGTH, "depth": 2, "k": 5, "heads": 3}
    theirs = moved(package("linformer").LinformerLM(**common | others), dtype)
    return theirs, loaded(LINFORMER.replace(**own), theirs)


@pytest.mark.parametrize(
    ("own", "others"),
    [
        ({}, {}),
        ({"groups": 1}, {"one_kv_head": True}),
        ({"sharing": "keys as values"}, {"share_kv": True}),
        ({"sharing": "keys as values", "groups": 1}, {"share_kv": True, "one_kv_head": True}),
    ],
    ids=["separate", "one head of keys", "keys as values", "both"],
)
def test_linformers_are_the_same(own: dict[str, Any], others: dict[str, Any]) -> None:
    theirs, ours = linformers(own, others)
    for length in (LENGTH, 6, 1):
        torch.testing.assert_close(ours(ids(length)).logits, theirs(ids(length)), atol=1e-10, rtol=1e-10)
    theirs, ours = linformers(own, others, torch.float32)
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# gMLP

GATED = GMLP(VOCABULARY, LENGTH, width=12, hidden=48, layers=2, ties="none")


@pytest.mark.parametrize("reads", ["both ways", "forwards"])
def test_gmlps_are_the_same(reads: str) -> None:
    make, common = package("g_mlp_pytorch").gMLP, {"num_tokens": VOCABULARY, "dim": 12, "depth": 2, "seq_len": LENGTH}
    torch.manual_seed(2)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        theirs = moved(make(**common, causal=reads == "forwards"), dtype)
        ours = loaded(GATED.replace(reads=reads), theirs)
        for length in (LENGTH, 6, 1) if reads == "forwards" else (LENGTH,):  # both ways, the package takes no others
            wanted = theirs(ids(length))
            torch.testing.assert_close(ours(ids(length)).logits, wanted, atol=tolerance, rtol=tolerance)


def test_what_a_family_does_not_know_is_named() -> None:
    theirs = package("g_mlp_pytorch").gMLP(num_tokens=VOCABULARY, dim=12, depth=1, seq_len=LENGTH, attn_dim=4)
    with pytest.raises(WeightsError, match=r"'layers.0.fn.fn.fn.attn.to_qkv.weight' belongs to no part of this model"):
        GATED.names().to_ours(theirs.state_dict())
