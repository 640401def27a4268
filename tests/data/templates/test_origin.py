"""Strings that know what of them was said, against lists of letters each with its own mark."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyformer.data.templates import Text, said, spans
from polyformer.data.templates.origin import cut, join, pieces, replace, strip, whole

LETTERS = st.text(alphabet="ab <|>", max_size=8)
TEXTS = st.lists(st.tuples(LETTERS, st.booleans()), max_size=5).map(
    lambda parts: join([said(text) if was else text for text, was in parts])
)


def marks(text: str) -> list[bool]:
    """Which letters were said."""
    found = [False] * len(text)
    for start, stop in spans(text):
        assert 0 <= start < stop <= len(text)
        found[start:stop] = [True] * (stop - start)
    touching = zip(spans(text), spans(text)[1:], strict=False)
    assert all(a[1] < b[0] for a, b in touching), "spans are in order, and merged where they touch"
    return found


def letters(text: str) -> list[tuple[str, bool]]:
    return list(zip(text, marks(text), strict=True))


@given(st.lists(st.tuples(LETTERS, st.booleans()), max_size=5), TEXTS)
def test_joining_keeps_the_marks(parts: list[tuple[str, bool]], between: str) -> None:
    listed = [said(text) if was else text for text, was in parts]
    expected: list[tuple[str, bool]] = []
    for number, part in enumerate(listed):
        expected += (letters(between) if number else []) + letters(part)
    assert letters(join(listed, between)) == expected
    assert isinstance(join(listed, between), Text) == any(was for _, was in expected)


@given(TEXTS, st.integers(0, 30), st.integers(0, 30))
def test_cutting_keeps_the_marks(text: str, start: int, stop: int) -> None:
    assert letters(cut(text, start, max(start, stop))) == letters(text)[start : max(start, stop)]


@given(TEXTS, st.sampled_from([None, "a", " <", "b|"]), st.booleans(), st.booleans())
def test_stripping_keeps_the_marks(text: str, characters: str | None, left: bool, right: bool) -> None:
    found = strip(text, characters, left, right)
    plain = str(text).lstrip(characters) if left else str(text)
    assert found == (plain.rstrip(characters) if right else plain)
    start = len(text) - len(plain)
    assert letters(found) == letters(text)[start : start + len(found)]


@given(TEXTS, st.sampled_from([None, " ", "a", "<|", "ab"]), st.integers(-1, 3), st.booleans())
def test_splitting_keeps_the_marks(text: str, separator: str | None, most: int, from_the_right: bool) -> None:
    plain = str(text)
    parts = plain.rsplit(separator, most) if from_the_right else plain.split(separator, most)
    found = pieces(text, parts, len(separator or ""))
    assert found == parts
    at = 0
    for part in found:
        at = at if separator else plain.index(part, at)
        assert letters(part) == letters(text)[at : at + len(part)]
        at += len(part) + len(separator or "")


@given(TEXTS, st.sampled_from(["a", "<|", " ", "ab"]), TEXTS, st.integers(-1, 3))
def test_replacing_keeps_the_marks(text: str, old: str, new: str, count: int) -> None:
    found = replace(text, old, new, count)
    assert found == str(text).replace(old, new, count)
    expected, at, left = [], 0, count
    while at < len(text):
        if text.startswith(old, at) and left != 0:
            expected += letters(new)
            at, left = at + len(old), left - 1
        else:
            expected.append(letters(text)[at])
            at += 1
    assert letters(found) == expected


def test_what_cant_be_followed_counts_as_said_as_a_whole() -> None:
    mixed = join(["<|", said("x")])
    assert spans(whole(mixed.upper(), (mixed,))) == ((0, 3),)
    assert spans(whole("plain", ("a", "b"))) == ()
    assert [spans(one) for one in whole(["a", ""], (mixed,))] == [((0, 1),), ()]
    assert spans(replace(mixed, "", "-")) == ((0, 7),)
    assert type(str(mixed)) is str
    assert mixed == "<|x"
    assert {mixed: 1}["<|x"] == 1


@pytest.mark.parametrize("empty", ["", said("")])
def test_an_empty_text_was_said_by_nobody(empty: str) -> None:
    assert type(empty) is str
    assert spans(join([empty, empty])) == ()
