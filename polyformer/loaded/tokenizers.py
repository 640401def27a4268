"""Which tokenizer lies with a model, and whether it is this model's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from polyformer.errors import SpecError
from polyformer.spec import walk
from polyformer.weights.folders import member

if TYPE_CHECKING:
    from polyformer.data.checkpoint_tokenizer import TextTokenizer
    from polyformer.data.tokenizer import TextPairTokenizer
    from polyformer.loaded.model import Loaded

TOKENIZER = "tokenizer"
PUBLISHED = ("tokenizer.json", "vocab.*", "*.model")
"""Files of which one lies with every published tokenizer."""


def read_tokenizers(loaded: Loaded, path: Path) -> None:
    """Give a model the tokenizer that lies with it, in a folder of its own or beside; none if there is none.

    Raises:
        SpecError: a tokenizer that belongs to another model.
        DataError: a damaged one.
        WeightsError: a file that is a link out of the folder.
    """
    loaded.tokenizer, loaded.text_tokenizer = tokenizers_at(path)
    refuse_foreign(loaded)


class Tokenizers(NamedTuple):
    """The tokenizers of a folder: of pairs or of single texts, or none at all."""

    pairs: TextPairTokenizer | None
    text: TextTokenizer | None


def tokenizers_at(path: Path) -> Tokenizers:
    """Read the tokenizer that lies in a model's folder, or in a folder of its own there."""
    place = path / TOKENIZER if (path / TOKENIZER).is_dir() else path
    for file in (*place.glob("*.json"), *place.glob("*.spm"), *place.glob("*.model"), *place.glob("*.txt")):
        member(place, file.name)
    pairs = _pairs(place)
    if pairs is not None or not any(next(place.glob(name), None) for name in PUBLISHED):
        return Tokenizers(pairs, None)
    from polyformer.data.checkpoint_tokenizer import TextTokenizer

    return Tokenizers(None, TextTokenizer.find(place))


def _pairs(place: Path) -> TextPairTokenizer | None:
    if (place / "pair.json").exists():
        from polyformer.data.tokenizer import PairTokenizer

        return PairTokenizer.load(place)
    if (place / "source.spm").exists():
        from polyformer.data.marian import MarianTokenizer

        return MarianTokenizer.load(place)
    return None


def refuse_foreign(loaded: Loaded) -> None:
    """Raise for a tokenizer that belongs to another model: its ids would give nonsense, or none at all."""
    pairs, text, said = loaded.tokenizer, loaded.text_tokenizer, loaded.generation
    if text is not None:
        most = max((size for side in ("source", "target") for size in _vocabularies(loaded, side)), default=None)
        refuse_larger(loaded.folder, text, most)
    if pairs is None:
        return
    for side, known in (("source", pairs.source_vocabulary), ("target", pairs.target_vocabulary)):
        sizes = _vocabularies(loaded, side)
        if sizes and known > sizes[0]:
            raise SpecError(f"{loaded.folder}: the tokenizer has {known} {side} tokens, but the model only {sizes[0]}")
    for key, told, own in (
        ("decoder_start_token_id", said.decoder_start_token_id, pairs.bos_id),
        ("eos_token_id", said.eos_token_id, pairs.eos_id),
        ("pad_token_id", said.pad_token_id, pairs.pad_id),
    ):
        if told not in (None, own):
            raise SpecError(f"{loaded.folder} says {key} = {told}, but in its tokenizer that is {own}")


def refuse_larger(folder: Path | None, text: TextTokenizer | None, most: int | None) -> None:
    """Raise for a tokenizer that has more tokens than the model."""
    if text is not None and most is not None and text.vocabulary > most:
        raise SpecError(f"{folder}: the tokenizer has {text.vocabulary} tokens, but the model only {most}")


def _vocabularies(loaded: Loaded, side: str) -> list[int]:
    from polyformer.parts import TokenEmbedding

    embed = getattr(loaded.spec, side)
    return [record.vocabulary for _, record in walk(embed) if isinstance(record, TokenEmbedding)] if embed else []
