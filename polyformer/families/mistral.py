"""Mistral (Jiang et al. 2023): LLaMA whose rows look only so far back."""

from __future__ import annotations

from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.config import Head
from polyformer.families.decoder import CAUSAL, heads_of
from polyformer.families.llama import LlamaLike


class Mistral(LlamaLike):
    """The keys of a Mistral `config.json`."""

    model_type: ClassVar[str] = "mistral"
    architectures: ClassVar[dict[str, Head]] = heads_of("Mistral")
    paper: ClassVar[str] = "Jiang et al. 2023"
    tokenizer: ClassVar[str] = "SentencePiece BPE, byte-level BPE"
    implied: ClassVar[dict[str, Any]] = {"bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096}

    hidden_act: str = "silu"
    intermediate_size: int = 14336
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = None

    def see(self, layer: int) -> parts.Rule:
        return CAUSAL if self.sliding_window is None else CAUSAL & parts.Window(self.sliding_window)
