"""The one Transformer: embed, encoder?, decoder?, head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.parts.flow import Cache, Trace, start_flow
from polyformer.parts.part import Part
from polyformer.parts.rules import View
from polyformer.spec import Record, Spec


class Tie(Record):
    """Two parameters that are one: `tied` (a parameter's path) is the very tensor `to`."""

    tied: str
    to: str


class Transformer(Spec):
    """A Transformer of any of the three shapes.

    - encoder and decoder: `source` and `encoder` read the input, `target` and `decoder` write the output;
    - encoder only: `source`, `encoder`; decoder only: `target`, `decoder`.

    `ties` names the parameters that are shared, as the 2017 paper shares its embeddings and the matrix before the
    softmax (section 3.4).
    """

    source: Spec | None = None
    encoder: Spec | None = None
    target: Spec | None = None
    decoder: Spec | None = None
    head: Spec | None = None
    ties: tuple[Tie, ...] = ()

    def check(self) -> None:
        self.require((self.source is None) == (self.encoder is None), "source and encoder go together")
        self.require((self.target is None) == (self.decoder is None), "target and decoder go together")
        self.require(self.encoder is not None or self.decoder is not None, "needs an encoder or a decoder")

    def module(self) -> Part:
        return TransformerPart(self)


@dataclass
class Output:
    """What a forward pass gives.

    Attributes:
        hidden: the last stack's rows [B, S, D].
        logits: the head's scores [B, S, V]; None for a model without a head.
        encoder_hidden: the encoder's rows [B, T, D] for an encoder–decoder model, else None.
    """

    hidden: Tensor
    logits: Tensor | None = None
    encoder_hidden: Tensor | None = None


@dataclass
class Memory:
    """An encoder's output and which of its rows are real: hidden [B, T, D], valid [B, T] or None."""

    hidden: Tensor
    valid: Tensor | None = None

    def select(self, rows: Tensor) -> Memory:
        """Keep these sentences, in this order."""
        return Memory(self.hidden[rows], None if self.valid is None else self.valid[rows])


class TransformerPart(Part):
    """The module of every model; its names at the outer boundary are the ecosystem's."""

    source: Part | None
    encoder: Part | None
    target: Part | None
    decoder: Part | None
    head: Part | None
    __call__: Callable[..., Output]  # type: ignore[assignment]

    def __init__(self, spec: Transformer) -> None:
        super().__init__(spec)
        self.ties = spec.ties
        for one in spec.ties:
            missing = [path for path in (one.tied, one.to) if not self._has(path)]
            if missing:
                raise SpecError(f"a tie names '{missing[0]}', which is no parameter of this model")
        self.tie()

    def _has(self, path: str) -> bool:
        return any(name == path for name, _ in self.named_parameters(remove_duplicate=False))

    def tie(self) -> None:
        """Make tied parameters the same tensor (again, after tensors were replaced)."""
        for one in self.ties:
            owner, _, name = one.tied.rpartition(".")
            tied, to = self.get_parameter(one.tied), self.get_parameter(one.to)
            if tied.shape != to.shape:
                raise SpecError(f"{one.tied} {list(tied.shape)} can't be tied to {one.to} {list(to.shape)}")
            setattr(self.get_submodule(owner), name, to)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie()
        return self

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Memory:
        """Read the source: ids [B, T], mask [B, T] (non-zero where real) -> memory."""
        if self.source is None or self.encoder is None:
            raise SpecError("this model has no encoder")
        flow = start_flow(input_ids, attention_mask, document_ids)
        flow.trace, flow.path = trace, "encoder."
        return Memory(self.encoder(self.source(input_ids, flow), flow), flow.view.valid)

    def decode(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
        document_ids: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Read the rows written so far: ids [B, S] -> hidden [B, S, D], extending `cache` if there is one.

        Args:
            ids: the new tokens only, where a cache holds the earlier ones.
            mask: [B, K], non-zero where real, cached tokens included; None if all are.
            memory: the encoder's output, for encoder–decoder models.
            document_ids: [B, K], for packed documents.
        """
        if self.target is None or self.decoder is None:
            raise SpecError("this model has no decoder")
        flow = start_flow(ids, mask, document_ids, cache)
        flow.trace, flow.path = trace, "decoder."
        if memory is not None:
            length = memory.hidden.shape[1]
            flow.memory = memory.hidden
            flow.memory_view = View(ids.shape[1], length, memory.valid, None, False, ids.device)
        hidden: Tensor = self.decoder(self.target(ids, flow), flow)
        if cache is not None:
            cache.length += ids.shape[1]
        return hidden

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        document_ids: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Output:
        """Run the model.

        Args:
            input_ids: [B, T]; for a decoder-only model the text itself.
            attention_mask: [B, T], non-zero where real.
            decoder_input_ids: [B, S], for encoder–decoder models.
            decoder_attention_mask: [B, S].
            cache: for the decoder.
            document_ids: [B, T], tells packed documents of `input_ids` apart.
            trace: filled with attention weights if given.
        Raises:
            SpecError: inputs that the model has no part for, or masks of a wrong shape.
        """
        if self.encoder is None or self.decoder is None:
            given = {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
            unread = [name for name, value in given.items() if value is not None]
            if self.decoder is None and cache is not None:
                unread.append("cache")
            if unread:
                raise SpecError(f"this model is no encoder–decoder, so nothing in it can take {unread[0]}")
        memory = None
        if self.encoder is None:
            hidden = self.decode(input_ids, attention_mask, None, cache, document_ids, trace)
        else:
            memory = self.encode(input_ids, attention_mask, document_ids, trace)
            hidden = memory.hidden
            if self.decoder is not None:
                if decoder_input_ids is None:
                    raise SpecError("an encoder–decoder model needs decoder_input_ids beside input_ids")
                hidden = self.decode(decoder_input_ids, decoder_attention_mask, memory, cache, None, trace)
        logits = None if self.head is None else self.head(hidden)
        both = memory is not None and self.decoder is not None
        return Output(hidden, logits, memory.hidden if both and memory else None)


def parameters_of(model: nn.Module) -> int:
    """Count parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())
