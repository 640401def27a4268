"""Run as a program: save a folder again and again, killed -9 a little later each time; print what was found after.

Each line is JSON: [what stood under the name right after the kill, what after `recover`, what lies beside it after
one more save]. Python announces every file operation to an audit hook before it happens; there the kill comes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from polyformer.weights.folders import check_manifest, recover, staged_folder

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def write(final: Path, text: str) -> None:
    with staged_folder(final, replace=True) as stage:
        (stage / "inner").mkdir()
        for name in ("a", "inner/b"):
            (stage / name).write_text(text * 1000)


def seen(final: Path) -> str:
    if not final.exists():
        return "nothing"
    check_manifest(final)
    texts = {(final / name).read_text()[:3] for name in ("a", "inner/b")}
    return texts.pop() if len(texts) == 1 else "a mixture"


def killed_at(event: int, final: Path) -> bool:
    """Save "new" in a child that dies before its `event`-th change of the disk; return whether it died."""
    child = os.fork()
    if child == 0:
        left = event

        def hook(name: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if name in CHANGES:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        write(final, "new")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main(folder: Path, replacing: bool) -> None:
    died, event = True, 0
    while died:
        place = folder / str(event)
        place.mkdir()
        final = place / "run"
        if replacing:
            write(final, "old")
        died = killed_at(event, final)
        first = seen(final)
        recover(final)
        second = seen(final)
        write(final, "end")
        assert seen(final) == "end"
        print(json.dumps([first, second, sorted(os.listdir(place))]))
        event += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "replacing")
