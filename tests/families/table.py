"""The table of families: what each was measured to differ from the reference by.

python -m tests.families.table [--write docs/families.md]
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import torch

from polyformer.families import FAMILIES, Family
from tests.families.cases import CASES, Case
from tests.families.packages import PEERS, apart, without_eps
from tests.families.parity import load, mine, real, reference, theirs


def measure(case: Case) -> float:
    """Return the largest difference of any answer to a real token."""
    model, _ = reference(case)
    data = case.inputs()
    with torch.no_grad():
        found, wanted = real(mine(load(case).model, data), data), real(theirs(model, data), data)
    return max(float((found[name] - tensor).abs().max()) for name, tensor in wanted.items())


def code_lines(family: type[Family]) -> int:
    """Count the lines of the file that a family stands in."""
    return len(Path(inspect.getfile(family)).read_text(encoding="utf-8").splitlines())


def table() -> str:
    """Return the page, in Markdown."""
    worst: dict[str, float] = {}
    count: dict[str, int] = {}
    for case in CASES:
        family = load(case).family
        assert family is not None
        worst[family.model_type] = max(measure(case), worst.get(family.model_type, 0.0))
        count[family.model_type] = count.get(family.model_type, 0) + 1
    rows = [
        "| family | paper | file | lines | heads | tokenizer | checkpoints compared | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in sorted(FAMILIES, key=lambda one: one.model_type):
        name = family.model_type
        file = Path(inspect.getfile(family)).name
        heads = ", ".join(f"`{architecture}`" for architecture in family.architectures)
        measured = f"{worst[name]:.1e}" if name in worst else "not measured"
        numbers = (str(count.get(name, 0)), measured)
        cells = (f"`{name}`", family.paper, file, str(code_lines(family)), heads, family.tokenizer, *numbers)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([HEAD, *rows, PACKAGES, *packages()]) + "\n"


def packages() -> list[str]:
    """Return the rows of the second table."""
    rows = [
        "| family | package | kind | double precision | single precision | as the package is |",
        "|---|---|---|---|---|---|",
    ]
    for peer in PEERS:
        with without_eps():
            exact = [apart(peer), apart(peer, torch.float32)]
        shown = [f"{one:.1e}" for one in (*exact, apart(peer, noise=0.02))]
        rows.append(f"| {' | '.join((peer.family, peer.package, peer.kind, *shown))} |")
    return rows


HEAD = """# Families

Made by `make parity` from the registry; don't edit. Each checkpoint is random, saved by the reference library
(transformers) and read from disk here; compared are all answers (logits, hidden rows, pooled vectors) at real tokens,
in single precision, on padded batches of odd lengths. The same suite compares gradients, padding on the left, cached
and full passes, half precision, and that saved folders load in the reference to the same numbers.
"""

PACKAGES = """
Families that the reference library lacks are held against other packages, with their own tensors. Performer's adds
1e-4 to every feature and 1e-6 to sums of keys, which the first two columns leave out; the last has them, with weights
near their start. What is left in double precision is its tables of positions, which are in single.
"""


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    text = table()
    if options.write is None:
        print(text)
    else:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
