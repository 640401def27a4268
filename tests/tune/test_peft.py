"""Adapters exchanged with PEFT: what it saves is read here, and what is saved here it reads, to equal answers.

`python -m tests.tune.test_peft` prints the table of all families.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError, WeightsError
from polyformer.parts.model import TransformerPart
from polyformer.swap.swap import Swap
from polyformer.tune import (
    DoraChange,
    Ia3Change,
    LoraChange,
    PrefixChange,
    PromptChange,
    RankFor,
    adapter_of,
    attach,
    prompt_ids,
    read_adapter,
    write_adapter,
)
from polyformer.tune.prompts import attentions_of
from tests.families.cases import CASES, Case
from tests.families.parity import load, mine, real, reference, theirs

peft = pytest.importorskip("peft")

NAMED = {case.name: case for case in CASES}
TOLERANCE = 2e-5

FEW = "gpt2 falcon llama mixtral qwen3 bert vit-classifier t5 roberta-sequence"
MANY = """albert bart big_bird bloom camembert deit distilbert electra falcon-new gemma2 gpt_neox longformer marian
mbart mistral mpt mt5 olmo2 pegasus qwen2 qwen2_moe qwen3_moe reformer-local roberta swin-classifier switch_transformers
umt5 vision-encoder-decoder-swin-bert wav2vec2-conformer whisper xlm xlm-roberta bert-sequence gpt2-token
llama-sequence"""
IA3 = "gpt_neox bloom falcon llama mistral qwen2 qwen3 gemma2 bert roberta mt5 bart"
VIRTUAL = "bloom gpt_neox mistral mpt qwen2 qwen3 gemma2 olmo2 bert roberta-sequence mt5 bart mbart"

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
CHANGES: dict[str, Swap] = {
    "lora": LoraChange(rank=2, alpha=3.0, targets=("q", "v"), ranks=(RankFor("*.0.*.v", 3, 5.0),)),
    "rslora": LoraChange(rank=2, scaling="root", targets=("q", "v")),
    "dora": DoraChange(rank=2, targets=("q", "o")),
    "ia3": Ia3Change(outputs=("k", "v"), inputs=("down",)),
    "prefix": PrefixChange(tokens=3),
    "prompt": PromptChange(tokens=3),
}
PAIRS = [
    *(("lora", name) for name in FEW.split()),
    *(("rslora", name) for name in ("llama",)),
    *(("dora", name) for name in ("gpt_neox", "bert-sequence")),
    *(("ia3", name) for name in ("gpt2", "falcon-new", "t5")),
    *(("prefix", name) for name in ("gpt2", "llama", "bert-sequence", "t5")),
    *(("prompt", name) for name in ("gpt2", "gemma2", "bert-sequence", "t5")),
]
OTHERS = [
    *(("lora", name) for name in MANY.split()),
    *((method, name) for method in ("rslora", "dora") for name in (*FEW.split(), *MANY.split())),
    *(
        ("ia3", name)
        for name in [
            "gpt_neox",
            "bloom",
            "falcon",
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma2",
            "bert",
            "roberta",
            "mt5",
            "bart",
        ]
    ),
    *((method, name) for method in ("prefix", "prompt") for name in VIRTUAL.split()),
]
EVERY = dict.fromkeys([*PAIRS, *OTHERS])


def config(method: str, case: Case, model: TransformerPart) -> Any:
    """Return PEFT's configuration of a method; experts, which are no modules there, are left out."""
    task = next((told for end, told in TASKS.items() if case.model.endswith(end)), None)
    task = None if case.given in ("features", "captions", "pixels") else task
    if method == "ia3":
        return peft.IA3Config(task_type=task)
    if method in ("prefix", "prompt"):
        layers = attentions_of(model.spec)
        heads = next(iter(layers.values())).heads
        sizes = {"num_layers": len(layers), "num_attention_heads": heads.groups, "num_virtual_tokens": 4}
        if method == "prompt":
            return peft.PromptTuningConfig(task_type=task, **sizes)
        return peft.PrefixTuningConfig(task_type=task, token_dim=heads.groups * heads.width, **sizes)
    few = "moe" in case.name or case.name == "mixtral" or ("-" in case.name and "vision" not in case.name)
    targets = ["q_proj", "v_proj", "query", "c_attn", "query_key_value"] if few else "all-linear"
    if case.name in ("swin-classifier", "vit-classifier", "reformer-local", "wav2vec2-conformer", "xlm-roberta"):
        targets = "all-linear"
    kind = {"use_rslora": method == "rslora", "use_dora": method == "dora"}
    return peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, task_type=task, target_modules=targets, **kind)


def moved(model: Any) -> Any:
    """Change all numbers that may be trained, and stop training."""
    torch.manual_seed(0)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(0.2 * torch.randn_like(one))
    return model.eval()


def fresh(case: Case) -> Any:
    """Return the reference's model, unchanged by other tests."""
    reference.cache_clear()
    return reference(case)[0]


