"""Switch Transformers (Fedus et al. 2022): T5 in which every few layers have many feed-forward networks, and a router
that sends each row to one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.families.blocks import drop
from polyformer.families.config import Head, activation
from polyformer.families.mixtral import router_losses
from polyformer.families.t5_kin import T5Like
from polyformer.spec import Spec
from polyformer.weights.names import Row, rows_below


class Switch(T5Like):
    """The keys of a Switch Transformer's `config.json`.

    The routers' balance is that of a batch, as in the paper; the reference library takes the mean of each sequence's.
    """

    model_type: ClassVar[str] = "switch_transformers"
    architectures: ClassVar[dict[str, Head]] = {
        "SwitchTransformersForConditionalGeneration": "lm",
        "SwitchTransformersModel": "none",
        "SwitchTransformersEncoderModel": "none",
    }
    paper: ClassVar[str] = "Fedus et al. 2022"
    tokenizer: ClassVar[str] = "SentencePiece Unigram"
    unused: ClassVar[dict[str, Any]] = {
        **T5Like.unused,
        "add_router_probs": False,
        "batch_prioritized_routing": False,
        "feed_forward_proj": "relu",
        "is_gated_act": False,
        "num_selected_experts": 1,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "router_type": "tokens_masked",
    }

    d_model: int = 768
    num_layers: int = 12
    num_decoder_layers: int | None = None
    num_heads: int = 12
    dense_act_fn: str = "relu"
    num_experts: int = 8
    expert_capacity: int = 64
    num_sparse_encoder_layers: int = 3
    num_sparse_decoder_layers: int = 3
    router_bias: bool = False
    router_jitter_noise: float = 0.01
    router_z_loss_coef: float = 0.001
    router_aux_loss_coef: float = 0.001

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Drop the keys that the reference library derives from others, if they are what it derives."""
        data = {"num_decoder_layers": 12, **super().modern(data, where)}
        for stack, layers in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
            count = data.get(layers, cls.num_layers)
            sparse = data.get(f"num_sparse_{stack}_layers", 3)
            step = data.pop(f"{stack}_sparse_step", None)
            if isinstance(count, int) and isinstance(sparse, int) and step not in (None, _step(count, sparse)):
                told = f"{stack}_sparse_step = {step!r}, but {layers} = {count} with {sparse} sparse"
                raise SpecError(f"{where} has {told}")
        return data

    def feed_forward(self, stack: str, layer: int) -> Spec:
        sparse = self.num_sparse_encoder_layers if stack == "encoder" else self.num_sparse_decoder_layers
        step = _step(self.layers[stack], sparse)
        dense = parts.FeedForward.of_widths(self.d_model, self.d_ff, activation(self.dense_act_fn), bias=False)
        dense = dense.replace(dropout=drop(self.dropout_rate))
        if step == 0 or layer % step != 1 % step:
            return dense
        return parts.Experts(
            parts.Linear(self.d_model, self.num_experts, self.router_bias),
            (dense,) * self.num_experts,
            weights="all",
            capacity=self.expert_capacity,
            jitter=self.router_jitter_noise,
            losses=router_losses(self.router_aux_loss_coef, self.router_z_loss_coef),
        )

    def feed_forward_rows(self, ours: str, disk: str) -> list[Row]:
        names = {"up": "wi", "down": "wo"}
        return [
            *rows_below(ours, f"{disk}.mlp", names | {"router": "router.classifier"}),
            *rows_below(f"{ours}.experts.{{j}}", f"{disk}.mlp.experts.expert_{{j}}", names),
        ]


def _step(layers: int, sparse: int) -> int:
    """Return how far apart layers with experts stand, the second being the first of them."""
    return layers // sparse if sparse > 0 else layers
