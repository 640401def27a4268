"""Fetching, with small scripts in the place of pip, apt-get and dpkg-deb."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from polyformer.data import Gettext, LibreOfficeHelp, fetch
from polyformer.errors import DataError

from .makers import catalogue, wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "polyformer"


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_wheel_is_fetched_once_and_read(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = catalogue({"Open": "Öffnen"}).to_binary()
    made = wheel(tmp_path / "app-1.0-py3-none-any.whl", {"app/locale/de/LC_MESSAGES/app.mo": content})
    pip = script(tmp_path / "bin" / "python", f'echo "$@" >> {tmp_path}/calls; cp {made} .')
    monkeypatch.setattr(sys, "executable", str(pip))
    corpus = Gettext(packages=("App==1.0",))
    for _ in range(2):
        assert [pair[:2] for pair in corpus.pairs(("en-de",))] == [("Open", "Öffnen")]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].startswith("-m pip ")
    assert "--no-deps --only-binary=:all:" in calls[0]
    assert calls[0].endswith("App==1.0")
    assert [path.name for path in (cache / "wheels").iterdir()] == ["app-1.0"]


def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "touch half.whl; echo 'WARNING: x' >&2; echo 'ERROR: No matching distribution' >&2; exit 1"
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "bin" / "python", body)))
    with pytest.raises(
        DataError, match=r"app==1\.0 could not be fetched \(ERROR: No matching distribution\); .*--set 'data"
    ):
        fetch.wheel("app==1.0")
    assert list((cache / "wheels").iterdir()) == []
    script(tmp_path / "bin" / "python", "echo '/x/python: No module named pip' >&2; exit 1")
    with pytest.raises(DataError, match="No module named pip"):
        fetch.wheel("app==1.0")


def test_an_interrupted_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str], folder: Path, *_: str) -> None:
        (folder / "half.whl").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.wheel("app==1.0")
    assert list((cache / "wheels").iterdir()) == []


def test_of_two_processes_that_fetch_the_same_the_first_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(command: list[str], folder: Path, *_: str) -> None:
        (folder / "ours.whl").write_bytes(b"x")
        (cache / "wheels" / "app-1.0").mkdir()
        (cache / "wheels" / "app-1.0" / "theirs.whl").write_bytes(b"x")

    monkeypatch.setattr(fetch, "_run", both)
    assert fetch.wheel("app==1.0").name == "theirs.whl"
    assert [path.name for path in (cache / "wheels").iterdir()] == ["app-1.0"]


def test_a_debian_package_is_unpacked_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(
        DataError, match=r"libreoffice-help-de is a Debian package and this machine has no apt-get; or use"
    ):
        fetch.debian("libreoffice-help-de")
    script(tmp_path / "bin" / "apt-get", f"echo $3 >> {tmp_path}/calls; echo > $3_1_all.deb")
    body = "name=${2##*/}; case $name in *-de_*) l=de;; *) l=en-US;; esac; d=$3/usr/share/libreoffice/help/$l/text;"
    page = '<p id=\\"p\\">Text $l</p>'
    script(tmp_path / "bin" / "dpkg-deb", f'{body} /bin/mkdir -p $d; echo "{page}" > $d/a.html')
    for _ in range(2):
        assert [pair[:2] for pair in LibreOfficeHelp().pairs(("en-de",))] == [("Text en-US", "Text de")]
    assert (tmp_path / "calls").read_text().split() == ["libreoffice-help-de", "libreoffice-help-en-us"]
    assert list((cache / "debian" / "libreoffice-help-de").glob("*.deb"))


def test_an_unknown_debian_package_names_apt_get_update(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    script(tmp_path / "bin" / "apt-get", "echo 'E: Unable to locate package x' >&2; exit 100")
    script(tmp_path / "bin" / "dpkg-deb", "exit 0")
    with pytest.raises(
        DataError, match=r"\(E: Unable to locate package x\); run `apt-get update` and try again, or use"
    ):
        fetch.debian("libreoffice-help-de")


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"app==1\.0 can't be kept in .*file.*: Not a directory"):
        fetch.wheel("app==1.0")


def test_languages_without_help_pages_give_nothing() -> None:
    assert "zh" in LibreOfficeHelp().available()
    assert list(LibreOfficeHelp().pairs(("xx-yy",))) == []
