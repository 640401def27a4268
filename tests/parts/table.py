"""The table of parts: by how much each differs from itself, clause by clause of the invariance contract.

python -m tests.parts.table [--write docs/parts.md] [--without compiled]
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
from pathlib import Path

import torch

from polyformer.errors import SpecError
from polyformer.parts import CLAUSES, Differs, Refuses, contract_of
from polyformer.parts.contract import Clause
from polyformer.spec import Spec
from tests.parts.clauses import NotPosedError, allowed, measure
from tests.parts.subjects import EVERY, Subject, unable

WORK = re.compile(r"(?!The )(?:[A-Z][\w'-]+ )?[A-Z][\w'-]+(?: et al\.| and [A-Z][\w'-]+)? (?:19|20)\d\d")


def sources(part: type[Spec]) -> str:
    """Return the works that a part's docstring names."""
    text = " ".join(inspect.cleandoc(part.__doc__ or "").split())
    return "; ".join(dict.fromkeys(WORK.findall(text)))


def cell(subject: Subject, clause: Clause) -> str:
    """Return what is shown of one clause: the measured difference, or that it is refused or not posed."""
    clash = contract_of(subject.spec).get(clause)
    try:
        measured = measure(subject, clause)
    except NotPosedError:
        return "–"
    except SpecError:
        if clash is None or not isinstance(clash.term, Refuses):
            raise
        return "refused"
    shown = "0" if measured == 0 else f"{measured:.0e}"
    if clash is not None and isinstance(clash.term, Differs):
        return f"differs ({shown})"
    broken = measured > allowed(subject, clause, CLAUSES[clause].tolerance)
    return f"**{shown} BROKEN**" if broken else shown


def reasons() -> list[str]:
    """Return a line for each declaration, with the examples that it stands for."""
    said: dict[tuple[str, str], list[str]] = {}
    for subject in EVERY:
        for clause, clash in contract_of(subject.spec).items():
            kind = type(clash.term).__name__.lower()
            said.setdefault((clash.part, f"{kind}: {clash.term.why}"), []).append(clause)
    lines = [f"- `{part}`, {', '.join(dict.fromkeys(clauses))}: {why}." for (part, why), clauses in said.items()]
    told = [f"- `{type(kernel).__name__}` follows no {rule} rule." for kernel, rule in unable()]
    return sorted(lines) + told


def table(clauses: list[Clause]) -> str:
    """Return the page, in Markdown."""
    promises = [
        f"| {name} | {CLAUSES[name].meaning} | {CLAUSES[name].tolerance:.0e} |".replace("| 0e+00 |", "| 0 |")
        for name in clauses
    ]
    head = ["part", "source", *clauses]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for subject in EVERY:
        cells = (f"`{subject}`", sources(subject.part), *(cell(subject, clause) for clause in clauses))
        rows.append(f"| {' | '.join(cells)} |")
    meanings = ["| clause | both sides of it | tolerance |", "|---|---|---|", *promises]
    return "\n".join([HEAD, *meanings, "", *rows, "", "## What is declared, and why", "", *reasons()]) + "\n"


HEAD = """# Parts

Made by `python -m tests.parts.table --write docs/parts.md` from the code; don't edit.

Each part is put through the invariance contract: the same answer however its work is laid out. Shown is the largest
difference between both sides of a clause, of answers at real rows and of the gradients that they give the weights, as
a share of the largest value; in double precision but for "precision". "Refused" means an error that names the part and
the reason, "differs" another answer by the part's nature; both are declared beside the part (`Spec.breaks`), and the
tests hold every part to what it declares. "–" stands where a clause has no meaning, as padding has none for a picture.
"Compiled" is captured by Dynamo and lowered to the same operators (`aot_eager`), without code generation.
"""


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--without", choices=list(CLAUSES), action="append", default=[], metavar="CLAUSE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # or each break of a graph is told of
    text = table([clause for clause in CLAUSES if clause not in options.without])
    if options.write is None:
        print(text)
    else:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
