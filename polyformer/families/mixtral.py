"""Mixtral (Jiang et al. 2024): Mistral in which each row goes through two of eight feed-forward networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.config import Head
from polyformer.families.decoder import heads_of
from polyformer.families.mistral import Mistral
from polyformer.spec import Spec
from polyformer.weights.names import Reshape, Row, Split


class Mixtral(Mistral):
    """The keys of a Mixtral `config.json`.

    `router_aux_loss_coef` weighs the routers' balance in training, whether or not `output_router_logits` asks the
    reference library to hand their scores out, without which it forgets that loss.
    """

    model_type: ClassVar[str] = "mixtral"
    architectures: ClassVar[dict[str, Head]] = heads_of("Mixtral")
    paper: ClassVar[str] = "Jiang et al. 2024"
    tokenizer: ClassVar[str] = "SentencePiece BPE"
    theta: ClassVar[float] = 1e6
    implied: ClassVar[dict[str, Any]] = {"bos_token_id": 1, "eos_token_id": 2}
    aliases: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}

    rms_norm_eps: float = 1e-5
    num_experts_per_tok: int = 2
    num_local_experts: int = 8
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0

    def check(self) -> None:
        super().check()
        check_experts(self, self.num_local_experts)

    def feed_forward(self, layer: int) -> Spec:
        expert = super().feed_forward(layer)
        made = parts.Experts.of(expert, self.width, self.num_local_experts, self.num_experts_per_tok)
        return made.replace(jitter=self.router_jitter_noise, losses=router_losses(self.router_aux_loss_coef))

    def rows(self, base: str) -> list[Row]:
        ours, disk = "decoder.blocks.{i}.steps.1.op", f"{base}layers.{{i}}"
        names, sizes = {"gate": "w1", "up": "w3", "down": "w2"}, (self.width, self.intermediate_size)
        return [
            *super().rows(base),
            Row(f"{ours}.router.{{w}}", f"{disk}.block_sparse_moe.gate.{{w}}"),
            Row(f"{ours}.router.{{w}}", f"{disk}.mlp.gate.{{w}}"),
            *expert_rows(f"{ours}.experts", f"{disk}.block_sparse_moe.experts", names),
            *stacked_rows(f"{ours}.experts", f"{disk}.mlp.experts", self.num_local_experts, sizes),
        ]

    def module(self, name: str) -> str | None:
        return routed_module(name)


def routed_module(name: str) -> str | None:
    """Return a matrix's name; none for experts and routers, which are no modules of their own in memory."""
    return None if ".experts." in name or name.endswith((".mlp.gate", ".block_sparse_moe.gate")) else name


def router_losses(balance: float, magnitude: float = 0.0) -> parts.RouterLosses | None:
    """Return the routers' losses as the reference library takes them, of all layers together; None for weights of 0."""
    return parts.RouterLosses(balance, magnitude, "all layers") if balance or magnitude else None


def check_experts(family: Mixtral | Any, count: int) -> None:
    """Refuse so many experts that describing them would take minutes."""
    family.require(0 < count * family.layers <= 2**17, f"{count} experts in each of {family.layers} layers can't be")


def expert_rows(ours: str, disk: str, names: Mapping[str, str]) -> list[Row]:
    """Return the rows for experts whose matrices stand on disk one by one; `names` pairs ours with the disk's."""
    return [Row(f"{ours}.{{j}}.{mine}.weight", f"{disk}.{{j}}.{theirs}.weight") for mine, theirs in names.items()]


def stacked_rows(ours: str, disk: str, count: int, sizes: tuple[int, int]) -> list[Row]:
    """Return the rows for folders that hold all of a layer's experts in two tensors, gates above ups in the first.

    Args:
        ours, disk: where the experts stand.
        sizes: the width of the rows, and that inside an expert.
    """
    rows = []
    for whole, inside, last in (("gate_up_proj", ("gate", "up"), sizes[0]), ("down_proj", ("down",), sizes[1])):
        each = [f"{ours}.{j}.{one}.weight" for j in range(count) for one in inside]
        one_above_the_other = Reshape(disk=(count, -1, last), ours=(-1, last))
        rows.append(Row(each, f"{disk}.{whole}", one_above_the_other, Split(len(each))))
    return rows
