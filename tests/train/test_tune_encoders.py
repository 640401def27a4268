"""Encoders and encoder–decoders tuned: the reference's losses, gradients and heads, and results that load there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from polyformer import load, save
from polyformer.data.examples import Example
from polyformer.data.labelled import ItemRows, fit, tag_labels
from polyformer.errors import DataError, PolyformerError
from polyformer.loaded.heads import has_head, with_head
from polyformer.parts import Chain, Linear, Mean, Normalise, Nth
from polyformer.parts.model import TransformerPart
from polyformer.train.aims import contrastive, label_loss
from polyformer.train.encoder_lessons import Relating, Tagging, span_f1, spans_of
from polyformer.train.objectives import batch_loss
from polyformer.train.run import train
from polyformer.train.tuning import Relate, TagWords, TuneRecipe
from tests.answer.models import bert
from tests.answer.test_images import SAID
from tests.train.test_texts import assert_same_run, train_until
from tests.train.toy import NOUNS, foreign
from tests.train.toy_tune import decoder, encoder_decoder, tune_recipe, write_jsonl

transformers = pytest.importorskip("transformers")

SHORT = {"budget": {"type": "Epochs", "count": 2}, "checkpoint_minutes": 0.0}
LONG = {"budget": {"type": "Epochs", "count": 12}, "schedule": {"type": "Cosine", "peak": 1e-2, "warmup": 2}}
BATCH = {"length": 12, "tokens": 96}


def labelled(count: int = 40) -> list[dict[str, Any]]:
    """Return different texts that are about a cat or a dog."""
    draw = random.Random(1)
    made: dict[str, str] = {}
    while len(made) < count:
        animal = draw.choice(["cat", "dog"])
        words = [draw.choice(["the", "a", "mat", "on", "sat", "ran"]) for _ in range(draw.randint(2, 7))]
        words.insert(draw.randrange(len(words) + 1), animal)
        made[" ".join(words)] = animal
    return [{"text": text, "label": label} for text, label in made.items()]


def tagged(count: int = 40) -> list[dict[str, Any]]:
    """Return different texts whose animals are tagged."""
    rows = [one["text"].split() for one in labelled(count)]
    return [{"tokens": row, "tags": ["B-animal" if one in ("cat", "dog") else "O" for one in row]} for row in rows]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    bert(folder, "BertModel", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "x.jsonl", labelled())


@pytest.fixture(scope="module")
def tuned(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tune_recipe(base, data, LONG, batch=BATCH), tmp_path_factory.mktemp("tuned") / "run").folder


class TestHeads:
    @pytest.mark.parametrize("answers", ["sequence", "token"])
    def test_what_is_kept_is_what_the_reference_keeps(self, answers: Any, base: Path, tmp_path: Path) -> None:
        """The reference loads the base into the class with the head: all but what it draws anew is the same."""
        names = {"sequence": "BertForSequenceClassification", "token": "BertForTokenClassification"}
        headed, new = with_head(load(base), answers, ("x", "y", "z"))
        place = {"sequence": "head.steps.5", "token": "head.steps.1"}[answers]
        assert new == (f"{place}.weight", f"{place}.bias")
        theirs = getattr(transformers, names[answers]).from_pretrained(str(base), num_labels=3)
        theirs.save_pretrained(tmp_path)
        expected, found = load(tmp_path).model.state_dict(), headed.model.state_dict()
        last = [name for name in found if name.startswith("head.")][-2:]
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found if name not in last)

    def test_a_head_that_is_there_stays(self, base: Path) -> None:
        loaded, _ = with_head(load(base), "sequence", ("x", "y"))
        assert has_head(loaded, "sequence", ("x", "y"))
        again, new = with_head(loaded, "sequence", ("x", "y"))
        assert (again, new) == (loaded, ())
        assert not has_head(loaded, "sequence", ("y", "x"))

    def test_of_a_model_of_ours(self, base: Path) -> None:
        loaded = load(base)
        loaded.family = None
        made, new = with_head(loaded, "sequence", ("x", "y", "z"))
        assert set(new) == {"head.steps.2.weight", "head.steps.2.bias"}
        assert len(made.classify(["the cat"])[0]) == 3

    def test_families_without_such_a_head(self, tmp_path: Path) -> None:
        with pytest.raises(PolyformerError, match="the family t5 has no model with a head for the labels of a image"):
            with_head(load(encoder_decoder(tmp_path)), "image", ("x", "y"))


class TestClassifying:
    def test_it_learns(self, tuned: Path) -> None:
        scores = json.loads((tuned / "scores.json").read_text())
        assert scores["accuracy"] >= 0.8
        assert "before" not in scores
        assert "new in the head, drawn at random: head.steps.5.weight" in (tuned / "report.md").read_text()
        given = [one["given"] for one in scores["samples"]]
        assert [one[0].label for one in load(tuned).classify(given)] == [one["answer"] for one in scores["samples"]]

    def test_the_reference_loads_it(self, tuned: Path) -> None:
        theirs, ours = transformers.BertForSequenceClassification.from_pretrained(str(tuned)).eval(), load(tuned)
        assert theirs.config.id2label == {0: "cat", 1: "dog"}
        ids = torch.tensor([ours.texts.encode("the dog sat on a mat")])
        with torch.no_grad():
            torch.testing.assert_close(ours.model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)

    def test_tuning_that_goes_on_keeps_the_head(self, tuned: Path, data: Path, tmp_path: Path) -> None:
        folder = train(tune_recipe(tuned, data, SHORT, batch=BATCH), tmp_path / "run").folder
        scores = json.loads((folder / "scores.json").read_text())
        assert scores["before"]["accuracy"] >= 0.8
        assert scores["drift"]["rows"] > 0

    def test_loss_and_gradients_are_those_of_the_reference(self, tuned: Path) -> None:
        loaded = load(tuned)
        theirs = transformers.BertForSequenceClassification.from_pretrained(str(tuned)).eval()
        rows = labelled(9)
        texts = fit(loaded.texts, [one["text"] for one in rows], 12)
        batch = next(ItemRows(texts, [loaded.labels.index(one["label"]) for one in rows], 200, 0).in_order())
        ours = label_loss(loaded.model, batch, 0.0)
        ours.objective.backward()  # type: ignore[no-untyped-call]
        inputs = batch.inputs
        loss = theirs(inputs["input_ids"], inputs["attention_mask"].long(), labels=batch.labels).loss * 9
        loss.backward()
        assert float(ours.likelihood) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert loaded.family is not None
        gradients = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
        found = loaded.family.names().to_disk(gradients)
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4)

    def test_resumed_is_the_undisturbed_run(self, base: Path, data: Path, tmp_path: Path) -> None:
        recipe = tune_recipe(base, data, SHORT, batch=BATCH)
        straight = train(recipe, tmp_path / "straight").folder
        train_until(recipe, tmp_path / "run", 4)
        assert_same_run(straight, train(recipe, tmp_path / "run", resume=True).folder)

    def test_a_decoder_can_too(self, tmp_path: Path) -> None:
        rows = [{"text": f"the {noun} {i}", "label": i % 3} for noun in NOUNS for i in range(3)]
        file = write_jsonl(tmp_path / "x.jsonl", rows)
        folder = train(tune_recipe(decoder(tmp_path), file, SHORT), tmp_path / "run").folder
        assert load(folder).labels == ("0", "1", "2")

    @pytest.mark.parametrize(
        ("rows", "changes", "told"),
        [
            ([{"text": f"cat {i}", "label": "x"} for i in range(9)], {}, "has the one label 'x'"),
            (
                [{"text": f"cat {i}", "label": i % 2} for i in range(20)],
                {"task": {"type": "Classify", "labels": ["0", "2"]}},
                "line [0-9]+ has the label '1', which no example",
            ),
            ([{"messages": [{"role": "assistant", "content": "x"}]}] * 3, {}, "too few"),
            ([{"prompt": f"{i}", "completion": "x"} for i in range(9)], {}, "no decoder that writes texts"),
            ([{"source": f"{i}", "target": "x"} for i in range(9)], {}, "no encoder–decoder that writes texts"),
            ([{"text": f"cat {i}"} for i in range(9)], {}, "no head over the tokens"),
        ],
    )
    def test_what_is_refused(
        self, rows: list[dict[str, Any]], changes: dict[str, Any], told: str, base: Path, tmp_path: Path
    ) -> None:
        file = write_jsonl(tmp_path / "x.jsonl", rows)
        with pytest.raises(PolyformerError, match=told):
            train(tune_recipe(base, file, SHORT, batch=BATCH, **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestTagging:
    def test_it_learns(self, base: Path, tmp_path: Path) -> None:
        file = write_jsonl(tmp_path / "x.jsonl", tagged())
        folder = train(tune_recipe(base, file, LONG, batch=BATCH), tmp_path / "run").folder
        scores = json.loads((folder / "scores.json").read_text())
        assert scores["accuracy"] > 0.9
        assert scores["span F1"] > 0.8
        assert "_tags given_" in (folder / "report.md").read_text()
        theirs, ours = transformers.BertForTokenClassification.from_pretrained(str(folder)).eval(), load(folder)
        ids = torch.tensor([ours.texts.encode("the dog sat")])
        with torch.no_grad():
            torch.testing.assert_close(ours.model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)

    def test_the_loss_is_that_of_the_reference(self, base: Path, tmp_path: Path) -> None:
        loaded, _ = with_head(load(base), "token", ("B-animal", "O"))
        recipe = TuneRecipe.from_data(
            {
                "name": "x",
                "base": str(base),
                "data": {"path": "x"},
                "task": {"type": "TagWords"},
                "batch": {"length": 12},
            }
        ).replace(task=TagWords(("B-animal", "O")))
        reader, _ = Tagging(recipe, loaded).reader([Example(one, "x") for one in tagged(7)])
        save(loaded, tmp_path / "model")
        theirs = transformers.BertForTokenClassification.from_pretrained(str(tmp_path / "model")).eval()
        for batch in reader.in_order():
            given = batch.inputs
            loss = theirs(given["input_ids"], given["attention_mask"].long(), labels=batch.labels).loss
            found = batch_loss(loaded.model, batch, 0.0)
            assert float(found.likelihood) == pytest.approx(float(loss.detach()) * batch.target_tokens, rel=1e-5)

    def test_the_first_token_of_a_word_is_asked_for(self, base: Path, tmp_path: Path) -> None:
        texts = load(base).texts
        ids, labels = tag_labels(texts, ["the", "cats", "ran", "xyz"], [0, 1, 2, 3], 12)
        assert texts.tokens(ids) == ["[CLS]", "the", "cat", "##s", "ran", "[UNK]", "[SEP]"]
        assert labels == [-100, 0, 1, -100, 2, 3, -100]
        ids, labels = tag_labels(texts, ["the", "cats", "ran"], [0, 1, 2], 5)
        assert (texts.tokens(ids)[-1], labels) == ("[SEP]", [-100, 0, 1, -100, -100])
        texts = load(decoder(tmp_path)).texts  # whose words begin with a space
        ids, labels = tag_labels(texts, ["The", "house", "qqq"], [0, 1, 2], 40)
        assert [one for one in labels if one >= 0] == [0, 1, 2]
        starts = [texts.decode([one]).strip()[:1] for one, label in zip(ids, labels, strict=True) if label >= 0]
        assert starts == ["T", "h", "q"]

    def test_spans(self) -> None:
        assert spans_of(["B-x", "I-x", "O", "I-y", "B-y", "I-x"]) == [
            (0, 2, "x"),
            (3, 4, "y"),
            (4, 5, "y"),
            (5, 6, "x"),
        ]
        assert span_f1([["B-x", "O"]], [["B-x", "B-x"]]) == pytest.approx(2 / 3)


class TestRelating:
    def test_the_loss_is_the_plain_one(self, base: Path) -> None:
        """Cosines by themselves, with the twins of an anchor's own text left out."""
        loaded = load(base)
        texts = [("the cat", "cat"), ("a dog", "dog"), ("the cat sat", "cat")]
        rows = [{"anchor": a, "positive": p} for a, p in texts]
        rows[1] = {**rows[1], "negative": "a mat"}
        recipe = TuneRecipe.from_data({"name": "x", "base": "x", "data": {"path": "x"}, "batch": {"length": 12}})
        lesson = Relating(recipe.replace(task=Relate(0.1)), loaded)
        (batch,) = lesson.reader([Example(row, "x") for row in rows])[0].in_order()
        found = lesson.aim.loss(loaded.model, batch, 0.0)
        vectors = {text: loaded.embed([text])[0] for text in ("the cat", "a dog", "the cat sat", "cat", "dog", "a mat")}
        expected = 0.0
        for anchor, own in texts:
            others = [t for t in ("cat", "dog", "cat", "a mat") if t != own]
            scores = torch.stack([vectors[anchor] @ vectors[t] for t in (own, *others)]) / 0.1
            expected += float(F.cross_entropy(scores[None], torch.tensor([0])))
        assert float(found.likelihood) == pytest.approx(expected, rel=1e-4)
        assert found.tokens == 3
        smooth = lesson.aim.loss(loaded.model, batch, 0.1)
        assert torch.isfinite(smooth.objective)
        smooth.objective.backward()  # type: ignore[no-untyped-call]
        assert all(torch.isfinite(p.grad).all() for p in loaded.model.parameters() if p.grad is not None)

    def test_it_learns(self, base: Path, tmp_path: Path) -> None:
        rows = [{"anchor": one["text"], "positive": f"{one['label']} ."} for one in labelled(30)]
        for i, one in enumerate(rows):  # so that not all stand in one group
            one["positive"] = " ".join([one["positive"], *["mat"] * (i % 15)][:9])
        file = write_jsonl(tmp_path / "x.jsonl", rows)
        slowly = {**LONG, "schedule": {"type": "Cosine", "peak": 1e-3, "warmup": 2}}
        recipe = tune_recipe(base, file, slowly, batch=BATCH, task={"type": "Relate", "together": 8})
        folder = train(recipe, tmp_path / "run").folder
        scores = json.loads((folder / "scores.json").read_text())
        assert scores["held_out"]["loss"] < scores["before"]["held_out"]["loss"]
        assert 0 <= scores["nearest is its own"] <= 1
        loaded = load(folder)
        assert loaded.pooling is not None  # a folder for sentence-transformers
        assert loaded.embed(["the cat"]).norm() == pytest.approx(1, rel=1e-5)

    def test_the_aim_takes_any_pooling(self, base: Path) -> None:
        model = load(base).model
        assert isinstance(model, TransformerPart)
        pooling = Chain((Nth(0), Linear(16, 4))).build()
        assert contrastive(pooling, 0.1).loss is not contrastive(Chain((Mean(), Normalise())).build(), 0.1).loss


