"""Learning a vocabulary of subwords from texts, on the `tokenizers` library.

All kinds cut a text into the same small runs first: letters of one kind of script, single digits, and repeats of one
mark, each with the space before it. No run has both a letter and a mark, so that no text, however it is typed, can
become a control token such as "</s>" or "<2de>"; and a run of Chinese does not swallow the Latin word beside it.
The space is written "▁". In sentences it is put before the first word too, so that a word is the same wherever it
stands; documents, which are written on from any place and have lines, are left as they are.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

from tokenizers import Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from polyformer.data.text import normalise
from polyformer.errors import DataError
from polyformer.spec import Record

T = TypeVar("T")

Kind = Literal["bpe", "byte_bpe", "wordpiece", "unigram"]

SPACE = "▁"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS, UNK = range(4)

_EAST_ASIAN = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
_CONTINUES = "##"  # begins WordPiece's tokens that continue a word; so "#" must always be a run of its own


def _runs(space: str) -> Regex:
    mark = rf"[^\s{space}#\p{{L}}\p{{M}}\p{{N}}]"
    letters = rf"[\p{{L}}\p{{M}}&&[^{_EAST_ASIAN}]]+"
    return Regex(rf"{space}?(?:[{_EAST_ASIAN}]+|{letters}|\p{{N}}|#|({mark})\1*)|{space}")


class Subwords(Record, abstract=True):
    """Which vocabulary is learnt.

    Attributes:
        kind: byte-pair encoding (Sennrich et al. 2016), the same on bytes (Radford et al. 2019), WordPiece (Schuster
            and Nakajima 2012), or a unigram language model (Kudo 2018). On bytes every text can be written; the
            others write "<unk>" for a character that the training texts don't have at least twice.
        vocabulary: number of tokens, the control tokens included.
    """

    kind: Kind = "bpe"
    vocabulary: int = 8000

    def check(self) -> None:
        least = 256 + len(SPECIAL) if self.kind == "byte_bpe" else 32
        self.require(self.vocabulary >= least, f"vocabulary should be at least {least} for {self.kind}")


class TokenizerRecipe(Subwords):
    """How sentence pairs become tokens.

    Attributes:
        joint: one vocabulary for source and target, so that a model can tie its embeddings; otherwise there is one of
            `vocabulary` tokens for each side.
    """

    joint: bool = True


class TextTokenizerRecipe(Subwords):
    """How documents become tokens. "byte_bpe" with no more than bytes and control tokens is a model of bytes."""

    kind: Kind = "byte_bpe"


def learn(
    texts: Iterable[str],
    recipe: Subwords,
    control: Sequence[str],
    name: str,
    of: Literal["sentences", "documents"] = "sentences",
) -> Tokenizer:
    """Learn a vocabulary whose first tokens are `control`. The same texts always give the same one.

    Args:
        of: sentences are normalised first, documents are clean already.
    Raises:
        DataError: the texts don't give as many tokens as the recipe wants, or it has no room for the control tokens;
            `name` says which vocabulary.
    """
    distinct = list(dict.fromkeys(normalise(text) for text in texts) if of == "sentences" else dict.fromkeys(texts))
    alphabet: list[str] = []
    if recipe.kind != "byte_bpe":
        entries = 4 if recipe.kind == "wordpiece" else 2  # a letter is two tokens there; at least half are for pieces
        distinct, alphabet = _without_rare(distinct, (recipe.vocabulary - len(control)) // entries)
    tokenizer = _pipeline(recipe.kind, of == "sentences")
    with reported(lambda error: f"no vocabulary could be learnt from the {name}: {error}"):
        tokenizer.train_from_iterator(distinct, _trainer(recipe, list(control), alphabet), length=len(distinct))
    reached = tokenizer.get_vocab_size()
    wanted = f"a {recipe.kind} vocabulary of {recipe.vocabulary:,} tokens is"
    if reached < recipe.vocabulary:
        advice = f"set tokenizer.vocabulary to {reached:,} or less"
        raise DataError(f"{wanted} more than the {name} can give, which is {reached:,}; {advice}")
    if reached > recipe.vocabulary:
        advice = f"set tokenizer.vocabulary to {reached:,} or more"
        raise DataError(f"{wanted} less than the {name} need, which is {reached:,}; {advice}")
    return _plain_text_only(tokenizer, len(control))


def _without_rare(texts: list[str], most: int) -> tuple[list[str], list[str]]:
    """Replace characters that stand in the texts only once, or are not among the `most` frequent, by spaces.

    Returns the texts and the characters that are left. A vocabulary would spend tokens on them, and as unknown ones
    they teach the model what to do with those.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    often = sorted((-number, letter) for letter, number in counts.items() if number > 1)
    alphabet = sorted({letter for _, letter in often[: max(most, 1)]} | {" "})
    rare = {ord(letter): " " for letter in counts.keys() - set(alphabet)}
    return [text.translate(rare) for text in texts] if rare else texts, alphabet


