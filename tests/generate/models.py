"""Tiny encoder–decoder models with random weights, sentences for them, and a tokenizer of words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from polyformer.generate import SpecialTokens
from polyformer.parts import (
    Attention,
    Causal,
    Chain,
    CrossAttention,
    Embed,
    Everyone,
    FeedForward,
    LayerNorm,
    LMHead,
    Residual,
    Sinusoidal,
    Stack,
    TokenEmbedding,
    Transformer,
)
from polyformer.parts.model import TransformerPart

PAD, BOS, EOS, UNK = range(4)
SPECIAL = SpecialTokens(BOS, EOS, PAD)


def tiny_spec(vocabulary: int = 13, width: int = 16, layers: int = 2, positions: int | None = None) -> Transformer:
    """Return a post-norm model with two heads."""
    attention = Residual(Attention.of_width(width, 2, Everyone()), after=LayerNorm(width))
    causal = Residual(Attention.of_width(width, 2, Causal()), after=LayerNorm(width))
    cross = Residual(CrossAttention.of_width(width, 2), after=LayerNorm(width))
    inner = Residual(FeedForward.of_widths(width, 2 * width), after=LayerNorm(width))
    embed = Embed(TokenEmbedding(vocabulary, width), Sinusoidal(width, positions), scale=width**0.5)
    return Transformer(
        embed,
        Stack((Chain((attention, inner)),) * layers),
        embed,
        Stack((Chain((causal, cross, inner)),) * layers),
        LMHead.of_width(width, vocabulary, bias=True),
    )


def tiny(seed: int = 0, ending: float = 0.0, **sizes: int | None) -> TransformerPart:
    """Build a model whose outputs differ with its input; `ending` is added to the end token's logit."""
    torch.manual_seed(seed)
    model = tiny_spec(**sizes).build().eval()  # type: ignore[arg-type]
    assert isinstance(model, TransformerPart)
    with torch.no_grad():
        model.head.projection.weight.mul_(1.5)  # type: ignore[union-attr, operator]
        model.head.projection.bias[EOS] += ending  # type: ignore[union-attr, index, operator]
    return model


def sentences(lengths: Sequence[int], vocabulary: int = 13, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random sources, padded, and their mask; each ends with the end token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        ids[row, : length - 1] = torch.randint(UNK + 1, vocabulary, (length - 1,), generator=generator)
        ids[row, length - 1] = EOS
    return ids, ids != PAD


class Words:
    """A tokenizer whose tokens are words, with the interface of `PairTokenizer`."""

    pad_id, bos_id, eos_id, unk_id = PAD, BOS, EOS, UNK

    def __init__(self, words: str) -> None:
        self.words = ["<pad>", "<bos>", "<eos>", "<unk>", *words.split()]
        self.source_vocabulary = self.target_vocabulary = len(self.words)
        self.asked: list[str | None] = []

    def encode_source(self, text: str, target_language: str | None = None) -> list[int]:
        self.asked.append(target_language)
        return [self.words.index(word) if word in self.words else UNK for word in text.split()] + [EOS]

    def encode_target(self, text: str) -> list[int]:
        return self.encode_source(text)

    def encode_sources(self, texts: Sequence[str], languages: Sequence[str | None]) -> list[list[int]]:
        return [self.encode_source(text, language) for text, language in zip(texts, languages, strict=True)]

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode_target(text) for text in texts]

    def decode_target(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[i] for i in ids if i > UNK)

    def source_tokens(self, ids: Iterable[int]) -> list[str]:
        return [self.words[i] for i in ids]

    target_tokens = source_tokens

    def save(self, folder: object) -> None:
        raise NotImplementedError
