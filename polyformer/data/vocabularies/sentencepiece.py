"""SentencePiece models (Kudo and Richardson 2018) as the published families use them.

The families differ in what stands before and after the model's pieces, in how a text is normalised and cut, and in
the control tokens around it; each is one entry of a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from polyformer.data.vocabularies import protobuf
from polyformer.data.vocabularies.format import (
    SPACE,
    Json,
    added,
    bpe,
    byte_fallback,
    description,
    metaspace,
    precompiled,
    replace,
    sequence,
    table,
    template,
    unigram,
)
from polyformer.data.vocabularies.protobuf import CONTROL, USER_DEFINED, SentencePieceModel, read_model
from polyformer.errors import DataError

MBART = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX "
    "ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
)
MBART50 = (
    f"{MBART} af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE "
    "sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
)
M2M100 = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu hy "
    "id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru "
    "sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
)
_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
_FAIRSEQ_ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>"}


class Family(NamedTuple):
    """How a family uses its SentencePiece model.

    Attributes:
        first: the tokens that take the place of the model's first `skipped` pieces.
        last: tokens after the model's.
        roles: control tokens by what they are for.
        single, pair: the control tokens around one text and around two, `"<s> $A </s>"`; "" for none.
        cleaned: whether quotation marks are unified, accents removed and letters made small (as configured).
        normalised: whether the model's own normalizer is used.
        cut: whether a text is cut at white space before it is at "▁".
        lstrip: the control tokens that take the space before them along.
    """

    first: tuple[str, ...] = ()
    skipped: int = 0
    last: tuple[str, ...] = ()
    roles: Mapping[str, str] = {}
    single: str = ""
    pair: str = ""
    cleaned: bool = False
    normalised: bool = True
    cut: bool = True
    lstrip: tuple[str, ...] = ()


_T5_ROLES = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
_BRACKETS = {"bos": "[CLS]", "eos": "[SEP]", "unk": "<unk>", "sep": "[SEP]", "pad": "<pad>", "cls": "[CLS]"}
_ANGLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "<sep>", "pad": "<pad>", "cls": "<cls>"}
_PEGASUS = ("<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, 103)))

FAMILIES = {
    "t5": Family(roles=_T5_ROLES, single="$A </s>", pair="$A </s> $B </s>"),
    "xlmroberta": Family(
        first=_FAIRSEQ,
        skipped=3,
        last=("<mask>",),
        roles={**_FAIRSEQ_ROLES, "mask": "<mask>"},
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
    ),
    "mbart": Family(
        first=_FAIRSEQ,
        skipped=3,
        last=(*MBART.split(), "<mask>"),
        roles={**_FAIRSEQ_ROLES, "mask": "<mask>"},
        single="$A </s> {source}",
        pair="$A $B </s> {source}",
        normalised=False,
        lstrip=("<mask>",),
    ),
    "mbart50": Family(
        first=_FAIRSEQ,
        skipped=3,
        last=(*MBART50.split(), "<mask>"),
        roles={role: token for role, token in _FAIRSEQ_ROLES.items() if role != "bos"} | {"mask": "<mask>"},
        single="{source} $A </s>",
        pair="{source} $A $B </s>",
        cut=False,
        lstrip=("<mask>",),
    ),
    "pegasus": Family(
        first=_PEGASUS,
        skipped=2,
        roles={"eos": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask_2>"},
        single="$A </s>",
        pair="$A $B </s>",
        cut=False,
    ),
    "albert": Family(
        roles={**_BRACKETS, "mask": "[MASK]"},
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        cleaned=True,
    ),
    "xlnet": Family(
        roles={**_ANGLES, "mask": "<mask>"},
        single="$A <sep> <cls>:2",
        pair="$A <sep> $B:1 <sep>:1 <cls>:2",
        cleaned=True,
        lstrip=("<mask>",),
    ),
}
FAMILIES |= {"mt5": FAMILIES["t5"], "umt5": FAMILIES["t5"]}


def read(files: Mapping[str, bytes], file: str, folder: str, kind: str, config: Json) -> tuple[Json, dict[str, str]]:
    """Read a SentencePiece model; returns the description of the tokenizer and its control tokens by role.

    Args:
        file: which of `files` it is.
        kind: whose tokenizer it is; "" if nobody says, then it is guessed from the name of the file.
        config: `tokenizer_config.json`.
    Raises:
        DataError: a damaged model, or one that doesn't have the control tokens of its family.
    """
    name = f"{folder}/{file}"
    model = read_model(files[file], name)
    kind = kind or {"spiece.model": "t5", "sentencepiece.bpe.model": "xlmroberta"}.get(file, "llama")
    if kind in ("m2m100", "m2m"):
        return _m2m100(model, table(files.get("vocab.json", b""), f"{folder}/vocab.json"), folder, config)
    if kind in FAMILIES:
        if model.model != protobuf.UNIGRAM:
            raise DataError(f"{name} is a BPE model, where '{kind}' needs a unigram model")
        return _family(model, kind, name, config)
    return _merging(model, kind, name, config) if model.model == protobuf.BPE else _plain(model)


def _family(model: SentencePieceModel, kind: str, name: str, config: Json) -> tuple[Json, dict[str, str]]:
    family = FAMILIES[kind]
    last = family.last
    if kind in ("t5", "mt5", "umt5"):
        number = config.get("extra_ids", 100)
        if type(number) is not int or not 0 <= number <= 10_000:
            raise DataError(f"{name}: extra_ids should be a number up to 10,000, not {number!r:.40}")
        last = tuple(f"<extra_id_{i}>" for i in reversed(range(number)))
    scored = list(zip(model.pieces, model.scores, strict=True))[family.skipped :]
    first = [(token, -100.0 if token.startswith("<unk_") else 0.0) for token in family.first]
    pieces = [*first, *scored, *((token, 0.0) for token in last)]
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    source = str(config.get("src_lang") or "en_XX")
    around = [one.replace("{source}", source) for one in (family.single, family.pair)]
    _require(ids, ["<unk>", *(one.split(":")[0] for one in around[0].split() if not one.startswith("$"))], name, kind)
    words = metaspace()
    made = description(
        unigram(pieces, ids["<unk>"]),
        normalizer=_normalizer(model, family, kind, config),
        pre_tokenizer=sequence("pretokenizers", {"type": "WhitespaceSplit"}, words) if family.cut else words,
        post_processor=template(around[0], around[1], ids),
        decoder=metaspace(),
    )
    control = {*family.roles.values(), *family.first, *last} & ids.keys()
    flags = {token: {"lstrip": True} for token in family.lstrip}
    made["added_tokens"] = _added(model, ids, control, flags)
    return made, {role: token for role, token in family.roles.items() if token in ids}


def _normalizer(model: SentencePieceModel, family: Family, kind: str, config: Json) -> Json | None:
    stages: list[Json | None] = []
    if family.cleaned:
        stages += [replace("``", '"'), replace("''", '"')]
        if not config.get("keep_accents", False) or kind == "xlnet":
            stages += [{"type": "NFKD"}, {"type": "StripAccents"}]
        if config.get("do_lower_case", kind == "albert"):
            stages.append({"type": "Lowercase"})
    if family.normalised:
        stages.append(precompiled(model.charsmap))
    if not family.cut:
        if kind == "pegasus" and not model.charsmap:
            stages.append(replace("\n", " "))
        stages.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return sequence("normalizers", *stages)


def _added(
    model: SentencePieceModel, ids: Mapping[str, int], control: set[str], flags: Mapping[str, Mapping[str, bool]]
) -> list[Json]:
    """Describe the control tokens, the model's and the family's, and the symbols that a user defined."""
    kinds = dict(zip(model.pieces, model.kinds, strict=True))
    named = {piece: True for piece in control} | {piece: True for piece, kind in kinds.items() if kind == CONTROL}
    named |= {piece: False for piece, kind in kinds.items() if kind == USER_DEFINED and piece not in control}
    there = sorted((ids[piece], piece) for piece in named if piece in ids)
    return [added(piece, number, named[piece], **flags.get(piece, {})) for number, piece in there]


def _merging(model: SentencePieceModel, kind: str, name: str, config: Json) -> tuple[Json, dict[str, str]]:
    """LLaMA's and Gemma's use of a BPE model, and the plain one of a kind that isn't known."""
    ids = {piece: i for i, piece in enumerate(model.pieces)}
    if len(ids) < len(model.pieces):
        twice = next(piece for i, piece in enumerate(model.pieces) if ids[piece] != i)
        raise DataError(f"{name} has the piece '{twice[:80]}' twice")
    named = {"bos": model.bos, "eos": model.eos, "unk": model.unk}
    roles = {role: model.pieces[i] for role, i in named.items() if i >= 0}
    if kind.startswith("gemma"):
        roles |= {role: token for role, token in (("pad", "<pad>"), ("mask", "<mask>")) if token in ids}
    made = describe_merging(ids, merges(model.pieces), kind, config, roles.get("unk"), model.byte_fallback)
    if kind not in ("llama", "codellama", "mistral", "mixtral") and not kind.startswith("gemma"):
        made["normalizer"] = sequence("normalizers", precompiled(model.charsmap), replace(" ", SPACE))
    made["added_tokens"] = _added(model, ids, set(roles.values()), {})
    return made, roles


