"""The public face: load a model with all that belongs to it, save it, translate with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyformer.errors import SpecError, WeightsError
from polyformer.families import Family, read_family
from polyformer.families.config import write_config
from polyformer.families.generation import Generation
from polyformer.parts import TokenEmbedding
from polyformer.parts.model import Transformer, TransformerPart
from polyformer.spec import walk
from polyformer.weights import strict_json
from polyformer.weights.assemble import assemble, disassemble
from polyformer.weights.files import SINGLE, read_tensors, write_tensors
from polyformer.weights.folders import check_manifest, member, recover, staged_folder

if TYPE_CHECKING:
    import torch

    from polyformer.data.tokenizer import TextPairTokenizer
    from polyformer.generate import Search, Translation

SPEC, CONFIG, GENERATION, TOKENIZER = "spec.json", "config.json", "generation_config.json", "tokenizer"


@dataclass
class Loaded:
    """A model and what belongs to it.

    Attributes:
        model: in evaluation mode.
        tokenizer: turns text into ids and back; None where the folder had none.
        family: the configuration it was published with, for saving it in the same layout; None for a model of ours.
        generation: special tokens and search settings that its folder recommends.
        folder: where it was loaded from.
    """

    model: TransformerPart
    tokenizer: TextPairTokenizer | None = None
    family: Family | None = None
    generation: Generation = field(default_factory=Generation)
    folder: Path | None = None

    @property
    def spec(self) -> Transformer:
        """The model's spec."""
        assert isinstance(self.model.spec, Transformer)
        return self.model.spec

    def translate(
        self, texts: Sequence[str], settings: Search | None = None, target_language: str | None = None
    ) -> list[list[Translation]]:
        """Translate texts; returns for each its translations, best first.

        Args:
            settings: how to search; what the checkpoint recommends if None.
            target_language: for models that know several.
        Raises:
            SpecError: there is no tokenizer, or the checkpoint recommends a search that isn't known here.
        """
        from polyformer.generate import translate

        if self.tokenizer is None:
            raise SpecError(f"the model in {self.folder} came without a tokenizer, so it can't read text; give it ids")
        if isinstance(texts, str):
            raise SpecError("translate takes a list of texts, not one text")
        return translate(self.model, self.tokenizer, texts, settings or self.recommended(), target_language)

    def recommended(self) -> Search:
        """Return the search that the checkpoint's generation settings ask for, or our default where they are silent.

        Raises:
            SpecError: they ask for something that our search does not do.
        """
        from polyformer.generate import Hopeful, Limit, Power, Safe, Search

        said = self.generation
        if said == Generation():
            return Search()
        # renormalize_logits would share out the forbidden tokens' probability, and choose the same next token
        unknown = [f"{key} = {value}" for key, value in said.others if key != "renormalize_logits"]
        unknown += [f"bad_words_ids with {list(ids)}" for ids in said.bad_words_ids or () if len(ids) > 1]
        unknown += ["early_stopping = true"] * (said.early_stopping is True)
        unknown += [f"forced_bos_token_id = {said.forced_bos_token_id}"] * (said.forced_bos_token_id is not None)
        if unknown:
            raise SpecError(
                f"the checkpoint recommends a search with {unknown[0]}, unknown here; give settings of your own"
            )
        limit = Search().limit if said.max_length is None else Limit(said.max_length - 1)  # the start token counts
        return Search(
            beams=said.num_beams,
            penalty=Power(said.length_penalty),
            limit=limit.replace(unfinished="cut" if said.forced_eos_token_id is None else "end"),
            stop=Safe() if said.early_stopping == "never" else Hopeful(),
            forbidden=tuple(ids[0] for ids in said.bad_words_ids or ()),
        )


