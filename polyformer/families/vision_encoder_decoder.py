"""A vision encoder and a language decoder put together, as in TrOCR and image captioning (Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.families.bert import Bert
from polyformer.families.config import Family, Head, read_config
from polyformer.families.gpt2 import GPT2
from polyformer.families.swin import Swin
from polyformer.families.vit import DeiT, ViT
from polyformer.spec import Spec
from polyformer.weights.names import Names, Row, below

SIDES: dict[str, tuple[Head, tuple[type[Family], ...]]] = {
    "encoder": ("none", (ViT, DeiT, Swin)),
    "decoder": ("lm", (GPT2, Bert)),
}


class VisionEncoderDecoder(Family):
    """The keys of a `config.json` that holds two others. What the encoder's own pooler has learned is never used."""

    model_type: ClassVar[str] = "vision-encoder-decoder"
    architectures: ClassVar[dict[str, Head]] = {"VisionEncoderDecoderModel": "lm"}
    paper: ClassVar[str] = "Li et al. 2023"
    tokenizer: ClassVar[str] = "its decoder's"
    unused: ClassVar[dict[str, Any]] = {"is_encoder_decoder": True, "tie_word_embeddings": False}

    encoder: ViT | Swin = ViT()
    decoder: GPT2 | Bert = GPT2(add_cross_attention=True)

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Read the two models' own configurations, each for the head that it has here."""
        return {**data, **{side: _read(data.get(side), side, f"{where}: {side}") for side in SIDES}}

    def check(self) -> None:
        super().check()
        told = "the decoder lacks cross-attention (add_cross_attention), so it can't see the image"
        self.require(self.decoder.add_cross_attention, told)

    def seeing(self, names: Mapping[str, Tensor]) -> Self:
        own = {name.removeprefix("encoder."): names[name] for name in names if name.startswith("encoder.pooler.")}
        return self.replace(encoder=self.encoder.seeing(own))

    def spec(self) -> parts.Transformer:
        seeing, writing = self.encoder.spec(), self.decoder.spec()
        steps: list[Spec] = []
        if self._pooled:
            steps.append(parts.Idle(((self._pooled, self.encoder.width), (self._pooled,))))
        written = self.decoder.hidden_size if isinstance(self.decoder, Bert) else self.decoder.width
        if self.encoder.width != written:
            steps.append(parts.Linear(self.encoder.width, written))
        return parts.Transformer(
            source=seeing.source,
            encoder=seeing.encoder,
            target=writing.target,
            decoder=writing.decoder,
            head=writing.head,
            bridge=parts.Chain(tuple(steps)) if steps else None,
            ties=writing.ties,
        )

    def names(self) -> Names:
        seeing, writing = self.encoder.names(), self.decoder.names()
        pooler = enumerate(("weight", "bias") if self._pooled else ())
        rows = [
            *below("encoder.", (row for row in seeing.rows if not row.ours[0].startswith("pooler."))),
            *below("decoder.", writing.rows),
            *(Row(f"bridge.steps.0.tensor_{i}", f"encoder.pooler.dense.{name}") for i, name in pooler),
            Row(f"bridge.steps.{int(bool(self._pooled))}.{{w}}", "enc_to_dec_proj.{w}"),
        ]
        sides = (("encoder", seeing.computed), ("decoder", writing.computed))
        return Names(rows, {f"{side}.{name}": check for side, known in sides for name, check in known.items()})

    def module(self, name: str) -> str | None:
        side, _, own = name.partition(".")
        if side not in SIDES:
            return name
        found = getattr(self, side).module(own)
        return None if found is None else f"{side}.{found}"

    @property
    def _pooled(self) -> int:
        """The width of what the encoder's pooler would give; 0 where it has no weights."""
        encoder = self.encoder
        return (encoder.pooler_output_size or encoder.width) * encoder.pooled if isinstance(encoder, ViT) else 0


def _read(data: Any, side: str, where: str) -> Family:
    """Read the configuration of one side."""
    head, families = SIDES[side]
    known = {family.model_type: family for family in families}
    said = data.get("model_type") if isinstance(data, Mapping) else None
    if said not in known:
        raise SpecError(f"{where} should be the configuration of one of {', '.join(known)}, not of {said!r}")
    family = known[said]
    architecture = next(name for name, own in family.architectures.items() if own == head)
    return read_config(family, {**data, "architectures": [architecture]}, where)
