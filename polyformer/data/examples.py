"""What a model is tuned on: one example on each line of a file, of a kind that its keys tell.

A file holds examples of one kind. They are split so that what is asked for in one part is asked for in no other.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from polyformer.data.files import text_lines
from polyformer.data.split import Shares, hashed, hold_out, linked
from polyformer.errors import DataError, suggest

Kind = Literal["messages", "completion", "labelled", "pictured", "tagged", "related", "answered", "text"]

KEYS: Mapping[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "tagged": ("tokens", "tags"),
    "labelled": ("text", "label"),
    "pictured": ("image", "label"),
    "related": ("anchor", "positive"),
    "answered": ("source", "target"),
    "text": ("text",),
}
"""The keys by which a kind is told, the first that fits."""

OPTIONAL: Mapping[Kind, tuple[str, ...]] = {"messages": ("tools",), "related": ("negative",)}
COLUMNS: Mapping[Kind, tuple[str, str]] = {
    "labelled": ("text", "label"),
    "related": ("anchor", "positive"),
    "answered": ("source", "target"),
}
"""The kinds that a table of two columns can hold."""


class Example(NamedTuple):
    """One example: what it holds, by key, and where it stands ("chats.jsonl, line 7")."""

    data: Mapping[str, Any]
    where: str


@dataclass
class Examples:
    """The examples of a file.

    Attributes:
        kind: what they are.
        rows: the examples.
        unread: keys that stand there but mean nothing to this kind.
    """

    kind: Kind
    rows: list[Example]
    unread: tuple[str, ...] = ()


@dataclass
class ExampleSplits:
    """Examples in one part only; `duplicates` were left out."""

    kind: Kind
    train: list[Example]
    validation: list[Example]
    duplicates: int = 0
    unread: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.kind}: {len(self.train):,} to train on, {len(self.validation):,} to validate with"]
        if self.duplicates:
            lines.append(f"left out: {self.duplicates:,} the same as another")
        if self.unread:
            lines.append(f"not read: the keys {', '.join(self.unread)}")
        return "\n".join(lines + self.notes)


def read_examples(path: str | Path, columns: Kind = "labelled") -> Examples:
    """Read a file of examples: JSON Lines, or a table of two columns separated by a tab (`.tsv`).

    Args:
        columns: of which kind the examples of a table are.
    Raises:
        DataError: an empty file; a line that is no JSON object, of another kind than the first, or of no known kind;
            a value of the wrong kind. It names file and line.
    """
    kind: Kind | None = None
    first, rows, unread = "", list[Example](), dict[str, None]()
    for where, row in _table(path, columns) if Path(path).suffix == ".tsv" else _lines(path):
        own = _kind(row, where)
        if kind is None:
            kind, first = own, where
        if own != kind:
            raise DataError(f"{where} has {_named(own)}, but {first} has {_named(kind)}; one file holds one kind")
        _check(kind, row, where)
        read = (*KEYS[kind], *OPTIONAL.get(kind, ()))
        unread |= dict.fromkeys(key for key in row if key not in read)
        rows.append(Example({key: row[key] for key in read if row.get(key) is not None}, where))
    if kind is None:
        raise DataError(f"{path} has no examples: all its lines are blank")
    return Examples(kind, rows, tuple(unread))


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples as JSON Lines; `read_examples` reads them."""
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(example.data, ensure_ascii=False) + "\n")


def split_examples(examples: Examples, share: float, seed: int) -> ExampleSplits:
    """Hold out a share for validation, by hashes of what is asked.

    Examples that ask for the same, up to case and spaces, stay together (of related texts, those that share one), and
    equal examples are one.

    Raises:
        DataError: too few of them to hold some out.
    """
    found = {json.dumps(one.data, sort_keys=True, ensure_ascii=False): one for one in reversed(examples.rows)}
    rows = list(reversed(found.values()))
    groups = linked(rows, functools.partial(_asked, examples.kind), seed)
    few = (
        f"{len(rows):,} examples that ask for {len(groups):,} different things are too few to hold some out for "
        "validation; give more, or a file of its own for validation (data.held_out)"
    )
    train, validation, _ = hold_out(groups, Shares(share, 0.0, seed), few)
    for part in (train, validation):
        part.sort(key=lambda one: hashed(seed, (json.dumps(one.data, sort_keys=True, ensure_ascii=False),)))
    return ExampleSplits(examples.kind, train, validation, len(examples.rows) - len(rows), examples.unread)