def inputs(case: Case) -> dict[str, Tensor]:
    """Return a case's inputs; of a bare encoder, PEFT's class passes on no segments."""
    bare = not any(case.model.endswith(end) for end in TASKS)
    return {name: one for name, one in case.inputs().items() if not (bare and name == "token_type_ids")}


def prompted(model: TransformerPart, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a prompt's ids before each text."""
    ids = torch.tensor(prompt_ids(model.spec), dtype=torch.long).expand(3, -1)  # type: ignore[arg-type]
    if not ids.numel():
        return data
    ahead = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {name: torch.cat((ahead[name], one), 1) if name in ahead else one for name, one in data.items()}


def difference(ours: dict[str, Tensor], their: dict[str, Tensor], data: dict[str, Tensor]) -> float:
    """Return the largest difference of two models' answers to real rows."""
    found = []
    for name, wanted in their.items():
        own = ours[name]
        assert own.shape == wanted.shape
        texts = data.get("decoder_input_ids", data.get("input_ids"))
        if own.ndim == 3 and name in ("hidden", "logits") and texts is not None:
            own, wanted = own[:, -texts.shape[1] :], wanted[:, -texts.shape[1] :]
        if name != "encoder_hidden":
            found.append(float((real({name: own}, data)[name] - real({name: wanted}, data)[name]).abs().max()))
    return max(found)


def last(answers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the last row of each answer, which a prompt doesn't move."""
    return {name: one[:, -1] if one.ndim == 3 else one for name, one in answers.items() if name != "encoder_hidden"}


def read_from_peft(method: str, case: Case, folder: Path) -> tuple[float, float]:
    """Return how far our answers are from PEFT's with an adapter of its making, and how much that one changes."""
    data, model, loaded = inputs(case), fresh(case), load(case)
    assert loaded.family is not None
    with torch.no_grad():
        plain = {name: one.clone() for name, one in last(theirs(model, data)).items()}
        tuned = moved(peft.get_peft_model(model, config(method, case, loaded.model)))
        wanted = theirs(tuned, data)
        tuned.save_pretrained(folder)
        made = attach(loaded.model, read_adapter(folder, loaded.model, loaded.family)).eval()
        answers = mine(made, prompted(made, data))
    changed = max(float((one - plain[name]).abs().max()) for name, one in last(wanted).items())
    return difference(answers, wanted, data), changed


def written_for_peft(method: str, case: Case, folder: Path) -> float:
    """Return how far PEFT's answers are from ours with an adapter of our making."""
    data, model, loaded = inputs(case), fresh(case), load(case)
    assert loaded.family is not None
    made = moved(attach(loaded.model, CHANGES[method]))
    write_adapter(folder, made, loaded.family, base="somewhere")
    again = read_adapter(folder, loaded.model, loaded.family)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        answers = mine(made, prompted(made, data))
        same = mine(attach(loaded.model, again).eval(), prompted(made, data))
        tuned = peft.PeftModel.from_pretrained(model, folder).eval()
        wanted = theirs(tuned, data)
    assert all(torch.allclose(same[name], one, atol=1e-5) for name, one in answers.items())
    return difference(answers, wanted, data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "name"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY if pair not in PAIRS)]
)
def test_interchange(method: str, name: str, tmp_path: Path) -> None:
    case = NAMED[name]
    found, changed = read_from_peft(method, case, tmp_path / "theirs")
    assert found < TOLERANCE
    assert changed > 1e-3
    assert written_for_peft(method, case, tmp_path / "ours") < TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    """What PEFT saved of a fused matrix comes out bit for bit when it is saved again."""
    for method, name in (("lora", "gpt2"), ("dora", "gpt_neox"), ("ia3", "falcon-new"), ("prefix", "llama")):
        case = NAMED[name]
        loaded = load(case)
        assert loaded.family is not None
        first, second = tmp_path / f"{method}-1", tmp_path / f"{method}-2"
        moved(peft.get_peft_model(fresh(case), config(method, case, loaded.model))).save_pretrained(first)
        made = attach(loaded.model, read_adapter(first, loaded.model, loaded.family))
        write_adapter(second, made, loaded.family)
        from safetensors.torch import load_file

        before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), method
        told = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
        for key in ("r", "lora_alpha", "use_dora", "fan_in_fan_out", "num_virtual_tokens", "peft_type"):
            assert told[0].get(key) == told[1].get(key), key


def test_parts_of_a_fused_matrix(tmp_path: Path) -> None:
    """Queries and values of GPT-2 have an A each; for PEFT they are one matrix of twice the rank."""
    loaded = load(NAMED["gpt2"])
    assert loaded.family is not None
    write_adapter(tmp_path / "one", moved(attach(loaded.model, CHANGES["rslora"])), loaded.family)
    told = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert told["r"] == 4
    assert told["target_modules"] == ["c_attn"]
    assert told["fan_in_fan_out"] is True
    read = read_adapter(tmp_path / "one", loaded.model, loaded.family)
    assert len(read.parts.shared) == 2
    assert len({one.data_ptr() for key, one in read.tensors.items() if key.endswith(".a")}) == 2