class TestResponding:
    def test_it_learns(self, tmp_path: Path) -> None:
        rows = [{"source": f"the {n} {i}", "target": f"{foreign(n)} {i}"} for n in NOUNS for i in range(3)]
        file = write_jsonl(tmp_path / "x.jsonl", rows)
        base = encoder_decoder(tmp_path)
        folder = train(tune_recipe(base, file, SHORT), tmp_path / "run").folder
        scores = json.loads((folder / "scores.json").read_text())
        assert scores["held_out"]["loss"] < scores["before"]["held_out"]["loss"]
        assert len(scores["samples"]) == 2
        theirs, ours = transformers.T5ForConditionalGeneration.from_pretrained(str(folder)).eval(), load(folder)
        given = {
            "input_ids": torch.tensor([ours.pairs.encode_source("the house")]),
            "decoder_input_ids": torch.tensor([[0, 5, 6]]),
        }
        with torch.no_grad():
            torch.testing.assert_close(ours.model(**given).logits, theirs(**given).logits, rtol=1e-4, atol=1e-5)

    def test_a_table(self, tmp_path: Path) -> None:
        lines = [f"the {noun}\t{foreign(noun)}" for noun in NOUNS]
        (tmp_path / "x.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        recipe = tune_recipe(encoder_decoder(tmp_path), tmp_path / "x.tsv", SHORT, task={"type": "Respond"})
        assert train(recipe, tmp_path / "run").finished

    def test_all_too_long(self, tmp_path: Path) -> None:
        file = write_jsonl(tmp_path / "x.jsonl", [{"source": f"the {n}", "target": n} for n in NOUNS])
        recipe = tune_recipe(encoder_decoder(tmp_path), file, SHORT, batch={"length": 2})
        with pytest.raises(DataError, match=r"none of .* examples has at most 2 tokens on both sides"):
            train(recipe, tmp_path / "run")


class TestSeeing:
    def test_a_folder_of_images(self, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        torch.manual_seed(3)
        keys: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
        config = transformers.ViTConfig(**keys, intermediate_size=24, patch_size=4)
        transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
        (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(SAID))
        for shade, name in ((40, "dark"), (200, "light")):
            (tmp_path / "data" / name).mkdir(parents=True)
            for i in range(12):
                pixels = (torch.rand(16, 16, 3) * 30 + shade).to(torch.uint8)
                image.fromarray(pixels.numpy()).save(tmp_path / "data" / name / f"{i}.png")
        task = {"type": "ClassifyImages", "together": 4}
        folder = train(tune_recipe(tmp_path / "vit", tmp_path / "data", LONG, task=task), tmp_path / "run").folder
        scores = json.loads((folder / "scores.json").read_text())
        assert scores["accuracy"] == 1.0
        files = [tmp_path / "data" / name / "0.png" for name in ("light", "dark")]
        assert [one[0].label for one in load(folder).classify(files)] == ["light", "dark"]
        theirs = transformers.ViTForImageClassification.from_pretrained(str(folder))
        assert theirs.config.id2label == {0: "dark", 1: "light"}
        (tmp_path / "empty" / "a").mkdir(parents=True)
        with pytest.raises(DataError, match="no folders with images in them"):
            train(tune_recipe(tmp_path / "vit", tmp_path / "empty", SHORT), tmp_path / "no")