def without(examples: Examples, held_out: Examples) -> ExampleSplits:
    """Take another file's examples for validation; what is asked there is not trained on.

    Raises:
        DataError: the files hold different kinds, or everything is asked there too.
    """
    if examples.kind != held_out.kind:
        raise DataError(
            f"{held_out.rows[0].where} has {_named(held_out.kind)}, but {examples.rows[0].where} "
            f"has {_named(examples.kind)}"
        )
    asked = {text for one in held_out.rows for text in _asked(examples.kind, one)}
    train = [one for one in examples.rows if not asked.intersection(_asked(examples.kind, one))]
    if not train:
        raise DataError("all examples to train on ask for what the held-out ones ask for, so none is left")
    notes = [f"left out: {len(examples.rows) - len(train):,} that ask for what a held-out one asks for"]
    some = notes if len(train) < len(examples.rows) else []
    return ExampleSplits(examples.kind, train, held_out.rows, 0, examples.unread, some)


def _lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in text_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: no valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f'{where} should be an object, such as {{"prompt": …, "completion": …}}')
        yield where, row


def _table(path: str | Path, columns: Kind) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in text_lines(path):
        if line.strip():
            cells, where = line.split("\t"), f"{path}, line {number}"
            if len(cells) != 2:
                names = " and ".join(COLUMNS[columns])
                raise DataError(f"{where} has {len(cells) - 1} tabs; {names} should be separated by one")
            yield where, dict(zip(COLUMNS[columns], cells, strict=True))


def _kind(row: Mapping[str, Any], where: str) -> Kind:
    for kind, keys in KEYS.items():
        if all(key in row for key in keys):
            return kind
    known = sorted({key for keys in KEYS.values() for key in keys})
    strange = next((key for key in row if key not in known), None)
    near = suggest(strange, known) if strange is not None and len(suggest(strange, known)) < 40 else ""
    kinds = "; ".join(" and ".join(keys) for keys in KEYS.values())
    raise DataError(f"{where} has the keys {', '.join(row) or 'of nothing'}{near}; an example has {kinds}")


def _named(kind: Kind) -> str:
    return " and ".join(KEYS[kind])


def _check(kind: Kind, row: Mapping[str, Any], where: str) -> None:
    """Raise for values of the wrong kind; what messages hold is seen when they are rendered."""
    texts = {"completion", "related", "answered", "text"}
    keys = (*KEYS[kind], *OPTIONAL.get(kind, ())) if kind in texts else ()
    keys = KEYS[kind][:1] if kind in ("labelled", "pictured") else keys
    for key in keys:
        if row.get(key) is not None and not isinstance(row[key], str):
            raise DataError(f"{where}: '{key}' should be text, not {type(row[key]).__name__}")
    missing = next((key for key in keys if key in KEYS[kind] and row[key] is None), None)
    if missing is not None:
        raise DataError(f"{where}: '{missing}' is null")
    if kind in ("labelled", "pictured") and not isinstance(row["label"], str | int):
        raise DataError(f"{where}: 'label' should be text or a whole number, not {type(row['label']).__name__}")
    if kind == "messages" and (not isinstance(row["messages"], list) or not row["messages"]):
        raise DataError(f"{where}: 'messages' should be a list of messages, each with a role and content")
    if kind == "tagged":
        _check_tags(row["tokens"], row["tags"], where)


def _check_tags(tokens: Any, tags: Any, where: str) -> None:
    if not isinstance(tokens, list) or not tokens or not all(isinstance(one, str) and one.strip() for one in tokens):
        raise DataError(f"{where}: 'tokens' should be a list of words")
    if not isinstance(tags, list) or not all(isinstance(one, str | int) for one in tags):
        raise DataError(f"{where}: 'tags' should be a list of tags, one for each of the tokens")
    if len(tokens) != len(tags):
        raise DataError(f"{where} has {len(tokens)} tokens, but {len(tags)} tags")


def _asked(kind: Kind, example: Example) -> list[tuple[str, ...]]:
    """Return what an example asks, folded: examples that share one of these belong together."""
    return [(_folded(text),) for text in ASKED[kind](example.data)]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _first_words(data: Mapping[str, Any]) -> list[str]:
    """Return what stands before the first answer of a conversation."""
    said = []
    for message in data["messages"]:
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            break
        said.append(str(message.get("content")) if isinstance(message, Mapping) else str(message))
    return ["\n".join(said)]


ASKED: Mapping[Kind, Callable[[Mapping[str, Any]], list[str]]] = {
    "messages": _first_words,
    "completion": lambda data: [data["prompt"]],
    "labelled": lambda data: [data["text"]],
    "pictured": lambda data: [data["image"]],
    "tagged": lambda data: [" ".join(data["tokens"])],
    "related": lambda data: [data["anchor"], data["positive"]],
    "answered": lambda data: [data["source"]],
    "text": lambda data: [data["text"]],
}