def _pipeline(kind: Kind, prefixed: bool) -> Tokenizer:
    """Return an untrained tokenizer: how a text is cut into runs, the model, how tokens become a text.

    Where it is prefixed, a space is put before a text and taken away again.
    """
    if kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Prepend(" ") if prefixed else normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(_runs(" "), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *strip])
        return tokenizer
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNK]))
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL[UNK], max_input_chars_per_word=1000))
    else:
        tokenizer = Tokenizer(models.Unigram())
    spaces = [normalizers.Replace(" ", SPACE)]
    first = [*spaces, normalizers.Prepend(SPACE)] if prefixed else [normalizers.NFC(), *spaces]
    tokenizer.normalizer = normalizers.Sequence(first)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_runs(SPACE), "isolated")
    joined = [decoders.Replace(Regex(f"^{_CONTINUES}"), "")] if kind == "wordpiece" else []
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([*joined, decoders.Replace(SPACE, " "), decoders.Fuse(), *strip])
    return tokenizer


def _trainer(recipe: Subwords, control: list[str], alphabet: list[str]) -> trainers.Trainer:
    size = recipe.vocabulary
    if recipe.kind == "unigram":
        return trainers.UnigramTrainer(
            vocab_size=size, special_tokens=control, unk_token=SPECIAL[UNK], show_progress=False
        )
    if recipe.kind == "wordpiece":
        # Letters that continue a word would else be numbered in an arbitrary order.
        first = control + [_CONTINUES + letter for letter in alphabet if letter != " "]
        return trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, min_frequency=2, show_progress=False)
    letters = pre_tokenizers.ByteLevel.alphabet() if recipe.kind == "byte_bpe" else []
    return trainers.BpeTrainer(
        vocab_size=size, special_tokens=control, min_frequency=2, initial_alphabet=letters, show_progress=False
    )


def _plain_text_only(tokenizer: Tokenizer, control: int) -> Tokenizer:
    """Keep the control tokens' numbers, but let the tokenizer no longer look for them in texts.

    Of a unigram model, the scores are also freed from the order of a hash table: they are rounded, and the characters
    that the trainer puts in only so that all can be written, 0.0001 apart from the least score on, all get the least.
    """
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = []
    if data["model"]["type"] == "Unigram":
        first, pieces = data["model"]["vocab"][:control], data["model"]["vocab"][control:]
        least = min(score for _, score in pieces)
        put_in = least + 0.0001 * sum(len(piece) == 1 for piece, _ in pieces)
        scored = {p: round(least if len(p) == 1 and score <= put_in else score, 6) for p, score in pieces}
        data["model"]["vocab"] = first + sorted(scored.items(), key=lambda one: (-one[1], one[0]))
    return Tokenizer.from_str(json.dumps(data))


@contextlib.contextmanager
def reported(told: Callable[[BaseException], str]) -> Iterator[None]:
    """Turn the library's failures into a `DataError` that says what `told` makes of them.

    It raises nothing narrower than `Exception`, and panics, which are no `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):
            raise DataError(told(error)) from None
        raise


def parse_tokenizer(text: str, name: str) -> Tokenizer:
    """Make a tokenizer of the library's own JSON; raises `DataError` if it is none, with `name` in it."""
    with reported(lambda error: f"{name} is no tokenizer: {error}"):
        tokenizer: Tokenizer = Tokenizer.from_str(text)
    return tokenizer


def encode_each(encode: Callable[[list[T]], list[Encoding]], texts: Sequence[T]) -> list[Encoding]:
    """Encode texts at once; raises `DataError` for the first that the library can't take, with its beginning."""
    if len(texts) == 1:
        with reported(lambda error: f"the tokenizer can't take the text '{str(texts[0])[:80]}' ({error})"):
            return encode([texts[0]])
    try:
        with reported(str):
            return encode(list(texts))
    except DataError:
        return [encoding for text in texts for encoding in encode_each(encode, [text])]


def is_panic(error: BaseException) -> bool:
    """Tell whether this is a panic of a library in Rust, which `except Exception` doesn't catch."""
    return type(error).__name__ == "PanicException"
