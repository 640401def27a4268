"""Qwen2 (Yang et al. 2024): LLaMA with biases on queries, keys and values, and windows in some layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from polyformer import parts
from polyformer.families.config import Head
from polyformer.families.decoder import CAUSAL, heads_of
from polyformer.families.llama import LlamaLike

LayerType = Literal["full_attention", "sliding_attention"]


class Alternating(LlamaLike, abstract=True):
    """Families some of whose layers look only so far back, as `layer_types` says."""

    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] | None = None

    def check(self) -> None:
        super().check()
        types = self.layer_types
        said = types is None or len(types) == self.num_hidden_layers
        self.require(said, f"layer_types names {len(types or ())} layers, but there are {self.num_hidden_layers}")
        windowed = "sliding_attention" in self.kinds
        self.require(not windowed or self.sliding_window is not None, "sliding_attention needs a sliding_window")

    @property
    def kinds(self) -> Sequence[LayerType]:
        """What each layer is."""
        return self.layer_types or self.usual_kinds()

    def usual_kinds(self) -> Sequence[LayerType]:
        """Return what each layer is where the file is silent."""
        raise NotImplementedError

    def see(self, layer: int) -> parts.Rule:
        if self.kinds[layer] == "full_attention" or self.sliding_window is None:
            return CAUSAL
        return CAUSAL & parts.Window(self.sliding_window)


class Qwen2(Alternating):
    """The keys of a Qwen2 `config.json`."""

    model_type: ClassVar[str] = "qwen2"
    architectures: ClassVar[dict[str, Head]] = heads_of("Qwen2")
    paper: ClassVar[str] = "Yang et al. 2024"
    tokenizer: ClassVar[str] = "byte-level BPE"
    span_base: ClassVar[str] = "transformer"
    implied: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32, "sliding_window": 4096}
    unused: ClassVar[dict[str, Any]] = {"use_mrope": False}

    vocab_size: int = 151936
    hidden_act: str = "silu"
    intermediate_size: int = 22016
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    max_window_layers: int = 28

    def usual_kinds(self) -> Sequence[LayerType]:
        first = self.max_window_layers if self.use_sliding_window and self.sliding_window else self.layers
        return ["full_attention" if layer < first else "sliding_attention" for layer in range(self.layers)]

    def attention(self, layer: int) -> parts.Attention:
        return parts.Attention.of_heads(self.width, self.heads, CAUSAL, bias=True)
