"""Which parts of a model a pattern means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from polyformer.errors import SpecError
from polyformer.parts import Adapted, Affine, AfterPrefix, Experts, Transformer
from polyformer.spec import Record, children, walk

ALL_LINEAR = "all linear"
"""Every matrix in the encoder, the decoder and between them, but no router, no head and no embedding."""

INNER = ("encoder.", "decoder.", "bridge.")


def standing(spec: Transformer) -> dict[str, str]:
    """Return where each part stands, by the path that it would have in the model without adapters.

    A part with adapters stands where they do: at the path of the `Adapted` that holds it.
    """
    found: dict[str, str] = {}

    def visit(record: Record, path: str, plain: str) -> None:
        found.setdefault(plain, path)
        for name, child in children(record):
            inner = f"{path}.{name}" if path else name
            if isinstance(record, Adapted | AfterPrefix):
                if name == "base":
                    visit(child, inner, plain)
            else:
                visit(child, inner, f"{plain}.{name}" if plain else name)

    visit(spec, "", "")
    return found


def bases(spec: Transformer) -> dict[str, Affine]:
    """Return the matrices that adapters can stand beside, by path in the model without adapters."""
    known, found = dict(walk(spec)), dict[str, Affine]()
    for plain, path in standing(spec).items():
        record = known[path]
        base = record.base if isinstance(record, Adapted) else record
        if isinstance(base, Affine):
            found[plain] = base
    return found


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that a pattern means.

    It is a path, or the end of one from a dot on, such as "q" or "op.q", and means what is within, too: "blocks.3".
    `*` stands for anything.
    """
    wanted = [one + end for one in (pattern, f"*.{pattern}") for end in ("", ".*")]
    return [path for path in paths if any(fnmatchcase(path, one) for one in wanted)]


def targets(spec: Transformer, patterns: Sequence[str]) -> list[str]:
    """Return the paths of the matrices that patterns mean, in the order of the model.

    Raises:
        SpecError: a pattern that matches none; it names near ones.
    """
    known = bases(spec)
    records = dict(walk(spec))
    routers = {f"{plain}.router" for plain, path in standing(spec).items() if isinstance(records[path], Experts)}
    inner = [path for path in known if path.startswith(INNER) and path not in routers]
    found: set[str] = set()
    for pattern in patterns:
        own = inner if pattern == ALL_LINEAR else matching(pattern, known)
        if not own:
            raise SpecError(f"'{pattern}' matches no matrix of this model{nearest(pattern, known)}")
        found.update(own)
    if not patterns:
        raise SpecError(f"no targets are named; '{ALL_LINEAR}' means every matrix of the model's blocks")
    return [path for path in known if path in found]


def nearest(pattern: str, paths: Iterable[str]) -> str:
    """Return what may have been meant, as `" (did you mean 'q'?)"`, or else the last words of all paths."""
    endings = {path.split(".", i)[-1] for path in paths for i in range(path.count(".") + 1)}
    words = sorted({path.rpartition(".")[2] for path in paths})
    near = difflib.get_close_matches(pattern, sorted(endings, key=lambda one: (len(one), one)), n=3, cutoff=0.6)
    if near:
        return f" (did you mean {' or '.join(repr(one) for one in near)}?)"
    return f" (its matrices are called {', '.join(words)})" if words else ""
