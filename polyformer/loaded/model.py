"""A model and what belongs to it, and what it can be asked."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyformer.errors import SpecError
from polyformer.families import Family
from polyformer.families.generation import Generation
from polyformer.parts import Chain, Mean, Normalise
from polyformer.parts.model import Transformer, TransformerPart
from polyformer.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from polyformer.answer import Filled, Label
    from polyformer.data.chat import Message
    from polyformer.data.checkpoint_tokenizer import TextTokenizer
    from polyformer.data.images import ImageReader
    from polyformer.data.tokenizer import TextPairTokenizer
    from polyformer.generate import Answer, Capacity, Counts, Engine, Request, Runner, Sampling, Search, Translation
    from polyformer.native.kinds import Precision
    from polyformer.native.machine import NativeModel
    from polyformer.parts.part import Part


@dataclass
class Pooling:
    """How a folder turns rows into a text's vector.

    Attributes:
        part: rows [B, S, D] to vectors [B, E].
        length: the tokens that a text is cut to, or None.
    """

    part: Part
    length: int | None = None


@dataclass
class Loaded:
    """A model and what belongs to it.

    Attributes:
        model: in evaluation mode.
        tokenizer: turns pairs of texts into ids and back; None where the folder had none.
        text_tokenizer: the same for single texts, as published checkpoints have it; None where there is none.
        family: the configuration it was published with, for saving it in the same layout; None for a model of ours.
        generation: special tokens and search settings that its folder recommends.
        folder: where it was loaded from.
        labels: what a classifier's outputs mean.
        pooling: turns rows into a text's vector, where the folder says how (sentence-transformers).
        before: ids that stand before every text, where the model has a trained prompt.
        files: what else lies in the folder and belongs to the model, written back unchanged.
        native: how matrices are held where the engine, and searches, run natively; None where they run in PyTorch.
        packed: the model made ready for that, and by which weights.
    """

    model: TransformerPart
    tokenizer: TextPairTokenizer | None = None
    family: Family | None = None
    generation: Generation = field(default_factory=Generation)
    folder: Path | None = None
    text_tokenizer: TextTokenizer | None = None
    labels: tuple[str, ...] = ()
    pooling: Pooling | None = None
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    native: Precision | None = None
    before: tuple[int, ...] = ()
    packed: tuple[object, NativeModel] | None = field(default=None, repr=False)

    @property
    def spec(self) -> Transformer:
        """The model's spec."""
        assert isinstance(self.model.spec, Transformer)
        return self.model.spec

    def translate(
        self,
        texts: Sequence[str],
        settings: Search | None = None,
        target_language: str | None = None,
        counts: Counts | None = None,
    ) -> list[list[Translation]]:
        """Translate texts; returns for each its translations, best first.

        Args:
            settings: how to search; what the checkpoint recommends if None.
            target_language: for models that know several.
            counts: what is done is added to it.
        Raises:
            SpecError: there is no tokenizer, or the checkpoint recommends a search that isn't known here.
        """
        from polyformer.generate import translate

        if isinstance(texts, str):
            raise SpecError("translate takes a list of texts, not one text")
        if self.model.encoder is None or self.model.decoder is None:
            raise SpecError("translating needs an encoder and a decoder; this model has one of them (see generate)")
        settings = settings or self.recommended()
        return translate(
            self._searcher(settings.beams, len(texts)), self.pairs, texts, settings, target_language, counts=counts
        )

    def _searcher(self, beams: int, texts: int) -> TransformerPart | Runner:
        """Return what a search runs on: the model in PyTorch, or as many slots natively as pay."""
        if self.native is None:
            return self.model
        from polyformer.generate import TOGETHER
        from polyformer.loaded.writing import runner_for

        return runner_for(self, beams * min(max(texts, 1), TOGETHER))

    @property
    def pairs(self) -> TextPairTokenizer:
        """The tokenizer of sources and targets; raises `SpecError` if there is none."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.text_tokenizer is None:
            raise SpecError(f"the model in {self.folder} came without a tokenizer, so it can't read text; give it ids")
        from polyformer.data.sides import BothSides

        return BothSides(self.text_tokenizer, self.generation.decoder_start_token_id)

    def recommended(self) -> Search:
        """Return the search that the checkpoint's generation settings ask for, or our default where they are silent.

        Raises:
            SpecError: they ask for something that our search does not do.
        """
        from polyformer.generate import Early, Hopeful, Limit, Power, Safe, Search
        from polyformer.loaded.recommended import recommended_groups, recommended_processors

        said = self.generation
        if said == Generation():
            return Search()
        processors = recommended_processors(said)
        limit = Search().limit if said.max_length is None else Limit(said.max_length - 1)  # the start token counts
        return Search(
            beams=said.num_beams,
            penalty=Power(said.length_penalty),
            limit=limit.replace(unfinished="cut" if said.forced_eos_token_id is None else "end"),
            stop={"never": Safe(), True: Early(), False: Hopeful()}[said.early_stopping],
            forbidden=tuple(ids[0] for ids in said.bad_words_ids or () if len(ids) == 1),
            first=said.forced_bos_token_id,
            processors=processors,
            diverse=recommended_groups(said),
        )

    @functools.cached_property
    def images(self) -> ImageReader:
        """What prepares images for this model, as its folder says.

        Raises:
            SpecError: a model that reads no images, or a folder that doesn't say how in a way that is understood.
        """
        from polyformer.data.images import ImageReader

        found = None if self.folder is None or not self.reads_images else ImageReader.find(self.folder)
        if found is None:
            raise SpecError(f"{self.folder} doesn't say how images are prepared (preprocessor_config.json)")
        return found

    @property
    def reads_source(self) -> bool:
        """Whether it answers a source, which its encoder reads, and continues no text."""
        return self.model.encoder is not None and self.model.decoder is not None

    @property
    def reads_images(self) -> bool:
        """Whether the model's input is an image."""
        return self.model.source is not None and self.model.source.main == "pixel_values"

    @property
    def texts(self) -> TextTokenizer:
        """The tokenizer of single texts; raises `SpecError` if there is none."""
        if self.text_tokenizer is None:
            raise SpecError(f"the model in {self.folder} came without a tokenizer for single texts; give it ids")
        return self.text_tokenizer

    def generate(self, prompts: Sequence[str], settings: Sampling | None = None) -> list[str]:
        """Continue texts or, with an encoder–decoder, answer them; returns what was written for each."""
        return [answer.text for answer in self.answers(prompts, settings)]

    def answers(self, prompts: Sequence[str], settings: Sampling | None = None) -> list[Answer]:
        """Do what `generate` does; returns ids, log-probabilities and how each ended, too.

        Raises:
            SpecError: there is no tokenizer, the model has no decoder, or a prompt is longer than its context.
        """
        from polyformer.generate import Sampling

        return self._answered(self.requests(_listed(prompts), settings or Sampling()))

    def chat(self, conversations: Sequence[Sequence[Message]], settings: Sampling | None = None) -> list[str]:
        """Answer conversations by the model's chat template; what their messages say stays text.

        Args:
            conversations: each a list of messages such as `{"role": "user", "content": "Hello"}`.
        Raises:
            SpecError: there is no tokenizer, or the model is no decoder alone.
            DataError: the model came without a chat template, or it refuses the messages.
        """
        from polyformer.generate import Sampling

        asked = self.chat_requests(conversations, settings or Sampling())
        return [answer.text.strip() for answer in self._answered(asked)]

    def requests(self, texts: Sequence[str], settings: Sampling) -> list[Request]:
        """Return what an engine is asked to continue texts, or to answer them; see `generate`."""
        from polyformer.loaded.writing import requests_for

        return requests_for(self, texts, settings)

    def chat_requests(self, conversations: Sequence[Sequence[Message]], settings: Sampling) -> list[Request]:
        """Return what an engine is asked to answer conversations; see `chat`."""
        from polyformer.loaded.writing import chat_requests_for

        return chat_requests_for(self, conversations, settings)

    def engine(self, slots: int = 16, capacity: Capacity | None = None, guess: str | None = None) -> Engine:
        """Return an engine that answers requests, many at once.

        Args:
            slots: how many texts are written, or kept for others that begin as they do, at the same time.
            capacity: what it may use; None is as much as it needs.
            guess: guess tokens and judge several in one pass (speculative decoding): "lookup" looks in the text itself,
                "early=10" lets so many of the model's first blocks guess, "draft=MODEL" a smaller model.
        """
        from polyformer.loaded.writing import engine_for

        return engine_for(self, slots, capacity, guess)

    def _answered(self, asked: Sequence[Request]) -> list[Answer]:
        from polyformer.generate import TOGETHER, Capacity

        engine = self.engine(max(min(TOGETHER, len(asked)), 1), Capacity(waiting=max(len(asked), 1)))
        return [handle.result() for handle in [engine.submit(one) for one in asked]]

    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text, by the generation settings or else by the tokenizer."""
        said = self.generation.eos_token_id
        if said is None:
            said = None if self.text_tokenizer is None else self.text_tokenizer.eos_id
        return () if said is None else (said,) if isinstance(said, int) else said

    def embed(self, texts: Sequence[str], pooling: Spec | None = None) -> Tensor:
        """Return a vector for each text [N, D].

        Args:
            pooling: rows to vectors; the folder's own if None, or else the normalised mean of the rows. A folder
                that says how texts are pooled may also say to how many tokens they are cut; how many were is logged.
        Raises:
            SpecError: there is no tokenizer, or the model has both encoder and decoder.
        """
        from polyformer.answer import embed_texts

        own = self.pooling or Pooling(Chain((Mean(), Normalise())).build())
        part = own.part if pooling is None else pooling.build()
        return embed_texts(self.model, self.texts, _listed(texts), part, own.length)

    def fill(self, text: str, count: int = 5) -> list[list[Filled]]:
        """Return the likeliest tokens for each mask in a text; see `polyformer.answer.fill`."""
        from polyformer.answer import fill

        return fill(self.model, self.texts, text, count)

    def classify(self, inputs: Sequence[str | Path]) -> list[list[Label]]:
        """Return the labels of texts, or, where the model reads images, of the files named; the likeliest first.

        Raises:
            SpecError: the model has no classifier, or came without a tokenizer or a description of its images.
        """
        from polyformer.answer import classify_images, classify_texts

        given = [str(one) for one in _listed(inputs)]
        if self.reads_images:
            return classify_images(self.model, self.images, [Path(one) for one in given], self.labels)
        return classify_texts(self.model, self.texts, given, self.labels)


def _listed(texts: Sequence[Any]) -> list[Any]:
    if isinstance(texts, str):
        raise SpecError("this takes a list of texts, not one text")
    return list(texts)


def ready(model: Any) -> TransformerPart:
    """Return an assembled model in evaluation mode."""
    assert isinstance(model, TransformerPart)
    return model.eval()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file as the reference library lays it out."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
