"""GPT-2 (Radford et al. 2019): pre-norm, learned positions, one matrix for queries, keys and values.

On disk its matrices are [inputs, outputs]. With `add_cross_attention` it writes what an encoder has read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from polyformer import parts
from polyformer.families.blocks import block, drop
from polyformer.families.config import Head, activation
from polyformer.families.decoder import CAUSAL, Decoder, heads_of, is_number, is_triangle
from polyformer.spec import Spec
from polyformer.weights.names import Row, Split, Transpose, rows_below


class GPT2(Decoder):
    """The keys of a GPT-2 `config.json`."""

    model_type: ClassVar[str] = "gpt2"
    architectures: ClassVar[dict[str, Head]] = heads_of("GPT2", lm="LMHeadModel")
    paper: ClassVar[str] = "Radford et al. 2019"
    tokenizer: ClassVar[str] = "byte-level BPE"
    base: ClassVar[str] = "transformer"
    classifier: ClassVar[str] = "classifier"
    implied: ClassVar[dict[str, Any]] = {"bos_token_id": 50256, "eos_token_id": 50256}
    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "n_ctx": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    unused: ClassVar[dict[str, Any]] = {
        "n_special": 0,
        "predict_special_tokens": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False  # of rounding in half precision only
    add_cross_attention: bool = False
    is_decoder: bool = False
    tie_word_embeddings: bool = True

    @property
    def width(self) -> int:
        return self.n_embd

    @property
    def layers(self) -> int:
        return self.n_layer

    def embed(self) -> parts.Embed:
        positions = parts.Learned(self.width, self.n_positions)
        tokens = parts.TokenEmbedding(self.vocab_size, self.width)
        return parts.Embed(tokens, positions, dropout=drop(self.embd_pdrop))

    def block(self, layer: int) -> Spec:
        heads = parts.Heads.of_width(self.width, self.n_head)
        scale = heads.width**-0.5 if self.scale_attn_weights else 1.0
        scale /= layer + 1 if self.scale_attn_by_inverse_layer_idx else 1
        kernel = parts.Softmax(scale, self.attn_pdrop)
        reading = parts.Attention.of_width(self.width, self.n_head, CAUSAL).replace(kernel=kernel)
        crossing = parts.CrossAttention.of_width(self.width, self.n_head).replace(kernel=kernel)
        hidden = 4 * self.width if self.n_inner is None else self.n_inner
        thinking = parts.FeedForward.of_widths(self.width, hidden, activation(self.activation_function))
        sublayers = (reading, crossing, thinking) if self.add_cross_attention else (reading, thinking)
        return block(*sublayers, norm=self.norm(), placement="pre", dropout=self.resid_pdrop)

    def norm(self) -> parts.Norm:
        return parts.LayerNorm(self.width, self.layer_norm_epsilon)

    def rows(self, base: str) -> list[Row]:
        ours, disk = "decoder.blocks.{i}.steps", f"{base}h.{{i}}"
        last = 2 if self.add_cross_attention else 1
        turned = {"0.op.o": "attn.c_proj", f"{last}.op.up": "mlp.c_fc", f"{last}.op.down": "mlp.c_proj"}
        norms = {"0.pre": "ln_1", f"{last}.pre": "ln_2"}
        fused = {"attn.c_attn": ["0.op.q", "0.op.k", "0.op.v"]}
        if self.add_cross_attention:
            turned |= {"1.op.q": "crossattention.q_attn", "1.op.o": "crossattention.c_proj"}
            fused["crossattention.c_attn"] = ["1.op.k", "1.op.v"]
            norms["1.pre"] = "ln_cross_attn"
        return [
            Row("target.tokens.weight", f"{base}wte.weight"),
            Row("target.positions.weight", f"{base}wpe.weight"),
            *rows_below(ours, disk, norms),
            *(Row(f"{ours}.{mine}.{{w}}", f"{disk}.{theirs}.{{w}}", Transpose()) for mine, theirs in turned.items()),
            *(
                Row([f"{ours}.{one}.{{w}}" for one in mine], f"{disk}.{theirs}.{{w}}", Transpose(), Split(len(mine)))
                for theirs, mine in fused.items()
            ),
            Row("decoder.norm.{w}", f"{base}ln_f.{{w}}"),
        ]

    def computed(self, base: str) -> dict[str, Callable[[Tensor], bool]]:
        checks = {"bias": is_triangle, "masked_bias": is_number}
        attentions = [f"{base}h.{{i}}.{name}" for name in ("attn", "crossattention")]
        return {f"{one}.{name}": check for one in attentions for name, check in checks.items()}
