"""Models of other packages that the field uses, of families that the reference library lacks, and ours beside them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from polyformer.families import GMLP, LinformerLM, PerformerLM
from polyformer.parts.model import TransformerPart
from polyformer.weights.assemble import assemble, disassemble

VOCABULARY, LENGTH = 23, 19
PERFORMER = PerformerLM(VOCABULARY, LENGTH, width=24, layers=2, heads=3, head_width=8)
LINFORMER = LinformerLM(VOCABULARY, LENGTH, width=24, layers=2, heads=3, rank=5)
GATED = GMLP(VOCABULARY, LENGTH, width=12, hidden=48, layers=2, ties="none")


@dataclass(frozen=True)
class Peer:
    """A model of another package.

    Attributes:
        family, kind: what the model is called here.
        sizes: those of ours.
        keys: what the other's constructor takes, beside the sizes that all of its kind have in common.
        any_length: whether it takes texts that are shorter than its longest.
    """

    family: str
    kind: str
    sizes: Any
    keys: dict[str, Any] = field(default_factory=dict, hash=False)
    any_length: bool = True

    def __str__(self) -> str:
        return f"{self.family} {self.kind}"

    @property
    def package(self) -> str:
        """What the package is called."""
        return {"Performer": "performer-pytorch", "Linformer": "linformer", "gMLP": "g-mlp-pytorch"}[self.family]

    def make(self) -> Any:
        """Make the package's model; skips the test where the package is not installed."""
        heads = {"num_tokens": VOCABULARY, "dim": 24, "depth": 2, "heads": 3}
        common: dict[str, dict[str, Any]] = {
            "Performer": heads | {"max_seq_len": LENGTH, "dim_head": 8, "causal": False},
            "Linformer": heads | {"seq_len": LENGTH, "k": 5},
            "gMLP": {"num_tokens": VOCABULARY, "dim": 12, "depth": 2, "seq_len": LENGTH},
        }
        name = {"Performer": "PerformerLM", "Linformer": "LinformerLM", "gMLP": "gMLP"}[self.family]
        return getattr(package(self.package), name)(**common[self.family] | self.keys)


def performer(kind: str, forwards: bool, own: dict[str, Any], keys: dict[str, Any]) -> Peer:
    """Return a Performer that reads in one direction or in both."""
    reads = "forwards" if forwards else "both ways"
    return Peer("Performer", f"{kind}, {reads}", PERFORMER.replace(reads=reads, **own), keys | {"causal": forwards})


SOFTMAX = (
    performer("rotary", True, {}, {}),
    performer("rotary", False, {}, {}),
    performer("learned", True, {"positions": "learned"}, {"rotary_position_emb": False}),
    performer("tied", False, {"ties": "output"}, {"tie_embed": True}),
    performer("gated", True, {"feedforward": "geglu", "features": 30}, {"ff_glu": True, "nb_features": 30}),
)
GENERALISED = tuple(
    performer(function, forwards, {"function": function}, {"generalized_attention": True, "kernel_fn": made})
    for function, made in (("relu", torch.nn.ReLU()), ("sigmoid", torch.sigmoid), ("abs", torch.abs))
    for forwards in (True, False)
)
OTHERS = (
    Peer("Linformer", "of separate projections", LINFORMER),
    Peer("Linformer", "with one head of keys", LINFORMER.replace(groups=1), {"one_kv_head": True}),
    Peer("Linformer", "with keys as values", LINFORMER.replace(sharing="keys as values"), {"share_kv": True}),
    Peer("gMLP", "both ways", GATED, {}, any_length=False),
    Peer("gMLP", "forwards", GATED.replace(reads="forwards"), {"causal": True}),
)
PEERS = (*SOFTMAX, *GENERALISED, *OTHERS)


def package(name: str) -> ModuleType:
    """Import one of the packages, which warn of what they import themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: ModuleType = pytest.importorskip(name.replace("-", "_"), reason=f"needs the package {name}")
        return found


@contextmanager
def without_eps() -> Iterator[None]:
    """Take away the small numbers that performer-pytorch adds to features and to sums of keys."""
    module = package("performer-pytorch").performer_pytorch
    names = ("softmax_kernel", "causal_linear_attention_noncuda")
    exact = {name: functools.partial(getattr(module, name), eps=0.0) for name in names}
    with mock.patch.multiple(module, **exact):
        yield


def pair(peer: Peer, dtype: torch.dtype = torch.float64, noise: float = 0.2) -> tuple[Any, TransformerPart]:
    """Return the package's model, every weight moved from its start, and ours with its tensors.

    All of ours can be given back to it; what else it holds are tables of positions, a counter, and its layers again.
    """
    with torch.random.fork_rng():
        torch.manual_seed(2)
        theirs = peer.make()
        with torch.no_grad():
            for weight in theirs.parameters():
                weight.add_(noise * torch.randn_like(weight))
    tensors = theirs.to(dtype).eval().state_dict()
    model = assemble(peer.sizes.spec(), peer.sizes.names().to_ours(tensors)).eval()
    assert isinstance(model, TransformerPart)
    back = peer.sizes.names().to_disk(disassemble(model))
    for name in back:
        assert torch.equal(back[name], tensors[name]), name
    spare = {name for name in tensors.keys() - back.keys() if not name.endswith(".emb")}
    assert all(name.startswith("performer.proj_updater.") for name in spare)
    return theirs, model


def ids(length: int = LENGTH) -> Tensor:
    """Return two texts."""
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def apart(peer: Peer, dtype: torch.dtype = torch.float64, noise: float = 0.2) -> float:
    """Return the largest difference of two logits."""
    theirs, ours = pair(peer, dtype, noise)
    with torch.no_grad():
        lengths = (LENGTH, 6, 1) if peer.any_length else (LENGTH,)
        return max(float((ours(ids(n)).logits - theirs(ids(n))).abs().max()) for n in lengths)