def load(path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Loaded:
    """Load a model from a run folder of ours or a Hugging Face folder.

    The weights stay memory-mapped until they are used, and are in memory once.

    Args:
        path: the folder.
        device: where the model goes; the processor if None.
        dtype: of its floating-point tensors; as they are on disk if None.
    Raises:
        WeightsError: no such folder, damaged files, tensors missing, left over or of a wrong shape.
        SpecError: a configuration that is not understood in full.
    """
    path = Path(path)
    recover(path)
    if not path.is_dir():
        what = "is a file; give the folder that holds it" if path.exists() else "does not exist"
        raise WeightsError(f"{path} {what}")
    if (path / SPEC).exists():
        return _load_own(path, device, dtype)
    if (path / CONFIG).exists():
        return _load_reference(path, device, dtype)
    raise WeightsError(f"{path} holds no model: neither {SPEC} (a run folder) nor {CONFIG} (a Hugging Face folder)")


def save(loaded: Loaded, folder: str | Path, force: bool = False) -> None:
    """Save a model with all that belongs to it.

    A model of a published family goes into the reference library's layout and loads there too; one whose spec was
    rewritten, or was ours from the start, into a folder of ours. Either way the folder appears at once and complete,
    with a manifest, or not at all.

    Args:
        folder: the new folder.
        force: replace a folder that was saved before.
    Raises:
        WeightsError: the folder exists, or can't be written; what stood there is whole.
    """
    with staged_folder(Path(folder), replace=force) as stage:
        if loaded.family is not None and loaded.family.spec() == loaded.spec:
            _save_reference(loaded, loaded.family, stage)
        else:
            _save_own(loaded, stage)


def _load_own(path: Path, device: torch.device | str | None, dtype: torch.dtype | None) -> Loaded:
    if not (path / SINGLE).exists():
        raise WeightsError(f"{path} holds no finished model ({SINGLE}); let its training end, or go on with it")
    check_manifest(path)
    spec = Transformer.from_json((path / SPEC).read_text(encoding="utf-8"), str(path / SPEC))
    model = assemble(spec, read_tensors(path / SINGLE), device, dtype)
    generation = Generation()
    if (path / GENERATION).exists():
        generation = Generation.read({}, strict_json.read(path / GENERATION), str(path / GENERATION))
    return _fitted(Loaded(_ready(model), _tokenizer(path), None, generation, path))


def _save_own(loaded: Loaded, stage: Path) -> None:
    (stage / SPEC).write_text(loaded.spec.to_json(), encoding="utf-8")
    write_tensors(stage / SINGLE, disassemble(loaded.model))
    if loaded.generation != Generation():
        _write_json(stage / GENERATION, loaded.generation.write())
    if loaded.tokenizer is not None:
        loaded.tokenizer.save(stage / TOKENIZER)


def _load_reference(path: Path, device: torch.device | str | None, dtype: torch.dtype | None) -> Loaded:
    config_file, generation_file = member(path, CONFIG), member(path, GENERATION)
    config = strict_json.read(config_file)
    family = read_family(config, str(config_file))
    said = strict_json.read(generation_file) if generation_file.exists() else {}
    generation = Generation.read(config, said, str(generation_file if said else config_file))
    tensors = family.names().to_ours(read_tensors(path))
    model = assemble(family.spec(), tensors, device, dtype)
    return _fitted(Loaded(_ready(model), _tokenizer(path), family, generation, path))


def _save_reference(loaded: Loaded, family: Family, stage: Path) -> None:
    parameter = next(loaded.model.parameters())
    _write_json(stage / CONFIG, write_config(family, parameter.dtype))
    _write_json(stage / GENERATION, loaded.generation.write())
    write_tensors(stage / SINGLE, family.names().to_disk(disassemble(loaded.model)))
    if loaded.tokenizer is not None:
        loaded.tokenizer.save(stage)


def _ready(model: Any) -> TransformerPart:
    assert isinstance(model, TransformerPart)
    return model.eval()


def _tokenizer(path: Path) -> TextPairTokenizer | None:
    """Read the tokenizer that lies with a model, in a folder of its own or beside; None if there is none."""
    place = path / TOKENIZER if (path / TOKENIZER).is_dir() else path
    for file in (*place.glob("*.json"), *place.glob("*.spm")):
        member(place, file.name)
    if (place / "pair.json").exists():
        from polyformer.data.tokenizer import PairTokenizer

        return PairTokenizer.load(place)
    if (place / "source.spm").exists():
        from polyformer.data.marian import MarianTokenizer

        return MarianTokenizer.load(place)
    return None


def _fitted(loaded: Loaded) -> Loaded:
    """Refuse a tokenizer that belongs to another model: its ids would give nonsense, or none at all."""
    tokenizer, said = loaded.tokenizer, loaded.generation
    if tokenizer is None:
        return loaded
    for side, known in (("source", tokenizer.source_vocabulary), ("target", tokenizer.target_vocabulary)):
        embed = getattr(loaded.spec, side)
        sizes = [record.vocabulary for _, record in walk(embed) if isinstance(record, TokenEmbedding)] if embed else []
        if sizes and known > sizes[0]:
            raise SpecError(f"{loaded.folder}: the tokenizer has {known} {side} tokens, but the model only {sizes[0]}")
    for key, told, own in (
        ("decoder_start_token_id", said.decoder_start_token_id, tokenizer.bos_id),
        ("eos_token_id", said.eos_token_id, tokenizer.eos_id),
        ("pad_token_id", said.pad_token_id, tokenizer.pad_id),
    ):
        if told not in (None, own):
            raise SpecError(f"{loaded.folder} says {key} = {told}, but in its tokenizer that is {own}")
    return loaded


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
