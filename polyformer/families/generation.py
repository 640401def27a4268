"""What a checkpoint says about writing with it, in `generation_config.json` or, before that, in `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from polyformer.spec import Record, field_types

NEUTRAL: dict[str, Any] = {
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_decoder_ids": None,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "output_logits": False,
    "output_scores": False,
    "remove_invalid_values": False,
    "renormalize_logits": None,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "suppress_tokens": None,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}
"""Keys for which `Generation` has no field, and the values that ask for nothing."""

REMARKS = frozenset(
    (
        "_from_model_config",
        "output_attentions",
        "output_hidden_states",
        "transformers_version",
        "use_cache",
    )
)
"""Keys that change no output, whatever they hold."""


class Generation(Record):
    """Special tokens and search settings, under the reference's names.

    `others` keeps what the file asks for beyond these, as pairs of a key and its value in JSON: it is written back
    when the model is saved, and nothing here obeys it.
    """

    decoder_start_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    num_beams: int = 1
    max_length: int | None = None
    early_stopping: bool | Literal["never"] = False
    length_penalty: float = 1.0
    others: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> Generation:
        """Read a `generation_config.json`, after what a `config.json` says of the same matters.

        Raises:
            SpecError: a value of the wrong kind.
        """
        said = {key: value for key, value in config.items() if key in KEYS} | dict(generation)
        said = {key: value for key, value in said.items() if value is not None and key not in REMARKS}
        own = {key: value for key, value in said.items() if key in FIELDS}
        others = {
            key: json.dumps(value) for key, value in said.items() if key not in FIELDS and value != NEUTRAL.get(key)
        }
        return cls.from_data({**own, "others": [list(item) for item in others.items()]}, where)

    @property
    def others_by_name(self) -> dict[str, Any]:
        """What `others` says, read."""
        return {key: json.loads(text) for key, text in self.others}

    def write(self) -> dict[str, Any]:
        """Return the content of a `generation_config.json`."""
        own = {key: getattr(self, key) for key in FIELDS if getattr(self, key) is not None}
        return own | {key: json.loads(text) for key, text in self.others}


FIELDS = frozenset(field_types(Generation)) - {"others"}
KEYS = FIELDS | NEUTRAL.keys() | REMARKS
"""All that a `config.json` may hold about generation."""
