"""Folders that are saved whole or not at all: killed, on a full disk, without permission, replaced, damaged."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polyformer.errors import WeightsError
from polyformer.weights import folders
from polyformer.weights.files import write_tensors
from polyformer.weights.folders import MANIFEST, check_manifest, member, recover, staged_folder, write_manifest

ROOT = Path(__file__).parents[2]


def write(final: Path, text: str, replace: bool = False) -> None:
    with staged_folder(final, replace) as stage:
        (stage / "inner").mkdir()
        (stage / "a").write_text(text)
        (stage / "inner" / "b").write_text(text)


def content(final: Path) -> set[str]:
    return {(final / name).read_text() for name in ("a", "inner/b")}


def test_a_folder_appears_at_once_and_with_its_manifest(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "run"
    with staged_folder(final) as stage:
        assert stage.parent == final.parent
        (stage / "a").write_text("x")
        assert not final.exists()
    assert sorted(os.listdir(final.parent)) == ["run"]
    told = json.loads((final / MANIFEST).read_text())["files"]
    assert told == {"a": {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}}
    (tmp_path / "plain").mkdir()
    assert final.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_replacing_is_asked_for(tmp_path: Path) -> None:
    final = tmp_path / "run"
    write(final, "old")
    with pytest.raises(WeightsError, match="exists already"):
        write(final, "new")
    assert content(final) == {"old"}
    write(final, "new", replace=True)
    assert content(final) == {"new"}
    assert os.listdir(tmp_path) == ["run"]


def test_what_was_not_saved_this_way_is_never_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(WeightsError, match="was not saved by polyformer"):
        write(home, "new", replace=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match="is a file"):
        write(tmp_path / "file", "new", replace=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "home"]
    assert (home / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_may_be_filled_and_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to("run")
    write(tmp_path / "latest", "new")
    assert content(tmp_path / "run") == {"new"}
    assert (tmp_path / "latest").is_symlink()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_everything_as_it_was(tmp_path: Path, error: BaseException) -> None:
    final = tmp_path / "run"
    write(final, "old")
    with pytest.raises(type(error)), staged_folder(final, replace=True) as stage:  # noqa: PT012
        (stage / "a").write_text("half")
        raise error
    assert content(final) == {"old"}
    assert os.listdir(tmp_path) == ["run"]


CALLS = ["mkdir", "fsync", "rename", "replace"]


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "you may write")])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", range(3))
def test_any_call_that_fails_leaves_the_old_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int, number: int, remedy: str
) -> None:
    final = tmp_path / "run"
    write(final, "old")
    real, calls = getattr(os, call), 0

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    found = None
    try:
        write(final, "new", replace=True)
    except WeightsError as error:
        found = str(error)
    monkeypatch.undo()
    assert found or call in ("mkdir", "rename") or calls <= after, "a parent that is there, or what is left to remove"
    assert found is None or (os.strerror(number) in found and remedy in found)
    recover(final)
    check_manifest(final)
    assert content(final) == ({"new"} if found is None else {"old"})
    write(final, "end", replace=True)
    assert os.listdir(tmp_path) == ["run"]


def write_tensors_into(final: Path) -> None:
    with staged_folder(final, replace=True) as stage:
        write_tensors(stage / "x.safetensors", {"a": torch.zeros(2**18)})


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        final = disk / "run"
        write(final, "old")
        with pytest.raises(WeightsError, match=r"run could not be saved: No space left on device; free some space"):
            write(final, "x" * 2**19, replace=True)
        with pytest.raises(WeightsError, match=r"/run/x\.safetensors could not be saved: No space left"):
            write_tensors_into(final)
        assert content(final) == {"old"}
        assert os.listdir(disk) == ["run"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from polyformer.errors import WeightsError\n"
        "from polyformer.weights.folders import staged_folder\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try:\n with staged_folder(Path(sys.argv[1])) as stage: pass\n"
        "except WeightsError as error: print(error)\n"
    )
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    done = subprocess.run(
        [sys.executable, "-c", program, locked / "run"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if "Permission" in done.stderr:
        pytest.skip("another user can't read this project")
    assert (
        done.stdout == f"{locked / 'run'} could not be saved: Permission denied; choose a place that you may write to\n"
    )
    assert os.listdir(locked) == []


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match=r"could not be saved: (Not a directory|File exists)"):
        write(tmp_path / "file" / "run", "new")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
@pytest.mark.parametrize("kind", ["replacing", "new"])
def test_killed_at_any_moment(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-m", "tests.weights.killed", str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    before = "old" if kind == "replacing" else "nothing"
    assert {first for first, _, _ in lines} == {"nothing", "new"} | {before}, "the moment between the renames is there"
    assert {second for _, second, _ in lines} == {before, "new"}
    assert lines[-1][:2] == ["new", "new"]
    assert all(beside == ["run"] for _, _, beside in lines), "nothing is left lying about"
    assert len(lines) > 8


def test_of_two_at_work_the_later_is_refused(tmp_path: Path) -> None:
    final = tmp_path / "run"
    later = staged_folder(final)
    stage = later.__enter__()
    write(final, "first")
    assert stage.is_dir(), "what another process is writing is not taken for rubbish"
    with pytest.raises(WeightsError, match="another process saved something there"):
        later.__exit__(None, None, None)
    assert content(final) == {"first"}
    assert os.listdir(tmp_path) == ["run"]


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    final = tmp_path / "run"
    write(final, "some text")
    check_manifest(final)
    (final / "notes.txt").write_text("files that the manifest does not list are free")
    check_manifest(final)
    file = final / "inner" / "b"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"inner/b is damaged"):
        check_manifest(final)
    file.write_bytes(data[:-1])
    with pytest.raises(WeightsError, match=r"inner/b has 8 bytes, not 9"):
        check_manifest(final)
    file.unlink()
    with pytest.raises(WeightsError, match=r"lacks inner/b"):
        check_manifest(final)
    (final / MANIFEST).write_text('{"files": {"../run/a": {}}}')
    with pytest.raises(WeightsError, match="not inside the folder"):
        check_manifest(final)
    (final / MANIFEST).write_text("{")
    with pytest.raises(WeightsError, match="is not JSON"):
        check_manifest(final)
    (final / MANIFEST).unlink()
    with pytest.raises(WeightsError, match=r"has no manifest\.json"):
        check_manifest(final)


def test_a_manifest_may_leave_out_and_be_written_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-1" / "x").write_text("1")
    (tmp_path / "a").write_text("1")
    (tmp_path / f".{MANIFEST}.unfinished").write_text("left by a kill")
    write_manifest(tmp_path, leave_out=("checkpoints",))
    assert set(json.loads((tmp_path / MANIFEST).read_text())["files"]) == {"a"}
    (tmp_path / "a").write_text("2")
    write_manifest(tmp_path, leave_out=("checkpoints",))
    check_manifest(tmp_path)


def test_a_manifest_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folders, "_to_disk", full)
    (tmp_path / "a").write_text("1")
    with pytest.raises(WeightsError, match="No space left on device; free some space"):
        write_manifest(tmp_path)


def test_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run", "old")
    monkeypatch.chdir(tmp_path / "run")
    recover(Path("."))
    write(Path("."), "new", replace=True)
    assert content(tmp_path / "run") == {"new"}


def test_members_stay_inside(tmp_path: Path) -> None:
    assert member(tmp_path, "a/b.txt") == tmp_path / "a/b.txt"
    with pytest.raises(WeightsError, match="not inside the folder"):
        member(tmp_path, "a/../../b")


def test_saving_needs_no_torch() -> None:
    program = "import sys, polyformer.weights.folders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
