"""The tokenizer that lies in a Hugging Face folder, in whichever format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from polyformer.data.files import decode_whole, read_whole
from polyformer.data.vocabularies import bytes_bpe, sentencepiece, words
from polyformer.data.vocabularies.format import (
    ROLES,
    Json,
    Vocabulary,
    added,
    all_ids,
    bos_and_eos,
    checked,
    parse,
    table,
)
from polyformer.errors import DataError
from polyformer.weights.folders import member

WHOLE = "tokenizer.json"
MODELS = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


class Settings(NamedTuple):
    """What the files beside a vocabulary say.

    Attributes:
        config: `tokenizer_config.json`.
        kind: the reference library's class of tokenizers or models without its ending, "xlmroberta"; "" if not said.
        roles: control tokens by what they are for.
        tokens: the tokens that are looked for before the model runs, with what is said of each.
        template: the chat template.
    """

    config: Json
    kind: str
    roles: Mapping[str, str]
    tokens: Mapping[str, Json]
    template: str | None


def read_folder(folder: str | Path) -> Vocabulary | None:
    """Read the tokenizer of a folder; None if it has none.

    Raises:
        DataError: a file can't be read, is damaged, or doesn't fit to another; names it.
        WeightsError: a file is a link out of the folder.
    """
    place = Path(folder)
    names = [WHOLE, "vocab.txt", *MODELS, "vocab.json", "merges.txt", *_SETTINGS]
    files = {name: read_whole(member(place, name)) for name in names if (place / name).is_file()}
    model = next((name for name in MODELS if name in files), None)
    settings = _settings(files, place)
    roles: dict[str, str] = {}
    if WHOLE in files:
        source = WHOLE
        made = checked(parse(files[WHOLE], str(place / WHOLE)), str(place / WHOLE))
    elif "vocab.txt" in files:
        source = "vocab.txt"
        made, roles = words.read(files[source], str(place / source), settings.config, settings.roles)
    elif model is not None:
        source = model
        made, roles = sentencepiece.read(files, model, str(place), settings.kind, settings.config)
    elif "vocab.json" in files and "merges.txt" in files:
        source = "vocab.json"
        made, roles = bytes_bpe.read(files, str(place), settings.kind, settings.config, settings.roles)
    else:
        return None
    roles = {**roles, **settings.roles}
    finished = _with_settings(made, settings, roles, explicit=source not in (WHOLE, "vocab.txt"))
    known = all_ids(finished)
    roles = {role: token for role, token in roles.items() if token in known}
    return Vocabulary(finished, roles, settings.template, files, str(place / source))


def _settings(files: Mapping[str, bytes], place: Path) -> Settings:
    def read(name: str) -> Json:
        return parse(files[name], str(place / name)) if name in files else {}

    config, map_, more = read("tokenizer_config.json"), read("special_tokens_map.json"), {}
    if "added_tokens.json" in files:
        more = table(files["added_tokens.json"], str(place / "added_tokens.json"))
    tokens = {token: added(token, number, special=False) for token, number in more.items()}
    decoder = config.get("added_tokens_decoder") or {}
    for number, said in decoder.items() if isinstance(decoder, dict) else ():
        token = _content(said)
        if token is None or not number.isdecimal():
            name = place / "tokenizer_config.json"
            raise DataError(f"{name}: added_tokens_decoder has an unusable entry '{number[:80]}'")
        tokens[token] = _flagged(said, int(number))
    roles = {}
    for role in ROLES:
        said = config.get(f"{role}_token") or map_.get(f"{role}_token")
        if (token := _content(said)) is not None:
            roles[role] = token
            tokens[token] = tokens.get(token, _flagged(said, -1)) | {"special": True}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        several = config.get(key) or map_.get(key) or []
        for said in several.values() if isinstance(several, dict) else several:
            if (token := _content(said)) is not None:
                tokens[token] = tokens.get(token, _flagged(said, -1)) | {"special": True}
    return Settings(config, _kind(config, place), roles, tokens, _template(files, config, place))


def _content(said: Any) -> str | None:
    token = said.get("content") if isinstance(said, dict) else said
    return token if isinstance(token, str) and token else None


def _flagged(said: Any, number: int) -> Json:
    token = _content(said)
    assert token is not None
    if not isinstance(said, dict):
        return added(token, number)
    flags = {flag: bool(said.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
    return added(token, number, bool(said.get("special")), **flags)


def _kind(config: Json, place: Path) -> str:
    """Return what the tokenizer's class is called, or the model's type, which the reference library falls back to."""
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer").lower()
    if name in ("", "pretrained", "tokenizersbackend") and (place / "config.json").is_file():
        said = parse(read_whole(place / "config.json"), str(place / "config.json"))
        name = str(said.get("model_type") or "")
    return name.replace("-", "").replace("_", "").lower()


def _template(files: Mapping[str, bytes], config: Json, place: Path) -> str | None:
    if "chat_template.jinja" in files:
        return decode_whole(files["chat_template.jinja"], str(place / "chat_template.jinja"))
    said = config.get("chat_template")
    if said is None and "chat_template.json" in files:
        said = parse(files["chat_template.json"], str(place / "chat_template.json")).get("chat_template")
    if isinstance(said, list):  # several by name
        named = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
        said = named.get("default")
    return said if isinstance(said, str) else None


def _with_settings(made: Json, settings: Settings, roles: Mapping[str, str], explicit: bool) -> Json:
    """Enter the tokens that the settings name, and where `explicit` the BOS and EOS that they ask for.

    A `tokenizer.json` says itself what stands around a text, and the settings of its folder may be older.
    """
    tokens = {one["content"]: one for one in made["added_tokens"]}
    ids = all_ids(made)
    for token, said in settings.tokens.items():
        number = ids[token] if token in ids else said["id"]
        if token in tokens:
            tokens[token] = tokens[token] | {"special": said["special"] or tokens[token].get("special", False)}
        elif number >= 0:
            tokens[token] = said | {"id": number}
    made = made | {"added_tokens": sorted(tokens.values(), key=lambda one: one["id"])}
    ends = {role: settings.config.get(f"add_{role}_token") for role in ("bos", "eos")}
    if explicit and any(isinstance(said, bool) for said in ends.values()):
        wanted = {role: roles.get(role) if ends[role] is True else None for role in ends}
        return bos_and_eos(made, wanted["bos"], wanted["eos"])
    return made
