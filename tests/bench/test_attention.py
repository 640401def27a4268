"""Every contestant is what its line in the table says, and curves have all that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.bench import CONTESTANTS, DENSE, MODES, Cell, Conditions, Curves, HeadSizes, Settings, bench_attention
from polyformer.bench import attention as room
from polyformer.bench.contestants import KINDS, PATTERNS, At, Contestant, chosen
from polyformer.bench.memory import Memory
from polyformer.bench.work import Work, refusal
from polyformer.errors import SpecError
from polyformer.parts import Linear, Softmax
from polyformer.spec import walk

SMALL = HeadSizes(heads=2, head=16)
QUICK = Conditions(rounds=2, budget=100.0)
RUN = {name: one for name, one in CONTESTANTS.items() if name != "flex"}
"""Those that need no compiler, and that can be trained on a CPU."""

contestants = pytest.mark.parametrize("one", RUN.values(), ids=RUN)


def answer(one: Contestant, sizes: HeadSizes, length: int) -> Tensor:
    (found,) = Work(one, sizes, length).runs("forward")()
    return found


@contestants
class TestContestants:
    def test_the_line_is_whole(self, one: Contestant) -> None:
        assert one.kind in KINDS
        at, dense = At(2, 16, 300), CONTESTANTS[one.dense]
        assert dense.rule(at) == one.rule(at) == PATTERNS[one.pattern](at)
        assert isinstance(dense.make(at), Softmax)
        assert (one.linear is not None) == (one.kind in ("sparse", "linear"))

    @pytest.mark.parametrize("length", [1, 7, 300])
    def test_what_claims_to_be_softmax_is(self, one: Contestant, length: int) -> None:
        sizes = SMALL.replace(dtype="float64")
        found = answer(one, sizes, length)
        assert found.isfinite().all()
        if one.kind in ("dense", "exact", "sparse"):
            torch.testing.assert_close(found, answer(CONTESTANTS[one.dense], sizes, length))

    @pytest.mark.parametrize("level", ["kernel", "whole"])
    def test_it_runs_both_ways(self, one: Contestant, level: str) -> None:
        work = Work(one, SMALL.replace(level=level, batch=2), 40)
        (plain,) = work.runs("forward")()
        out, *slopes = work.runs("training")()
        assert not plain.requires_grad
        torch.testing.assert_close(out, plain)
        assert [slope.shape for slope in slopes] == [leaf.shape for leaf in work.leaves]
        assert all(slope.isfinite().all() for slope in slopes)

    def test_given_q_k_and_v_there_are_no_matrices(self, one: Contestant) -> None:
        work = Work(one, SMALL, 8)
        assert not [spec for _, spec in walk(work.part.spec) if isinstance(spec, Linear)]
        whole = Work(one, SMALL.replace(level="whole"), 8)
        assert sum(isinstance(spec, Linear) for _, spec in walk(whole.part.spec)) >= 3

    def test_what_is_forgotten_is_made_again(self, one: Contestant) -> None:
        work = Work(one, SMALL, 64)
        (before,) = work.runs("forward")()
        work.forget()
        (after,) = work.runs("forward")()
        assert torch.equal(before, after)


class TestChosen:
    def test_none_means_all(self) -> None:
        assert chosen(()) == list(CONTESTANTS.values())

    def test_what_they_are_compared_with_comes_too(self) -> None:
        assert [one.name for one in chosen(("linformer",))] == [DENSE, "sdpa-everyone", "linformer"]
        assert [one.name for one in chosen(("retention", "performer"))] == [DENSE, "performer", "retention"]

    def test_near_names_are_told(self) -> None:
        with pytest.raises(SpecError, match=r"there is no attention 'perfromer' to measure \(did you mean 'performer'"):
            chosen(("perfromer",))


class TestSettings:
    def test_lengths_are_put_in_order(self) -> None:
        assert Settings((64, 16, 64, 32)).lengths == (16, 32, 64)

    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda: Settings(()), "lengths must name at least one"),
            (lambda: Settings((16, 0)), "lengths must be at least 1, not 0"),
            (lambda: Settings((16,), ("nothing",)), "there is no attention 'nothing'"),
            (lambda: HeadSizes(heads=0), "heads, head and batch must be at least 1"),
            (lambda: HeadSizes(dtype="int8"), "dtype should be one of"),  # type: ignore[arg-type]
            (lambda: Conditions(rounds=0), "rounds must be at least 1, not 0"),
            (lambda: Conditions(budget=0), "budget must be above 0 seconds, not 0"),
            (lambda: Conditions(memory=-1), "memory must be above 0 gigabytes"),
            (lambda: Conditions(threads=0), "threads must be at least 1"),
        ],
    )
    def test_refused(self, make: Any, told: str) -> None:
        with pytest.raises(SpecError, match=told):
            make()

    def test_sizes_that_a_contestant_can_not_have(self) -> None:
        with pytest.raises(SpecError, match="can't be cut into 2 heads of even width"):
            Settings((8,), ("retention",), sizes=HeadSizes(2, 3))


class TestMeasuring:
    def test_every_cell_is_measured(self) -> None:
        told: list[int] = []
        settings = Settings((16, 8, 32), ("naive", "performer"), 8, SMALL, QUICK)
        found = bench_attention(settings, told.append)
        assert {(c.contestant, c.length, c.mode) for c in found.cells} == {
            (name, n, mode) for name in (DENSE, "naive", "performer") for n in (8, 16, 32) for mode in MODES
        }
        assert sum(told) == len(found.cells) == 18
        assert all(c.seconds and c.bytes is not None and c.times and not c.skipped for c in found.cells)
        fit = found.fit("naive", "forward", "bytes")
        assert fit is not None
        assert fit.points == 3
        assert set(found.ratios("naive", "training", DENSE)) == {8, 16, 32}

    def test_memory_grows_as_it_must(self) -> None:
        """Not time, which is as noisy as the machine."""
        settings = Settings((256, 512, 1024), ("naive", "linear-attention", "linformer"), 256, SMALL, QUICK)
        found = bench_attention(settings)
        for mode in MODES:
            naive, linear = (found.fit(name, mode, "bytes") for name in ("naive", "linear-attention"))
            assert naive is not None
            assert linear is not None
            assert naive.exponent > 1.8
            assert linear.exponent < 1.1
            scores = 4 * 2 * 1024**2
            assert 2 * scores < found.points("naive", mode, "bytes")[1024] < 4 * scores

    def test_what_takes_too_long_is_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ran: list[int] = []

        def watched(work: Any) -> Memory:
            ran.append(1)
            return Memory(10, 10, 1.0)

        monkeypatch.setattr(room, "memory_of", watched)
        found = bench_attention(Settings((16, 64), ("naive",), 8, SMALL, Conditions(rounds=1, budget=5.0)))
        late = [c for c in found.cells if c.length == 64]
        assert [c.skipped for c in late] == ["a run would take about 16 s, more than --budget 5"] * 4
        assert all(c.seconds is None and c.bytes is None for c in late)
        assert all(not c.skipped for c in found.cells if c.length == 16)
        assert len(ran) == 4 * 2 + 4

    def test_nothing_is_foretold_far(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What took a moment for a short text would seem to take hours for a long one."""
        tried: list[int] = []

        class Quick(Work):
            def __init__(self, one: Contestant, sizes: HeadSizes, length: int) -> None:
                super().__init__(one, sizes, 2)
                tried.append(length)

        monkeypatch.setattr(room, "Work", Quick)
        monkeypatch.setattr(room, "memory_of", lambda work: Memory(10, 10, 0.1))
        found = bench_attention(Settings((2, 300), (DENSE,), 8, SMALL, Conditions(rounds=1, budget=2.0)))
        assert not [c for c in found.cells if c.skipped]
        assert tried == [2, 2, 2, 2, 2, 2, *(2 * [8, 32, 128, 300])]

    def test_what_takes_too_much_memory_is_skipped(self) -> None:
        settings = Settings((16, 2048), ("naive", "sdpa-window-256"), 8, SMALL, QUICK.replace(memory=0.015))
        found = {(c.contestant, c.length, c.mode): c.skipped for c in bench_attention(settings).cells}
        assert not found[DENSE, 2048, "forward"]
        assert found["naive", 2048, "forward"].startswith("a run would take about 0.07")
        assert found["naive", 2048, "training"].endswith("GB of memory, more than the 0.015 GB there are")
        assert found["sdpa-window-256", 2048, "forward"].startswith("a run would take about 0.0")
        assert not found["naive", 16, "training"]

    def test_a_refusal_is_told_and_no_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuses(work: Any) -> Memory:
            raise SpecError("it has no backward pass on this device")

        monkeypatch.setattr(room, "memory_of", refuses)
        found = bench_attention(Settings((8,), (DENSE,), 8, SMALL, QUICK))
        assert {c.skipped for c in found.cells} == {"it has no backward pass on this device"}

    def test_faults_of_ours_are_not_hidden(self) -> None:
        assert refusal(MemoryError()) == "the system had not enough memory"
        assert "enough memory" in refusal(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
        assert refusal(RuntimeError('"x" not implemented for Half')).startswith("PyTorch can't: ")
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            refusal(RuntimeError("mat1 and mat2 shapes"))

    def test_threads_are_put_back(self) -> None:
        before = torch.get_num_threads()
        found = bench_attention(Settings((8,), (DENSE,), 8, SMALL, QUICK.replace(threads=2)))
        assert torch.get_num_threads() == before
        assert found.machine["threads"] == 2


def curves(costs: dict[str, dict[int, float]], **settings: Any) -> Curves:
    """Return curves of made-up costs, in seconds and bytes alike, forward only."""
    cells = [Cell(name, n, "forward", (cost,) * 3, int(cost)) for name, own in costs.items() for n, cost in own.items()]
    lengths = tuple(sorted({n for own in costs.values() for n in own}))
    machine = {"processor": "none", "threads": 1, "torch": "0"}
    return Curves(Settings(lengths, tuple(costs), **settings), tuple(chosen(tuple(costs))), tuple(cells), machine)


class TestCurves:
    def test_growth_crossing_and_ratios(self) -> None:
        lengths = (512, 1024, 2048, 4096, 8192)
        found = curves({DENSE: {n: n**2 / 1000 for n in lengths}, "performer": {n: 3.0 * n for n in lengths}})
        grows = found.fit("performer", "forward", "seconds")
        assert grows is not None
        assert (grows.exponent, grows.points) == (pytest.approx(1), 3)
        fitted, measured = found.crossing("performer", "forward")
        assert fitted == pytest.approx(3000)
        assert measured == 4096
        assert found.ratios("performer", "forward", DENSE)[8192] == pytest.approx(8192 / 3000)
        assert found.crossing("performer", "training") == (None, None)

    def test_one_length_has_no_growth(self) -> None:
        found = curves({DENSE: {4096: 2.0}, "performer": {4096: 1.0}})
        assert found.fit("performer", "forward", "seconds") is None
        assert found.crossing("performer", "forward") == (None, 4096)

    def test_the_median_counts(self) -> None:
        assert Cell("x", 8, "forward", (1.0, 100.0, 2.0)).seconds == 2.0
        assert Cell("x", 8, "forward", skipped="why").seconds is None