def describe_merging(
    ids: Mapping[str, int],
    pairs: Sequence[str],
    kind: str,
    config: Json,
    unk: str | None,
    fallback: bool = True,
) -> Json:
    """Return the description of a SentencePiece BPE model.

    Args:
        kind: "llama" puts a space before a text, "gemma" and "" don't.
        config: `add_prefix_space` and `legacy` count, which say whether and where LLaMA's space is put.
        unk: the token for what can't be written as bytes either.
    """
    model = bpe(ids, pairs, unk_token=unk, fuse_unk=True, byte_fallback=fallback)
    if kind in ("llama", "codellama", "mistral", "mixtral"):
        prefix = config.get("add_prefix_space") is not False
        scheme = ("always" if config.get("legacy", False) else "first") if prefix else "never"
        return description(model, pre_tokenizer=metaspace(scheme, cuts=False), decoder=byte_fallback(strip=prefix))
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return description(
        model,
        normalizer=replace(" ", SPACE),
        pre_tokenizer=cut if kind.startswith("gemma") else None,
        decoder=byte_fallback(strip=False),
    )


def _plain(model: SentencePieceModel) -> tuple[Json, dict[str, str]]:
    """A unigram model of a kind that isn't known: the text as it is, its spaces as "▁"."""
    ids = {piece: i for i, piece in enumerate(model.pieces)}
    named = {"bos": model.bos, "eos": model.eos, "unk": model.unk}
    roles = {role: model.pieces[i] for role, i in named.items() if i >= 0}
    pieces = list(zip(model.pieces, model.scores, strict=True))
    made = description(
        unigram(pieces, max(model.unk, 0), model.byte_fallback),
        normalizer=sequence("normalizers", precompiled(model.charsmap), replace(" ", SPACE)),
        decoder=byte_fallback(strip=False) if model.byte_fallback else replace(SPACE, " "),
    )
    made["added_tokens"] = _added(model, ids, set(roles.values()), {})
    return made, roles


