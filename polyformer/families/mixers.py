"""What lets rows meet in a small model, by name: kernels of attention, rules, and parts in attention's place.

A kernel needs no entry here: it is named by its type, `"tiled"` for `Tiled`, or written out as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from polyformer import parts
from polyformer.errors import SpecError, suggest
from polyformer.spec import Record, Spec

Choice = str | parts.Rule | Spec


class Sizes(NamedTuple):
    """What is known of a model: its width, its heads, and the longest sequence if there is one."""

    width: int
    heads: int
    length: int | None = None

    def longest(self, name: str) -> int:
        """Return the longest sequence; raises `SpecError` in the name of what needs it if there is none."""
        if self.length is None:
            raise SpecError(f"'{name}' needs to know the longest sequence; set the model's length")
        return self.length


def _gate(sizes: Sizes, see: parts.Rule) -> Spec:
    """Return gMLP's gated unit, twice as wide inside as the model (Liu et al. 2021, section 2)."""
    hidden = 2 * sizes.width
    gate = parts.SpatialGating.of_width(hidden, sizes.longest("gmlp"), see)
    steps = (parts.Linear(sizes.width, hidden), parts.Activate("gelu"), gate, parts.Linear(sizes.width, sizes.width))
    return parts.Chain(steps)


def _chunks(sizes: Sizes, name: str) -> parts.Chunks:
    """Return chunks of 64 rows, or of a quarter of a shorter longest text, each of which looks at the one before."""
    return parts.Chunks(max(1, min(64, sizes.longest(name) // 4)))


def _hashing(sizes: Sizes, see: parts.Rule) -> Spec:
    heads = parts.Heads.of_width(sizes.width, sizes.heads)
    return parts.Hashing.of_width(sizes.width, heads, _chunks(sizes, "lsh"), see)


def _local(sizes: Sizes, see: parts.Rule) -> Spec:
    return attention(parts.Local(_chunks(sizes, "local")), sizes, see)


def _window(sizes: Sizes, see: parts.Rule) -> Spec:
    return attention(parts.Window(max(1, sizes.longest("window") // 4)), sizes, see)


NAMED: Mapping[str, Callable[[Sizes, parts.Rule], Spec | None]] = {
    "none": lambda sizes, see: None,
    "window": _window,
    "retention": lambda sizes, see: parts.Retention.of_width(sizes.width, sizes.heads, see, sizes.width),
    "gmlp": _gate,
    "lsh": _hashing,
    "local": _local,
}
"""What is no kernel, and what it is in a model of some sizes under a rule.

Retention has as many values as the model is wide, so that it is not much larger than attention.
"""

NICKNAMES: Mapping[str, str] = {
    "linear": "linearattention",
    "retnet": "retention",
    "reformer": "lsh",
    "hashing": "lsh",
    "aft": "attentionfree",
}
"""Other names of the same."""

WINDOWED: parts.Kernel = parts.Sliding()
"""The kernel under a window that is named in place of one."""


def mixer(choice: Choice, sizes: Sizes, see: parts.Rule) -> Spec | None:
    """Return what stands in a block for rows to meet; None for "none".

    Args:
        choice: a name; a rule, such as `Window(64)`, for softmax attention under it; a kernel, whose open sizes are
            filled in; or a whole part in attention's place.
        see: what all rows may look at.
    Raises:
        SpecError: no such name, a rule that the part can't follow, sizes that don't fit.
    """
    if isinstance(choice, str):
        found = named(choice)
        if callable(found):
            return found(sizes, see)
        choice = found
    if isinstance(choice, parts.Rule | parts.Kernel):
        return attention(choice, sizes, see)
    return choice


def attention(choice: parts.Rule | parts.Kernel, sizes: Sizes, see: parts.Rule) -> parts.Attention:
    """Return attention under a further rule, or with a kernel."""
    heads = parts.Heads.of_width(sizes.width, sizes.heads)
    plain = parts.Attention.of_width(sizes.width, sizes.heads, parts.Everyone())
    if isinstance(choice, parts.Rule):
        kernel = WINDOWED if isinstance(choice, parts.Window) else parts.Softmax()
        return plain.replace(see=see & choice, kernel=kernel)
    return plain.replace(see=see, kernel=choice.fitted(heads.width, sizes.length))


def named(said: str) -> parts.Kernel | Callable[[Sizes, parts.Rule], Spec | None]:
    """Return the kernel of a name with its defaults, or how what is no kernel is made.

    Raises:
        SpecError: there is none; the nearest names are told. Or it is a kernel that has no defaults.
    """
    name = _squeezed(said)
    name = NICKNAMES.get(name, name)
    if name in NAMED:
        return NAMED[name]
    kernels = kernel_names()
    if name not in kernels:
        raise SpecError(f"there is no attention '{said}'{suggest(said, [*NAMED, *NICKNAMES, *kernels])}")
    try:
        return kernels[name]()
    except TypeError:
        written = f'{{type = "{kernels[name].__name__}", …}}'
        raise SpecError(f"'{name}' needs values that only you can choose; write it out: {written}") from None


def kernel_names() -> dict[str, type[parts.Kernel]]:
    """Return the kernels that there are, by the names of their types in small letters."""
    found = (cls for cls in list(Record.registry.values()) if issubclass(cls, parts.Kernel) and not cls.abstract)
    return {_squeezed(cls.__name__): cls for cls in found}


def _squeezed(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")
