"""Reading a configuration: nothing in it is ignored silently, and no code that comes with it is run."""

from __future__ import annotations

from typing import Any

import pytest

from polyformer.errors import SpecError
from polyformer.families import FAMILIES, Marian, family_of, read_family
from polyformer.families.generation import Generation

PLAIN: dict[str, Any] = {"model_type": "marian", "architectures": ["MarianMTModel"], "d_model": 64}


def test_known_keys_are_read_and_idle_ones_accepted() -> None:
    idle = {
        "is_encoder_decoder": True,
        "torchscript": False,
        "pruned_heads": {},
        "num_beams": 4,
        "torch_dtype": "float16",
    }
    config = read_family(PLAIN | idle | {"dropout": 0}, "config.json")
    assert config == Marian(d_model=64, dropout=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e4}, "config.json has a key 'rope_theta' that the family marian does not know$"),
        ({"dropuot": 0.1}, r"a key 'dropuot' .* \(did you mean 'dropout'\?\)"),
        ({"normalize_before": True}, "config.json has normalize_before = True; only False is supported"),
        ({"static_position_embeddings": False}, "static_position_embeddings = False; only True is supported"),
        ({"quantization_config": {"bits": 4}}, "key 'quantization_config'"),
        ({"hidden_size": 65}, "hidden_size = 65, but d_model = 64"),
        ({"d_model": "64"}, "d_model should be a whole number, not '64'"),
        ({"d_model": None}, "d_model should be a whole number"),
        ({"decoder_layers": 10**9}, "decoder_layers = 1000000000 is not between 1 and 4096"),
        ({"encoder_layers": 0}, "encoder_layers = 0 is not between"),
        ({"d_model": 2**40}, "d_model = 1099511627776 is not between"),
        ({"architectures": ["MarianForCausalLM"]}, "is of a MarianForCausalLM; supported: MarianMTModel"),
        ({"model_type": "marain"}, r"no family 'marain' \(did you mean 'marian'\?\)"),
        ({"model_type": None}, "has no model_type"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "config.json asks to run program code"),
        ({"task_specific_params": {"a": [{"auto_map": {}}]}}, "config.json asks to run program code"),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_family(PLAIN | changes, "config.json")


def test_an_alias_stands_in_for_its_key() -> None:
    config = {key: value for key, value in PLAIN.items() if key != "d_model"}
    assert read_family(config | {"hidden_size": 32}, "config.json") == Marian(d_model=32)


def test_families_are_listed_once() -> None:
    assert [family_of(family.model_type) for family in FAMILIES] == list(FAMILIES)


def test_generation_settings_are_kept_and_written_back() -> None:
    config = {"d_model": 64, "num_beams": 6, "max_length": 512, "bad_words_ids": [[7]], "eos_token_id": 0, "top_k": 50}
    file = {
        "num_beams": 4,
        "eos_token_id": [0, 5],
        "no_repeat_ngram_size": 3,
        "temperature": 1.0,
        "transformers_version": "5",
    }
    found = Generation.read(config, file, "here")
    assert found.num_beams == 4
    assert found.eos_token_id == (0, 5)
    assert found.bad_words_ids == ((7,),)
    assert found.others == (("no_repeat_ngram_size", "3"),)
    assert Generation.read({}, found.write(), "here") == found
    assert Generation.from_json(found.to_json()) == found
    with pytest.raises(SpecError, match=r"here.*num_beams should be a whole number"):
        Generation.read({}, {"num_beams": "four"}, "here")
