"""The picture is whole or not there, and its labels don't cover each other."""

from __future__ import annotations

import builtins
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyformer.bench import DENSE, draw_curves, picture_file
from polyformer.bench.picture import shown, spread
from polyformer.errors import RunError
from tests.bench.test_attention import curves


@given(st.lists(st.floats(0, 1), max_size=20))
def test_labels_have_room(wanted: list[float]) -> None:
    found = spread(wanted, 0.04, 0.0, 1.0)
    placed = sorted(zip(wanted, found, strict=True))
    assert all(b - a > 0.04 - 1e-9 for a, b in itertools.pairwise(sorted(found)))
    assert all(0 - 1e-9 <= place <= 1 + 1e-9 for place in found)
    assert all(a[1] < b[1] for a, b in itertools.pairwise(placed) if a[0] < b[0])


def test_labels_with_room_stay() -> None:
    assert spread([0.5, 0.1, 0.9], 0.05, 0, 1) == [0.5, 0.1, 0.9]
    assert spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert spread([], 0.1, 0, 1) == []


@pytest.mark.parametrize(
    ("cost", "quantity", "told"),
    [
        (0.00325, "seconds", "3.25 ms"),
        (12.34, "seconds", "12.3 s"),
        (0.0001234, "seconds", "123 µs"),
        (1e-8, "seconds", "1e-08 s"),
        (68_200_000, "bytes", "68.2 MB"),
        (999_999, "bytes", "1.00 MB"),
        (4_300_000_000, "bytes", "4.30 GB"),
        (100, "bytes", "100 B"),
    ],
)
def test_costs_are_written_as_a_person_would(cost: float, quantity: Any, told: str) -> None:
    assert shown(cost, quantity) == told


@pytest.mark.parametrize(
    "costs",
    [
        {DENSE: {512: 1.0, 1024: 4.0, 2048: 16.0}, "performer": {512: 2.0, 1024: 4.0, 2048: 8.0}},
        {DENSE: {512: 1.0, 1024: 4.0}, "performer": {512: 2.0}},
        {DENSE: {512: 1.0}},
        {DENSE: {}},
    ],
)
def test_it_is_drawn(costs: dict[str, dict[int, float]]) -> None:
    from PIL import Image

    if not costs[DENSE]:
        found = curves({DENSE: {512: 1.0}})
        found = type(found)(found.settings, found.contestants, (), found.machine)
    else:
        found = curves(costs)
    image = Image.open(io.BytesIO(draw_curves(found)))
    assert image.size == (1950, 1560)


class TestFile:
    def test_it_takes_its_place_when_written(self, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        with picture_file(file) as out:
            assert not file.exists()
            out.write(b"picture")
        assert file.read_bytes() == b"picture"
        assert list(tmp_path.iterdir()) == [file]

    def test_a_failure_leaves_what_was_there(self, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        file.write_bytes(b"old")

        def interrupted() -> None:
            with picture_file(file, replace=True) as out:
                out.write(b"half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert file.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [file]

    def test_errors_of_what_is_drawn_are_its_own(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), picture_file(tmp_path / "a.png"):
            Path("nowhere/at all").read_bytes()

    def test_what_can_not_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "b.png").write_bytes(b"old")
        (tmp_path / "c.png").mkdir()
        for file, told in (
            (tmp_path / "a.jpg", "its name should end in .png, not 'a.jpg'"),
            (tmp_path / "b.png", "b.png exists; replace it with --force"),
            (tmp_path / "c.png", "c.png is a folder"),
            (tmp_path / "no" / "a.png", "a.png can't be written: No such file or directory"),
            (tmp_path / "b.png" / "a.png", "a.png can't be written: Not a directory"),
        ):
            with pytest.raises(RunError, match=told), picture_file(file):
                pytest.fail("nothing should be measured")

    def test_without_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def without(name: str, *rest: Any) -> Any:
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", without)
        told = r"drawing needs matplotlib; install it with: pip install 'polyformer\[plot\]'"
        with pytest.raises(RunError, match=told), picture_file(tmp_path / "a.png"):
            pytest.fail("nothing should be measured")
        with pytest.raises(RunError, match=told):
            draw_curves(curves({DENSE: {512: 1.0}}))
        assert not list(tmp_path.iterdir())