def _m2m100(
    model: SentencePieceModel, ids: Mapping[str, int], folder: str, config: Json
) -> tuple[Json, dict[str, str]]:
    """M2M100, whose `vocab.json` numbers the model's pieces anew; its languages' tokens follow them."""
    if max(ids.values()) >= 2 * len(ids):
        raise DataError(f"{folder}/vocab.json has more holes than tokens")
    scores = dict(zip(model.pieces, model.scores, strict=True))
    least = min(model.scores)
    last = [f"__{code}__" for code in M2M100.split()]
    names = {i: token for token, i in ids.items()}
    pieces = [(names.get(i, f"madeupword{i}"), scores.get(names.get(i, ""), least)) for i in range(max(names) + 1)]
    pieces += [(token, 0.0) for token in last if token not in ids]
    numbered = {piece: i for i, (piece, _) in enumerate(pieces)}
    source = f"__{config.get('src_lang') or 'en'}__"
    _require(numbered, ["<unk>", "</s>", source], f"{folder}/vocab.json", "m2m100")
    made = description(
        unigram(pieces, numbered["<unk>"]),
        normalizer=precompiled(model.charsmap),
        pre_tokenizer=sequence("pretokenizers", {"type": "WhitespaceSplit"}, metaspace()),
        post_processor=template(f"{source} $A </s>", f"{source} $A $B </s>", numbered),
        decoder=metaspace(),
    )
    roles = {role: token for role, token in _FAIRSEQ_ROLES.items() if role != "cls"}
    made["added_tokens"] = _added(model, numbered, {*roles.values(), *last}, {})
    return made, roles


def _require(ids: Mapping[str, int], tokens: Sequence[str], name: str, kind: str) -> None:
    lacking = next((token for token in tokens if token not in ids), None)
    if lacking is not None:
        raise DataError(f"{name} lacks the token {lacking[:80]} of a '{kind}' model")


def merges(pieces: Sequence[str], ranks: Sequence[float] | None = None) -> list[str]:
    """Return the merges that make the pieces of a BPE model, in order: what SentencePiece leaves to be worked out.

    Args:
        ranks: by which the pieces are ordered, smallest first; by their ids if None.
    """
    ids = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for i, piece in enumerate(pieces):
        rank, sign = (i, 1) if ranks is None else (ranks[i], -1)
        splits = [(ids.get(piece[:at], -1), ids.get(piece[at:], -1), at) for at in range(1, len(piece))]
        there = sorted(split for split in splits if split[0] >= 0 and split[1] >= 0 and " " not in piece)
        found += [(rank, sign * at, sign * (len(piece) - at), piece, at) for _, _, at in there]
    found.sort(key=lambda one: one[:3])
    return [f"{piece[:at]} {piece[at:]}" for *_, piece, at in found]
