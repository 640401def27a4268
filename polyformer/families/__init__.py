"""Published architectures: one file each, listed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyformer.errors import SpecError, suggest
from polyformer.families.albert import Albert
from polyformer.families.bart import Bart
from polyformer.families.bert import Bert
from polyformer.families.big_bird import BigBird
from polyformer.families.bloom import Bloom
from polyformer.families.config import Family, read_config
from polyformer.families.conformer import Wav2Vec2Conformer
from polyformer.families.distilbert import DistilBert
from polyformer.families.electra import Electra
from polyformer.families.falcon import Falcon
from polyformer.families.gemma2 import Gemma2
from polyformer.families.gmlp import GMLP
from polyformer.families.gpt2 import GPT2
from polyformer.families.gpt_neox import GPTNeoX
from polyformer.families.linformer import LinformerLM
from polyformer.families.llama import Llama
from polyformer.families.longformer import Longformer
from polyformer.families.m2m100 import M2M100
from polyformer.families.marian import Marian
from polyformer.families.mbart import MBart
from polyformer.families.mistral import Mistral
from polyformer.families.mixtral import Mixtral
from polyformer.families.mpt import Mpt
from polyformer.families.olmo2 import Olmo2
from polyformer.families.pegasus import Pegasus
from polyformer.families.performer import PerformerLM
from polyformer.families.qwen2 import Qwen2
from polyformer.families.qwen3 import Qwen3
from polyformer.families.qwen_moe import Qwen2Moe, Qwen3Moe
from polyformer.families.reformer import Reformer
from polyformer.families.retnet import RetNet
from polyformer.families.roberta import Camembert, Roberta, XlmRoberta
from polyformer.families.swin import Swin
from polyformer.families.switch import Switch
from polyformer.families.t5 import MT5, T5, UMT5
from polyformer.families.transformer import Transformer2017
from polyformer.families.vision_encoder_decoder import VisionEncoderDecoder
from polyformer.families.vit import DeiT, ViT
from polyformer.families.whisper import Whisper
from polyformer.families.xlm import Xlm

FAMILIES: tuple[type[Family], ...] = (
    Albert,
    Bart,
    Bert,
    BigBird,
    Bloom,
    Wav2Vec2Conformer,
    DistilBert,
    Electra,
    Falcon,
    Gemma2,
    GPT2,
    GPTNeoX,
    Llama,
    Longformer,
    M2M100,
    Marian,
    MBart,
    Mistral,
    Mixtral,
    Mpt,
    Olmo2,
    Pegasus,
    Qwen2,
    Qwen3,
    Qwen2Moe,
    Qwen3Moe,
    Reformer,
    Camembert,
    Roberta,
    XlmRoberta,
    Swin,
    Switch,
    MT5,
    T5,
    UMT5,
    VisionEncoderDecoder,
    DeiT,
    ViT,
    Whisper,
    Xlm,
)
"""The families that are read from a `config.json`. `Transformer2017`, `RetNet`, `PerformerLM`, `LinformerLM` and `GMLP`
are made from sizes instead."""

__all__ = [
    "FAMILIES",
    "GMLP",
    "Family",
    "LinformerLM",
    "Marian",
    "PerformerLM",
    "RetNet",
    "Transformer2017",
    "family_of",
    "read_family",
]


def family_of(model_type: str) -> type[Family]:
    """Return the family that a `config.json` calls so; raises `SpecError`, naming the near one, if there is none."""
    known = {family.model_type: family for family in FAMILIES}
    if model_type not in known:
        raise SpecError(f"there is no family '{model_type}'{suggest(model_type, known)}")
    return known[model_type]


def read_family(data: Mapping[str, Any], where: str) -> Family:
    """Read a `config.json` of any family; raises `SpecError` as `family_of` and `read_config` do."""
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise SpecError(f"{where} has no model_type, so it can't be told what model it describes")
    return read_config(family_of(model_type), data, where)
