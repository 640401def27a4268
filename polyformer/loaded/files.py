"""Loading and saving: which kind of folder or file it is."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from polyformer.errors import RunError, WeightsError
from polyformer.loaded.layouts import CONFIG, MODULES, SPEC
from polyformer.loaded.model import Loaded
from polyformer.loaded.own import load_own, read_own_spec, save_own
from polyformer.loaded.ready import ready_path
from polyformer.loaded.reference import load_reference, read_reference_family, save_reference
from polyformer.native.builder import LoweringError
from polyformer.native.kinds import Precision
from polyformer.native.library import required
from polyformer.native.lowering import lower
from polyformer.parts.model import Transformer
from polyformer.weights.files import read_tensors
from polyformer.weights.folders import recover, staged_folder


def load(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    pickled: bool = False,
) -> Loaded:
    """Load a model from a run folder of ours, a Hugging Face folder, or a GGUF file.

    The weights stay memory-mapped until they are used, and are in memory once.

    Args:
        path: the folder, or the file; or the name of a model that a package ships, such as "smollm2".
        device: where the model goes; the processor if None.
        dtype: of its floating-point tensors; as they are on disk if None (float32 where they are quantised there).
        pickled: read a folder's weights from a pickle, which is refused otherwise. Only plain tensors are taken
            from it, but a pickle from a source that you don't trust is better left alone.
    Raises:
        WeightsError: no such folder, damaged files, tensors missing, left over or of a wrong shape.
        SpecError: a configuration that is not understood in full.
    """
    path = ready_path(Path(path))
    recover(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        from polyformer.loaded.gguf import load_gguf

        return load_gguf(path, device, dtype)
    if not path.is_dir():
        raise _no_model(path)
    if (path / SPEC).exists():
        return load_own(path, device, dtype)
    if (path / CONFIG).exists() or (path / MODULES).exists():
        if pickled:
            from polyformer.weights.pickled import read_pickled

            return load_reference(path, device, dtype, read_pickled)
        return load_reference(path, device, dtype, read_tensors)
    raise _no_model(path)


def load_to_write(path: str | Path, weights: Precision | None = None) -> Loaded:
    """Load a model whose engine runs it natively, where that is compiled and the model has a program.

    Args:
        path: what `load` takes. Of a GGUF file no floats are made; the model can write and nothing else.
        weights: how matrices are held. If None: as a GGUF file stores them, and in single precision those of a
            folder; and what can't run natively runs in PyTorch.
    Raises:
        LoweringError, RunError: `weights` are named, but the model can't run natively.
        WeightsError, SpecError: as `load` does.
    """
    path = ready_path(Path(path))
    try:
        required()
        lower(read_spec(path))
    except (LoweringError, RunError) as error:
        if weights is not None:
            raise
        logging.getLogger("polyformer").info("%s runs in PyTorch: %s", path, error)
        return load(path)
    if path.is_file():
        from polyformer.loaded.gguf import open_gguf

        return open_gguf(path, weights or "as stored")
    loaded = load(path)
    loaded.native = weights or "fp32"
    return loaded


def _no_model(path: Path) -> WeightsError:
    if path.is_dir():
        return WeightsError(
            f"{path} holds no model: neither {SPEC} (a run folder) nor {CONFIG} (a Hugging Face folder)"
        )
    return WeightsError(f"{path} {'is a file; give the folder that holds it' if path.exists() else 'does not exist'}")


def read_spec(path: str | Path) -> Transformer:
    """Read what a model is made of, from whatever `load` takes or from a `spec.json` itself, without its weights.

    Of a published folder the names of its tensors are read too, where they are there: some parts show only in these.

    Raises:
        WeightsError, SpecError: as `load` does, as far as no weights are concerned.
    """
    path = ready_path(Path(path))
    if path.suffix.lower() == ".gguf" and path.is_file():
        from polyformer.loaded.gguf import read_gguf_family

        return read_gguf_family(path)[0].spec()
    own = path / SPEC if path.is_dir() else path
    if own.is_file():
        return read_own_spec(own)
    if (path / CONFIG).exists() or (path / MODULES).exists():
        return read_reference_family(path).spec()
    raise _no_model(path)


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
        write_into(loaded, stage)


def write_into(loaded: Loaded, folder: Path) -> None:
    """Write what `save` does into a folder that is there; who made the folder sees to it that it is complete."""
    if loaded.family is not None and loaded.family.spec() == loaded.spec:
        save_reference(loaded, loaded.family, folder)
    else:
        save_own(loaded, folder)
