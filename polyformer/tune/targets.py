"""Which parts of a model a pattern means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from polyformer.errors import SpecError
from polyformer.parts import Adapted, Affine, Experts, Transformer
from polyformer.spec import Spec, walk

ALL_LINEAR = "all linear"
"""Every matrix in the encoder, the decoder and between them, but no router, no head and no embedding."""

INNER = ("encoder.", "decoder.", "bridge.")


def bases(spec: Transformer) -> dict[str, Spec]:
    """Return the matrices that adapters can stand beside, by path; one that has some already by the path of both."""
    found: dict[str, Spec] = {}
    for path, record in walk(spec):
        above = path.rpartition(".")[0]
        if isinstance(record, Adapted):
            found[path] = record.base
        elif isinstance(record, Affine) and not any(f"{above}.".startswith(f"{one}.") for one in found):
            found[path] = record
    return {path: record for path, record in found.items() if isinstance(record, Affine)}


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that a pattern means.

    It is a path, or the end of one from a dot on, such as "q" or "op.q"; `*` stands for anything:
    "decoder.blocks.3.*".
    """
    return [path for path in paths if fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")]


def targets(spec: Transformer, patterns: Sequence[str]) -> list[str]:
    """Return the paths of the matrices that patterns mean, in the order of the model.

    Raises:
        SpecError: a pattern that matches none; it names near ones.
    """
    known = bases(spec)
    routers = {f"{path}.router" for path, record in walk(spec) if isinstance(record, Experts)}
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
