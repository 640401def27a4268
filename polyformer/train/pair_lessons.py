"""What encoder–decoders learn: to answer a source with a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from polyformer.data import Batches, BatchRecipe, Encoded, Pair, Reader
from polyformer.data.batches import Column
from polyformer.data.examples import Example, ExampleSplits
from polyformer.errors import DataError, SpecError
from polyformer.generate import Limit, translate
from polyformer.judge import Sample
from polyformer.parts.heads import LMHeadPart
from polyformer.parts.model import TransformerPart
from polyformer.train.lessons import Lesson, spread
from polyformer.train.tuning import TuneRecipe


class Responding(Lesson):
    """Sources and targets, for an encoder–decoder."""

    kinds = ("answered",)
    what = "target tokens"
    names = ("source", "written", "target that stands there")

    def settled(self, splits: ExampleSplits) -> TuneRecipe:
        model = self.base.model
        if model.encoder is None or model.decoder is None or not isinstance(model.head, LMHeadPart):
            raise SpecError(f"{self.recipe.base} is no encoder–decoder that writes texts")
        if self.base.reads_images:
            raise SpecError(f"{self.recipe.base} reads images, not texts")
        return self.with_rows(self.length())

    def reader(self, examples: Sequence[Example]) -> tuple[Reader[Any], list[str]]:
        batch, pairs = self.recipe.batch, self.base.pairs
        assert batch.length is not None
        found = [Pair(one.data["source"], one.data["target"], "", "") for one in examples]
        sources = pairs.encode_sources([one.source for one in found], [self.task.language] * len(found))
        targets = pairs.encode_targets([one.target for one in found])
        kept = [i for i in range(len(found)) if max(len(sources[i]), len(targets[i])) <= batch.length]
        if not kept:
            raise DataError(
                f"none of {len(found):,} examples has at most {batch.length} tokens on both sides; raise batch.length"
            )
        data = Encoded(
            Column([sources[i] for i in kept]),
            Column([targets[i] for i in kept]),
            [found[i] for i in kept],
            pairs.pad_id,
            pairs.bos_id,
            len(found) - len(kept),
        )
        told = [f"{len(kept):,} examples with {int(data.target.lengths.sum()):,} target tokens"]
        if data.dropped:
            told.append(f"left out, longer than {batch.length} tokens: {data.dropped:,}")
        recipe = BatchRecipe(batch.tokens, batch.length, "drop", batch.seed)
        return Batches(data, recipe), told

    def compared(self, reader: Reader[Any]) -> Iterator[dict[str, Any]]:
        batch = next(reader.in_order())
        names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
        yield {name: getattr(batch, name) for name in names}

    def samples(self, model: TransformerPart, examples: Sequence[Example]) -> list[Sample]:
        some = spread(examples, self.recipe.report.samples)
        if not some:
            return []
        search = self.base.recommended().replace(limit=Limit(self.recipe.report.sampling.limit))
        sources = [one.data["source"] for one in some]
        found = translate(model, self.base.pairs, sources, search, self.task.language)
        return [
            Sample(one.data["source"], answer[0].text, one.data["target"])
            for one, answer in zip(some, found, strict=True)
        ]

    @property
    def commands(self) -> tuple[str, ...]:
        return ('translate {run} "A text"',)
