"""Opening a model that is to write: by its plan, without PyTorch, where it can be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from polyformer.errors import SpecError, WeightsError
from polyformer.loaded.kept import keep, key_of, recall
from polyformer.loaded.layouts import CONFIG, GENERATION, MODULES, SPEC
from polyformer.loaded.ready import ready_path
from polyformer.loaded.tokenizers import refuse_larger, tokenizers_at
from polyformer.loaded.writer import Packing, Writer
from polyformer.native.kinds import Precision
from polyformer.native.library import library
from polyformer.native.plan import Plan, Store
from polyformer.weights.files import read_stored
from polyformer.weights.folders import check_manifest, member, recover
from polyformer.weights.gguf import GgufFile, read_gguf

if TYPE_CHECKING:
    from polyformer.data.checkpoint_tokenizer import TextTokenizer
    from polyformer.loaded.model import Loaded

log = logging.getLogger("polyformer")

Kind = Literal["gguf", "own", "reference"]


def open_writer(path: str | Path, weights: Precision | None = None) -> Writer | Loaded:
    """Open a model that is to write, and nothing else.

    A decoder whose weights lie in a GGUF file, or in a folder's safetensors, as its program wants them, runs natively
    from there. The first time it is lowered, for which PyTorch is needed; what came of that is kept
    (`polyformer.loaded.kept`). All other models are loaded (`load_to_write`).

    Args:
        path: what `load` takes.
        weights: how matrices are held; None: as a GGUF file stores them, and in single precision those of a folder.
    Raises:
        LoweringError, RunError: `weights` are named, but the model can't run natively.
        WeightsError, SpecError: as `load` does.
    """
    path = ready_path(Path(path))
    recover(path)
    source = _source(path) if library() is not None else None
    plan = None if source is None else _plan(source)
    if source is None or plan is None:
        from polyformer.loaded.files import load_to_write

        return load_to_write(path, weights)
    packing = Packing(plan, source.store, weights or source.weights)
    try:
        tokenizer = _tokenizer(source)
        refuse_larger(path, tokenizer, plan.tokens)
    except BaseException:
        packing.stop()
        raise
    return Writer(path, plan, packing, tokenizer)


class Source(NamedTuple):
    """A model as it lies on disk.

    Attributes:
        place: the file or folder.
        store: its tensors.
        said: all else that its plan follows from.
        weights: how its matrices are held where nothing is asked for.
    """

    kind: Kind
    place: Path
    store: Store
    said: Sequence[bytes | memoryview]
    weights: Precision


def _source(path: Path) -> Source | None:
    """Return what lies there, None if it can't have a plan."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        file = read_gguf(path)
        return Source("gguf", path, file, (file.header,), "as stored")
    own = (path / SPEC).is_file()
    store = read_stored(path) if own or ((path / CONFIG).is_file() and not (path / MODULES).exists()) else None
    if store is None:
        return None
    if own:
        check_manifest(path)
    files = [member(path, name) for name in (SPEC, CONFIG, GENERATION)]
    said = [piece for file in files if file.is_file() for piece in (file.name.encode(), file.read_bytes())]
    return Source("own" if own else "reference", path, store, (*said, *store.headers), "fp32")


def _plan(source: Source) -> Plan | None:
    """Return the plan that is kept, or a new one, which is kept then; None if there can be none."""
    key = key_of((source.kind.encode(), *source.said))
    plan = recall(key)
    if plan is not None and plan.fits(source.store):
        return plan
    from polyformer.loaded.planned import plan_at

    try:
        plan = plan_at(source.kind, source.place, source.store)
    except (SpecError, WeightsError) as error:  # whoever loads the model says what is wrong with it
        log.info("%s has no plan: %s", source.place, error)
        return None
    if plan is not None:
        keep(key, plan)
    return plan


def _tokenizer(source: Source) -> TextTokenizer | None:
    if not isinstance(source.store, GgufFile):
        return tokenizers_at(source.place).text
    from polyformer.data.checkpoint_tokenizer import TextTokenizer

    return TextTokenizer.from_gguf(source.store.metadata)
