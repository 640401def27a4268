"""The one Transformer: embed, encoder?, decoder?, head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.parts.contract import Clause, Refuses, Term
from polyformer.parts.flow import Cache, Flow, Trace
from polyformer.parts.inputs import Delay, Given, InputPart
from polyformer.parts.part import Part
from polyformer.parts.view import View
from polyformer.spec import Record, Spec


class Tie(Record):
    """Two parameters that are one: `tied` (a parameter's path) is the very tensor `to`."""

    tied: str
    to: str


class Transformer(Spec):
    """A Transformer of any of the three shapes.

    - encoder and decoder: `source` and `encoder` read the input, `target` and `decoder` write the output;
    - encoder only: `source`, `encoder`; decoder only: `target`, `decoder`.

    `head` turns the last stack's rows into the answer; `pooler` into one more, such as BERT's vector of the sequence.
    `bridge` stands between the encoder's rows and the decoder, where their widths differ or passages are put together.
    `delay` lets the decoder read the encoder's input where it is there to judge it, not to write.
    `ties` names the parameters that are shared, as the 2017 paper shares its embeddings and the matrix before the
    softmax (section 3.4).
    """

    spared: ClassVar[Mapping[str, tuple[str, ...]]] = {"source": ("cached",), "encoder": ("cached",)}

    source: Spec | None = None
    encoder: Spec | None = None
    target: Spec | None = None
    decoder: Spec | None = None
    head: Spec | None = None
    pooler: Spec | None = None
    bridge: Spec | None = None
    delay: Delay | None = None
    ties: tuple[Tie, ...] = ()

    def check(self) -> None:
        self.require((self.source is None) == (self.encoder is None), "source and encoder go together")
        self.require((self.target is None) == (self.decoder is None), "target and decoder go together")
        self.require(self.encoder is not None or self.decoder is not None, "needs an encoder or a decoder")
        both = self.encoder is not None and self.decoder is not None
        self.require(both or self.delay is None, "only a decoder behind an encoder can read its input with a delay")
        both = self.encoder is not None and self.decoder is not None
        self.require(self.bridge is None or both, "a bridge needs an encoder and a decoder")

    def breaks(self) -> Mapping[Clause, Term]:
        return {"cached": Refuses("it has no decoder")} if self.decoder is None else {}

    def module(self) -> Part:
        return TransformerPart(self)


@dataclass
class Output:
    """What a forward pass gives.

    Attributes:
        hidden: the last stack's rows [B, S, D].
        logits: the head's scores, [B, S, V] of a language model, [B, labels] of a classifier; None without a head.
        encoder_hidden: the encoder's rows [B, T, D] for an encoder–decoder model, else None.
        pooled: what the pooler makes of the rows, usually one vector a sequence [B, D]; None without a pooler.
    """

    hidden: Tensor
    logits: Tensor | None = None
    encoder_hidden: Tensor | None = None
    pooled: Tensor | None = None


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

    source: InputPart | None
    encoder: Part | None
    target: InputPart | None
    decoder: Part | None
    head: Part | None
    pooler: Part | None
    bridge: Part | None
    __call__: Callable[..., Output]  # type: ignore[assignment]

    def __init__(self, spec: Transformer) -> None:
        super().__init__(spec)
        for name in ("source", "target"):
            if not isinstance(getattr(self, name), InputPart | None):
                raise SpecError(f"{type(getattr(spec, name)).__name__} can't be a {name}: it takes no input")
        self.delay, self.ties = spec.delay, spec.ties
        side = (self.source, self.encoder) if self.encoder is not None else (self.target, self.decoder)
        walked = (part for one in side if one is not None for part in one.modules())
        self.reads = frozenset[str]().union(*(part.reads for part in walked if isinstance(part, Part)))
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
        """Read the source: ids [B, T] (or pixels, or sound), mask [B, T] (non-zero where real) -> memory."""
        return self._remember(*self._encode(Given(input_ids, attention_mask, document_ids), trace))

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
        return self._decode(Given(ids, mask, document_ids, cache), memory, trace)[0]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        document_ids: Tensor | None = None,
        trace: Trace | None = None,
        **inputs: Tensor,
    ) -> Output:
        """Run the model.

        Args:
            input_ids: [B, T]; for a decoder-only model the text itself.
            attention_mask: [B, T], non-zero where real.
            decoder_input_ids: [B, S], for encoder–decoder models; those with a `delay` make it of `input_ids`.
            decoder_attention_mask: [B, S].
            cache: for the decoder.
            document_ids: [B, T], tells packed documents of `input_ids` apart.
            trace: filled with attention weights if given.
            inputs: what else this model's parts read: `pixel_values` or `input_features` in place of
                `input_ids`, `token_type_ids`, `langs`, `global_attention_mask`.
        Raises:
            SpecError: inputs that the model has no part for, or masks of a wrong shape.
        """
        first = self.source or self.target
        assert isinstance(first, InputPart)
        unread = [name for name in inputs if name not in self.reads and name != first.main]
        if self.encoder is None or self.decoder is None or self.delay is not None:
            given = {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
            unread += [name for name, value in given.items() if value is not None]
            if self.decoder is None and cache is not None:
                unread.append("cache")
        if first.main != "input_ids" and input_ids is not None:
            unread.append("input_ids")
        main = inputs.pop(first.main, input_ids)
        if unread:
            raise SpecError(f"nothing in this model can take {unread[0]}")
        if main is None:
            raise SpecError(f"this model needs {first.main}")
        own = Given(main, attention_mask, document_ids, None if self.encoder else cache, inputs)
        if self.encoder is None:
            return self._answer(*self._decode(own, None, trace))
        hidden, flow = self._encode(own, trace)
        if self.decoder is None:
            return self._answer(hidden, flow)
        if self.delay is not None:
            written = Given(self.delay.of(main, attention_mask), attention_mask, None, cache, {"ids": main})
        elif decoder_input_ids is None:
            raise SpecError(f"an encoder–decoder model needs decoder_input_ids beside {first.main}")
        else:
            written = Given(decoder_input_ids, decoder_attention_mask, None, cache)
        return self._answer(*self._decode(written, self._remember(hidden, flow), trace), hidden)

    def _encode(self, given: Given, trace: Trace | None) -> tuple[Tensor, Flow]:
        if self.source is None or self.encoder is None:
            raise SpecError("this model has no encoder")
        flow = self.source.begin(given)
        flow.trace, flow.path = trace, "encoder."
        return self.encoder(self.source(given.input, flow), flow), flow

    def _remember(self, hidden: Tensor, flow: Flow) -> Memory:
        return Memory(hidden if self.bridge is None else self.bridge(hidden, flow), flow.rows_valid)

    def _decode(self, given: Given, memory: Memory | None, trace: Trace | None) -> tuple[Tensor, Flow]:
        if self.target is None or self.decoder is None:
            raise SpecError("this model has no decoder")
        flow = self.target.begin(given)
        flow.trace, flow.path = trace, "decoder."
        if memory is not None:
            length = memory.hidden.shape[1]
            flow.memory = memory.hidden
            flow.memory_view = View(flow.view.queries, length, memory.valid, None, False, memory.hidden.device)
        hidden = self.decoder(self.target(given.input, flow), flow)
        if given.cache is not None:
            given.cache.length += flow.view.queries
        return hidden, flow

    def _answer(self, hidden: Tensor, flow: Flow, encoder_hidden: Tensor | None = None) -> Output:
        logits = None if self.head is None else self.head(hidden, flow)
        pooled = None if self.pooler is None else self.pooler(hidden, flow)
        return Output(hidden, logits, encoder_hidden, pooled)


def parameters_of(model: nn.Module) -> int:
    """Count parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())
