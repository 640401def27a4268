"""Folders that are saved whole or not at all, and a manifest by which damage is found.

A folder is written beside its place under a hidden name and renamed when it is complete and on the disk. To replace
one takes two renames, as no portable call exchanges folders:

1. `run` becomes `.run.replaced`, 2. the new folder becomes `run`, 3. `.run.replaced` becomes rubbish, which is removed.

A process killed before 1 leaves the old folder and rubbish, after 2 the new one and rubbish; between them no `run`
but the whole old folder as `.run.replaced`, which `recover` renames back whenever `run` is next read or written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from polyformer.errors import WeightsError
from polyformer.weights import strict_json

if sys.platform != "win32":
    import fcntl

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"

REMEDIES = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that you may write to",
    errno.ENOTEMPTY: "another process saved something there meanwhile",
}


@contextlib.contextmanager
def staged_folder(final: Path, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder to write into; at the end it becomes `final`, at once and with a manifest.

    Args:
        final: the folder to be; links are followed. Its parents are made.
        replace: whether a folder that stands there may be replaced; it must be empty or have been saved this way.
    Yields:
        the folder to write into, on the same disk as `final`.
    Raises:
        WeightsError: the place is taken, the disk full or not writable. Whatever stood there is whole, and what
            was written is gone; the same holds when the block under `with` raises.
    """
    final = Path(final).resolve()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        recover(final)
        _refuse_to_overwrite(final, replace)
        _remove_abandoned(final)
        stage = _hidden(final)
        stage.mkdir()
    except OSError as error:
        raise unsaved(final, error) from error
    lock = _lock(stage)
    try:
        yield stage
        _write_manifest(stage, ())
        _take_place(stage, final, replace)
    except OSError as error:
        raise unsaved(final, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def recover(folder: Path) -> None:
    """Undo or finish a replacement of `folder` that was cut off between its renames; else do nothing.

    Raises:
        WeightsError: the old folder stands aside and can't be renamed back.
    """
    folder = Path(folder).resolve()
    aside = _aside(folder)
    if not aside.is_dir():
        return
    if folder.exists():
        with contextlib.suppress(OSError):  # the folder is whole; what is left beside it harms nobody
            _discard(aside, folder)
        return
    try:
        aside.rename(folder)
    except OSError as error:
        raise WeightsError(f"{folder} stands aside as {aside.name} and can't be renamed: {error.strerror}") from error


def write_manifest(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Write `manifest.json`, the size and SHA-256 of every file below `folder`, and bring all to the disk.

    Args:
        leave_out: names directly in `folder`, of files or folders that the manifest shall not speak of.
    Raises:
        WeightsError: the disk is full or not writable.
    """
    try:
        _write_manifest(folder, leave_out)
    except OSError as error:
        raise unsaved(folder, error) from error


def _write_manifest(folder: Path, leave_out: Collection[str]) -> None:
    files = {}
    new = folder / f".{MANIFEST}{UNFINISHED}"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] in (MANIFEST, new.name, *leave_out):
            continue
        if path.is_file():
            files[name.as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _to_disk(path)
    new.write_text(json.dumps({"files": files}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _to_disk(new)
    new.replace(folder / MANIFEST)
    _to_disk(folder)


def check_manifest(folder: Path) -> None:
    """Compare every file that `manifest.json` lists with what it says; files that it does not list are free.

    Raises:
        WeightsError: there is no manifest, or a file is missing or differs; it names the file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise WeightsError(f"{folder} has no {MANIFEST}: its saving was not completed, or it is no folder of ours")
    files = strict_json.read(path).get("files")
    if not isinstance(files, dict):
        raise WeightsError(f"{path} lists no files; it is damaged")
    for name, told in files.items():
        file = member(folder, name)
        if not isinstance(told, dict) or not file.is_file():
            raise WeightsError(f"{folder} lacks {name}, which its {MANIFEST} lists; copy the folder again")
        size = file.stat().st_size
        if size != told.get("bytes"):
            raise WeightsError(f"{file} has {size} bytes, not {told.get('bytes')} as when it was saved; copy it again")
        if _sha256(file) != told.get("sha256"):
            raise WeightsError(f"{file} is damaged: its SHA-256 is not the one it was saved with; copy it again")


def member(folder: Path, name: str) -> Path:
    """Return the path of a file in `folder` that some index names, and refuse whatever would lead out of it.

    A link is followed as long as it stays inside. The one exception is a Hugging Face cache, whose snapshots are
    links to its `blobs`.

    Raises:
        WeightsError: an absolute name, `..`, or a link that leaves the folder.
    """
    pure = PurePosixPath(name)
    odd = not name or "\\" in name or "\0" in name or PureWindowsPath(name).drive
    if odd or pure.is_absolute() or ".." in pure.parts:
        raise WeightsError(f"{folder} names the file {name!r}, which is not inside the folder; refused")
    root, real = folder.resolve(), (folder / name).resolve()
    cached = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not cached:
        raise WeightsError(f"{folder / name} is a link out of its folder, to {real}; refused (copy the file instead)")
    return folder / name


def _refuse_to_overwrite(final: Path, replace: bool) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise WeightsError(f"{final} is a file; choose another name for the folder")
    empty = next(final.iterdir(), None) is None
    if not empty and not replace:
        raise WeightsError(f"{final} exists already; choose another name, or say that it may be replaced")
    if not empty and not (final / MANIFEST).is_file():
        raise WeightsError(f"{final} was not saved by polyformer and won't be replaced; remove it yourself first")


def _take_place(stage: Path, final: Path, replace: bool) -> None:
    if not replace or not final.exists():
        stage.rename(final)
        _to_disk(final.parent)
        return
    final.rename(_aside(final))
    try:
        stage.rename(final)
    except OSError:
        recover(final)
        raise
    _to_disk(final.parent)
    with contextlib.suppress(OSError):  # the new folder stands; `recover` will try again
        _discard(_aside(final), final)


def _discard(aside: Path, final: Path) -> None:
    """Remove the old folder under a name that `recover` never restores: removing is not done at once."""
    rubbish = _hidden(final)
    aside.rename(rubbish)
    shutil.rmtree(rubbish, ignore_errors=True)


def _remove_abandoned(final: Path) -> None:
    """Remove what killed processes left of their attempts to save `final`."""
    for stage in final.parent.glob(f".{_escaped(final.name)}.*{UNFINISHED}"):
        lock = _lock(stage)
        if lock is not None:
            shutil.rmtree(stage, ignore_errors=True)
            os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _lock(folder: Path) -> int | None:
    """Hold a folder until the handle is closed or the process ends, however it ends; None if it can't be held."""
    if sys.platform == "win32":
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _aside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.replaced"


def _hidden(folder: Path) -> Path:
    """A new name beside `folder` for what is being written or removed."""
    return folder.parent / f".{folder.name}.{secrets.token_hex(4)}{UNFINISHED}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file's or folder's content would survive a loss of power (Windows has no such call for both)."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unsaved(path: Path, error: OSError) -> WeightsError:
    """Return the error that says why a file or folder could not be saved, and what to do."""
    shown = re.sub(rf"\.([^/\\]+)\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}", r"\1", str(path))
    reason = error.strerror or str(error)
    remedy = REMEDIES.get(error.errno or 0, "see that the place exists and can be written to")
    return WeightsError(f"{shown} could not be saved: {reason}; {remedy}")