def saved(tmp_path: Path, change: Swap = CHANGES["lora"], name: str = "llama") -> tuple[Any, Path]:
    """Return a model and the folder of an adapter for it."""
    loaded = load(NAMED[name])
    folder = tmp_path / "adapter"
    write_adapter(folder, moved(attach(loaded.model, change)), loaded.family)  # type: ignore[arg-type]
    return loaded, folder


def rewritten(folder: Path, **changes: Any) -> Path:
    """Return a copy of an adapter's folder whose configuration says something else."""
    other = folder.with_name("other")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    file = other / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return other


BAD = {
    "method": ({"peft_type": "LOHA"}, "peft_type = 'LOHA'; read are LORA, IA3"),
    "unknown": ({"use_xyz": True}, "use_xyz = True, which is not understood"),
    "bias": ({"bias": "all"}, "biases that were trained are not read"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "which changed the base's own matrices"),
    "pattern": ({"alpha_pattern": {"(a+)+b": 3}}, "is too intricate a pattern"),
    "broken": ({"alpha_pattern": {"(a": 3}}, "is no pattern"),
    "kind": ({"r": "many"}, "should be a whole number"),
    "rank": ({"r": 7}, "not those of rank 7"),
    "dora": ({"use_dora": True}, "are not complete, or too many: magnitude"),
}


@pytest.mark.parametrize(("changes", "told"), BAD.values(), ids=BAD)
def test_what_is_not_understood(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    loaded, folder = saved(tmp_path, LoraChange(rank=2, targets=("q",)))
    with pytest.raises((SpecError, WeightsError), match=told):
        read_adapter(rewritten(folder, **changes), loaded.model, loaded.family)


def test_an_adapter_for_another_base(tmp_path: Path) -> None:
    loaded, folder = saved(tmp_path)
    other = load(NAMED["mistral"])
    assert other.family is not None
    with torch.no_grad():
        other.model.get_parameter("decoder.blocks.1.steps.0.op.v.weight").add_(0.01)
    with pytest.raises(SpecError, match="the adapter was trained on another base"):
        read_adapter(folder, other.model, other.family)
    assert read_adapter(folder, other.model, other.family, base="any").parts.placed
    half = load(NAMED["llama"])
    assert read_adapter(folder, half.model.bfloat16(), loaded.family).parts.placed
    bert = load(NAMED["bert"])
    assert bert.family is not None
    with pytest.raises(WeightsError, match="belongs to no matrix of this model"):
        read_adapter(folder, bert.model, bert.family)
    wide = load(NAMED["llama-wide-heads"])
    assert wide.family is not None
    with pytest.raises((SpecError, WeightsError), match="for 16 inputs and 16 outputs, and this has 16 and 32"):
        attach(wide.model, read_adapter(folder, wide.model, wide.family, base="any"))
    with pytest.raises(WeightsError, match="holds no adapter"):
        read_adapter(tmp_path, loaded.model, loaded.family)
    with pytest.raises(WeightsError, match="exists already"):
        write_adapter(folder, attach(loaded.model, CHANGES["lora"]), loaded.family)


def test_what_peft_can_not_hold(tmp_path: Path) -> None:
    def refused(name: str, change: Swap, told: str) -> None:
        loaded = load(NAMED[name])
        assert loaded.family is not None
        with pytest.raises(SpecError, match=told):
            write_adapter(tmp_path / "x", attach(loaded.model, change), loaded.family)

    refused("mixtral", LoraChange(targets=("experts",), rank=2), "is no matrix of its own in the reference library")
    refused("bart", PrefixChange(side="encoder"), "PEFT's prefixes stand in every layer of the decoder")
    loaded = load(NAMED["llama"])
    both = attach(attach(loaded.model, LoraChange("one", rank=2)), PrefixChange("two"))
    assert len(adapter_of(both, "one").parts.placed) == 14
    write_adapter(tmp_path / "two", both, loaded.family, "two")  # type: ignore[arg-type]
    write_adapter(tmp_path / "one", both, loaded.family, "one")  # type: ignore[arg-type]
    read = read_adapter(tmp_path / "one", loaded.model, loaded.family)  # type: ignore[arg-type]
    assert {one.path for one in read.parts.placed} == {one.path for one in adapter_of(both, "one").parts.placed}


def table() -> None:
    """Print the largest difference of logits for every pair, in both directions."""
    import tempfile

    for method, name in EVERY:
        folder = Path(tempfile.mkdtemp())
        found, changed = read_from_peft(method, NAMED[name], folder / "theirs")
        back = written_for_peft(method, NAMED[name], folder / "ours")
        print(f"{name} | {method} | {found:.1e} | {back:.1e} | {changed:.1e}", flush=True)


if __name__ == "__main__":
    table()
