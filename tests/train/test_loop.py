"""The loop: accumulation, averages, clipping, gradients that are not finite, early stopping, and learning itself."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polyformer.data import Batch, Batches, BatchRecipe, PairTokenizer, TokenizerRecipe, encode_pairs, prepare
from polyformer.errors import RunError
from polyformer.parts import Attention, Experts, FeedForward, Performer, RouterLosses, Trace, routing_loss
from polyformer.parts.model import TransformerPart
from polyformer.spec import Record, rewrite
from polyformer.train.averages import Ema, LastCheckpoints, weights_of
from polyformer.train.checkpoints import Training, restore_checkpoint
from polyformer.train.journal import Journal, read_metrics
from polyformer.train.loop import Company, accumulate, candidate, run, using
from polyformer.train.objectives import batch_loss
from polyformer.train.optimisers import AdamW, clip_gradients
from polyformer.train.recipe import Recipe, TrainRecipe
from polyformer.train.schedules import Constant, Steps
from tests.train.toy import recipe as toy_recipe
from tests.train.toy import write_corpus


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return toy_recipe(write_corpus(tmp_path_factory.mktemp("corpus") / "toy.tsv"))


@pytest.fixture(scope="module")
def data(toy: Recipe) -> tuple[Batches, Batches, PairTokenizer]:
    splits = prepare(toy.data)
    tokenizer = PairTokenizer.train(splits.train, TokenizerRecipe(vocabulary=120))
    made = [Batches(encode_pairs(tokenizer, p, toy.batch), toy.batch) for p in (splits.train, splits.validation)]
    return made[0], made[1], tokenizer


def build(toy: Recipe, tokenizer: PairTokenizer, dropout: float = 0.0) -> TransformerPart:
    torch.manual_seed(0)
    sizes = {"source_vocabulary": tokenizer.source_vocabulary, "target_vocabulary": tokenizer.target_vocabulary}
    model = toy.model.replace(dropout=dropout, **sizes).spec().build()
    assert isinstance(model, TransformerPart)
    return model.train()


def gradients(model: TransformerPart) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sparse(model: TransformerPart, losses: RouterLosses | None) -> TransformerPart:
    """Return a new model like this one with experts in place of its feed-forward networks."""

    def change(path: str, record: Record) -> Record:
        return Experts.of(record, 32, 4, 2).replace(losses=losses) if isinstance(record, FeedForward) else record

    torch.manual_seed(0)
    made = rewrite(model.spec, change).build()
    assert isinstance(made, TransformerPart)
    return made.train()


def rows_of(batch: Batch, rows: slice) -> Batch:
    labels = batch.labels[rows]
    return Batch(
        batch.input_ids[rows],
        batch.attention_mask[rows],
        batch.decoder_input_ids[rows],
        batch.decoder_attention_mask[rows],
        labels,
        int((labels >= 0).sum()),
        batch.rows[rows],
    )


def test_accumulated_is_the_same_as_one_batch(toy: Recipe, data: tuple[Batches, Batches, PairTokenizer]) -> None:
    """Two halves with very different numbers of tokens give the gradients of the whole, to rounding."""
    whole = next(iter(data[0].in_order()))
    longest = list(data[0].in_order())[-1]
    model = build(toy, data[2]).double()
    count = max(whole.input_ids.shape[1], longest.input_ids.shape[1])
    assert whole.target_tokens != longest.target_tokens
    accumulate(model, [whole, longest], toy.train)
    apart = gradients(model)
    model.zero_grad()

    pad = {"input_ids": 0, "attention_mask": False, "decoder_input_ids": 0, "decoder_attention_mask": False}
    width = max(whole.labels.shape[1], longest.labels.shape[1])

    def joined(name: str, fill: int) -> Tensor:
        size = count if name in ("input_ids", "attention_mask") else width
        parts = [getattr(b, name) for b in (whole, longest)]
        return torch.cat([torch.nn.functional.pad(p, (0, size - p.shape[1]), value=fill) for p in parts])

    fields = [joined(name, fill) for name, fill in {**pad, "labels": -100}.items()]
    one = Batch(*fields, whole.target_tokens + longest.target_tokens, whole.rows)
    accumulate(model, [one], toy.train)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, apart[name], rtol=0, atol=1e-12, msg=name)


def test_mean_of_means_would_be_another_gradient(toy: Recipe, data: tuple[Batches, Batches, PairTokenizer]) -> None:
    """The test above could fail: weighing each batch the same gives something else."""
    batch = next(iter(data[0].in_order()))
    model = build(toy, data[2])
    small, large = rows_of(batch, slice(0, 1)), rows_of(batch, slice(1, None))
    accumulate(model, [small, large], toy.train)
    right = gradients(model)
    model.zero_grad()
    for part in (small, large):
        accumulate(model, [part], toy.train)
    assert any((gradient / 2 - right[name]).abs().max() > 1e-3 for name, gradient in gradients(model).items())


def test_clipping_scales_to_the_limit_and_tells_the_norm_before() -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    assert clip_gradients(model, None) == 5.0
    assert clip_gradients(model, 1.0) == 5.0
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.0, 0.8]]), rtol=1e-5, atol=0)
    assert clip_gradients(model, 2.0) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.0, 0.8]]), rtol=1e-5, atol=0)


def test_only_matrices_decay() -> None:
    optimiser = AdamW(decay=0.1).build(torch.nn.Linear(3, 2))
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in optimiser.param_groups] == [
        (0.1, [2]),
        (0.0, [1]),
    ]


def test_last_checkpoints_is_the_mean_of_the_last_few() -> None:
    model = torch.nn.Linear(1, 1)
    average = LastCheckpoints(2).start()
    assert average.weights() is None
    for value in (1.0, 2.0, 4.0):
        torch.nn.init.constant_(model.weight, value)
        average.mark(model)
    held = average.weights()
    assert held is not None
    assert held["weight"].item() == 3.0
    again = LastCheckpoints(2).start()
    again.restore(average.tensors())
    restored = again.weights()
    assert restored is not None
    assert restored["weight"].item() == 3.0


def test_ema_follows_its_formula_and_forgets_its_start() -> None:
    model = torch.nn.Linear(1, 1)
    average = Ema(0.9).start()
    held = 0.0
    for step in range(200):
        value = float(step % 7)
        torch.nn.init.constant_(model.weight, value)
        average.step(model)
        decay = min(0.9, (1 + step) / (10 + step))
        held = value if step == 0 else decay * held + (1 - decay) * value
    found = average.weights()
    assert found is not None
    assert found["weight"].item() == pytest.approx(held, rel=1e-5)


def test_using_puts_the_own_weights_back_whatever_happens() -> None:
    model = torch.nn.Linear(2, 2)
    before = {name: t.detach().clone() for name, t in weights_of(model).items()}

    def fail() -> None:
        with using(model, {"weight": torch.zeros(2, 2)}):
            assert not model.weight.any()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    for name, tensor in weights_of(model).items():
        assert tensor.equal(before[name])


def start(
    toy: Recipe, data: tuple[Batches, Batches, PairTokenizer], settings: TrainRecipe, folder: Path
) -> tuple[Training, Company]:
    model = build(toy, data[2])
    batches = Batches(data[0].data, toy.batch)
    average = None if settings.average is None else settings.average.start()
    training = Training(model, settings.optimiser.build(model), batches, average)
    return training, Company(folder / "checkpoints", Journal(folder / "metrics.jsonl"), data[1])


def go(training: Training, settings: TrainRecipe, company: Company) -> str:
    try:
        return run(training, settings, company)
    finally:
        company.journal.close()


def test_a_gradient_that_is_not_finite_stops_before_the_step(
    toy: Recipe, data: tuple[Batches, Batches, PairTokenizer], tmp_path: Path
) -> None:
    settings = toy.train.replace(budget=Steps(5))
    training, company = start(toy, data, settings, tmp_path)
    with torch.no_grad():
        training.model.get_parameter("decoder.blocks.0.steps.0.op.q.weight")[0, 0] = math.nan
    before = {name: t.detach().clone() for name, t in weights_of(training.model).items()}
    with pytest.raises(RunError, match="not finite at step 1"):
        go(training, settings, company)
    for name, tensor in weights_of(training.model).items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_bad_steps_can_be_skipped_and_are_counted(
    toy: Recipe, data: tuple[Batches, Batches, PairTokenizer], tmp_path: Path
) -> None:
    settings = toy.train.replace(budget=Steps(3), not_finite="skip", evaluations=1, average=None)
    training, company = start(toy, data, settings, tmp_path)
    calls = 0

    def poison(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gradient * math.nan if calls == 2 else gradient

    training.model.get_parameter("encoder.blocks.0.steps.0.op.q.weight").register_hook(poison)
    assert go(training, settings, company) == "budget"
    assert (training.state.steps, training.state.skipped) == (3, 1)
    assert all(torch.isfinite(t).all() for t in weights_of(training.model).values())


def test_early_stopping_goes_back_to_the_best_weights(
    toy: Recipe, data: tuple[Batches, Batches, PairTokenizer], tmp_path: Path
) -> None:
    """A rate that is far too high makes validation worse; the run ends, and the best state is kept."""
    settings = toy.train.replace(
        budget=Steps(400), evaluations=100, patience=3, schedule=Constant(peak=0.3), average=None, clip=0.0
    )
    training, company = start(toy, data, settings, tmp_path)
    assert go(training, settings, company) == "early"
    losses = [row["validation_loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if "validation_loss" in row]
    assert len(losses) < 100
    assert training.state.best == min(losses)
    assert losses.index(min(losses)) == len(losses) - 4
    assert training.best.keys() == weights_of(training.model).keys()


def test_it_learns(toy: Recipe, data: tuple[Batches, Batches, PairTokenizer], tmp_path: Path) -> None:
    """In 400 steps the toy language is learnt: the held-out loss falls below a fifth of where it began."""
    settings = toy.train.replace(budget=Steps(400), smoothing=0.0, evaluations=4, average=Ema(0.95))
    training, company = start(toy, data, settings, tmp_path)
    go(training, settings, company)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert held_out[-1] < rows[0]["loss"] / 5
    assert candidate(training)


def test_metrics_tell_tokens_and_rate(
    toy: Recipe, data: tuple[Batches, Batches, PairTokenizer], tmp_path: Path
) -> None:
    settings = toy.train.replace(budget=Steps(8), log_every=4, evaluations=2)
    training, company = start(toy, data, settings, tmp_path)
    go(training, settings, company)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [4, 8]
    again = Batches(data[0].data, BatchRecipe(**vars(toy.batch)))
    assert rows[-1]["tokens"] == sum(next(again).target_tokens for _ in range(8))
    assert rows[0]["learning_rate"] == pytest.approx(settings.schedule.rate(4, 3 / 8))
    assert rows[1]["share"] == 1.0


def test_the_losses_of_routers_are_part_of_the_objective(
    toy: Recipe, data: tuple[Batches, Batches, PairTokenizer]
) -> None:
    """Each token adds them; the likelihood is that of the tokens alone."""
    batches, _, tokenizer = data
    batch, dense = next(batches), build(toy, tokenizer)
    model, plain = sparse(dense, RouterLosses(0.5, 0.1)), sparse(dense, None)
    found, without = batch_loss(model, batch, 0.1), batch_loss(plain, batch, 0.1)
    trace = Trace(wants=frozenset(("routing",)))
    memory = model.encode(batch.input_ids, batch.attention_mask, trace=trace)
    model.decode(batch.decoder_input_ids, batch.decoder_attention_mask, memory, trace=trace)
    assert len(trace.routing) == 2
    torch.testing.assert_close(found.objective, without.objective + batch.target_tokens * routing_loss(trace))
    assert torch.equal(found.likelihood, without.likelihood)
    found.objective.backward()
    without.objective.backward()
    routers = [name for name in gradients(model) if "router" in name]
    assert routers
    assert all(not torch.allclose(gradients(model)[name], gradients(plain)[name]) for name in routers)


def test_random_features_are_drawn_anew_between_steps(
    toy: Recipe, data: tuple[Batches, Batches, PairTokenizer], tmp_path: Path
) -> None:
    """After every third step, also in a run that is resumed in between; and no average is made of them."""

    def change(path: str, record: Record) -> Record:
        return record.replace(kernel=Performer(8, 16, redraw_every=3)) if isinstance(record, Attention) else record

    def ready(folder: Path) -> tuple[Training, Company, list[Tensor]]:
        folder.mkdir(exist_ok=True)
        training, company = start(toy, data, settings, folder)
        torch.manual_seed(1)
        made = rewrite(training.model.spec, change).build()
        assert isinstance(made, TransformerPart)
        training.model, training.optimiser = made, settings.optimiser.build(made)
        features: list[Tensor] = []
        projection = made.get_buffer("decoder.blocks.0.steps.0.op.kernel.projection")
        made.decoder.register_forward_pre_hook(lambda part, given: features.append(projection.clone()))
        return training, company, features

    settings = toy.train.replace(budget=Steps(7), schedule=Constant(1e-3), evaluations=1, average=Ema(0.9))
    undisturbed, company, features = ready(tmp_path / "one")
    go(undisturbed, settings, company)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(features[:7])] == [True, True, False] * 2
    first, company, _ = ready(tmp_path / "two")
    go(first, settings.replace(budget=Steps(4)), company)
    second, company, _ = ready(tmp_path / "two")
    assert restore_checkpoint(company.checkpoints, second)
    go(second, settings, company)
    wanted = weights_of(undisturbed.model)
    for name, tensor in weights_of(second.model).items():
        assert torch.equal(tensor, wanted[name]), name
    kept = candidate(second)
    assert len(kept) > 10
    assert not any("projection" in name for name in kept if "kernel" in name)
