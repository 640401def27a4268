"""Beam-4 translation speed beside Hugging Face's `generate` and CTranslate2, with the same weights.

    python benchmarks/translation.py [--json FILE] [--size base|small] [--vocabulary N] [--rounds 3] [--bf16]

200 sentences (lengths log-normal, median 18 tokens) are translated by each contender in turn, in one process, round
after round, so that the machine's moods reach all of them alike. Sentences come to everyone sorted by length. In the
first rounds each contender tries the batch sizes of `--batch`; after that it runs with the one that was best for it.

The model has the sizes of a Marian base model. Random weights write one token for ever, which says nothing of a
search. So a copier is put into the random model by hand: in its last layer each decoder position looks at the same
position of the source and takes over what stands there. The rest of the weights is noise that makes it uncertain.
Its outputs are about as long as the source, they end, and hypotheses compete.

Search settings are those that Marian checkpoints come with: 4 beams, length penalty 1 on the mean log-probability,
early_stopping=False, the padding token forbidden. Outputs are compared token for token with the reference's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from polyformer.generate import Search, SpecialTokens, Text, search, search_slots
from polyformer.loaded import load
from polyformer.native.kinds import Precision
from polyformer.native.library import library
from polyformer.native.machine import Machine
from polyformer.native.runner import NativeRunner, runner
from polyformer.parts.model import TransformerPart

Output = list[list[int]]
EOS = 0


class Sizes(NamedTuple):
    """Sizes of a Marian model; the last token of its vocabulary is the padding."""

    width: int
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    spread: float  # of the embeddings; the larger, the surer the model is

    @property
    def pad(self) -> int:
        """The padding token, with which the decoder starts too."""
        return self.vocabulary - 1


SIZES = {"base": Sizes(512, 6, 2048, 8, 58101, 0.045), "small": Sizes(256, 3, 1024, 4, 8192, 0.06)}


def copying_marian(sizes: Sizes, seed: int = 0) -> Any:
    """Return a `MarianMTModel` with random weights whose last layer copies the source."""
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(seed)
    width, heads = sizes.width, sizes.heads
    config = MarianConfig(
        vocab_size=sizes.vocabulary,
        d_model=width,
        encoder_layers=sizes.layers,
        decoder_layers=sizes.layers,
        encoder_ffn_dim=sizes.hidden,
        decoder_ffn_dim=sizes.hidden,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        max_position_embeddings=512,
        max_length=512,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=sizes.pad,
        decoder_start_token_id=sizes.pad,
        bad_words_ids=[[sizes.pad]],
        num_beams=4,
    )
    model = MarianMTModel(config).eval()
    model.generation_config.update(num_beams=4, max_length=512, bad_words_ids=[[sizes.pad]], forced_eos_token_id=EOS)
    # Positions are sines in the first half of the width and cosines in the second. The columns of the highest
    # frequencies are kept free of tokens, so that queries and keys made of them know nothing but the position.
    half, several = width // 2, width // heads // 2
    places = torch.zeros(width, width)
    for head in range(heads):
        for i in range(several):
            places[head * 2 * several + 2 * i, i] = places[head * 2 * several + 2 * i + 1, half + i] = 1
    with torch.no_grad():
        embedding = model.model.shared.weight
        embedding.normal_(std=sizes.spread)
        embedding[:, :several] = embedding[:, half : half + several] = 0
        embedding[sizes.pad] = 0  # as in trained models
        attention = model.model.decoder.layers[-1].encoder_attn
        attention.q_proj.weight += 4 * places
        attention.k_proj.weight += 4 * places
        attention.v_proj.weight += torch.eye(width)
        attention.out_proj.weight += 4 * torch.eye(width)
    return model


def make_sources(count: int, sizes: Sizes) -> Output:
    """Return sentences of random tokens, shortest first, each with the end token."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.empty(count).log_normal_(2.9, 0.6, generator=generator).clamp(3, 80).long().sort().values
    rows = (torch.randint(1, sizes.pad, (int(n) - 1,), generator=generator).tolist() for n in lengths)
    return [[*row, EOS] for row in rows]


def padded(rows: Output, pad: int) -> tuple[Tensor, Tensor]:
    """Return ids [B, T] and their mask."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, ids != pad


@dataclass
class Contender:
    """One that translates: sources and a batch size in, outputs without start, end and padding out.

    Attributes:
        trial: seconds with each batch size.
        seconds: of the rounds that count.
    """

    name: str
    run: Callable[[Output, int], Output]
    trial: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    output: Output = field(default_factory=list)

    @property
    def batch(self) -> int:
        """The batch size that was best."""
        return min(self.trial, key=lambda size: self.trial[size])

    def time(self, sources: Output, batch: int) -> float:
        """Translate once."""
        start = time.perf_counter()
        self.output = self.run(sources, batch)
        seconds = time.perf_counter() - start
        print(f"  {self.name}, {batch} sentences at a time: {seconds:.2f} s", file=sys.stderr, flush=True)
        return seconds


def in_batches(sources: Output, batch: int, translate: Callable[[Output], Output]) -> Output:
    """Translate `batch` sentences at a time."""
    return [row for start in range(0, len(sources), batch) for row in translate(sources[start : start + batch])]


def ours(name: str, model: TransformerPart, settings: Search, sizes: Sizes) -> Contender:
    """Return this library's search."""
    special = SpecialTokens(bos=sizes.pad, eos=EOS, pad=sizes.pad)

    def translate(rows: Output) -> Output:
        return [found[0].ids for found in search(model, *padded(rows, sizes.pad), settings, special)]

    return Contender(name, lambda sources, batch: in_batches(sources, batch, translate))


def native(model: TransformerPart, settings: Search, sizes: Sizes, weights: Precision, threads: int) -> Contender:
    """Return the same search over the native runtime, in whose slots sentences come and go."""
    special = SpecialTokens(bos=sizes.pad, eos=EOS, pad=sizes.pad)
    runners: dict[int, NativeRunner] = {}

    def translate(sources: Output, batch: int) -> Output:
        if batch not in runners:
            runners[batch] = runner(model, weights, Machine(settings.beams * batch, 512, threads))
        texts = [Text((sizes.pad,), row) for row in sources]
        return [found[0].ids for found in search_slots(runners[batch], texts, settings, special)]

    return Contender(f"native {weights}", translate)


def hugging_face(model: Any, sizes: Sizes) -> Contender:
    """Return the reference, with the settings of its own generation config."""

    def translate(rows: Output) -> Output:
        ids, mask = padded(rows, sizes.pad)
        found = model.generate(input_ids=ids, attention_mask=mask.long()).tolist()
        return [[i for i in row[1:] if i not in (EOS, sizes.pad)] for row in found]

    return Contender("Hugging Face", lambda sources, batch: in_batches(sources, batch, translate))


def ctranslate2(folder: Path, sizes: Sizes, kind: str, threads: int) -> Contender:
    """Return CTranslate2 on the same weights, with the nearest settings that it has."""
    import ctranslate2 as ct2
    from ctranslate2.converters import TransformersConverter

    class Names:
        """What the converter asks of a tokenizer: a name for each token."""

        eos_token, unk_token, special_tokens_map = "</s>", "<unk>", {}

        def get_vocab(self) -> dict[str, int]:
            return {name_of(i): i for i in range(sizes.vocabulary)}

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, *_: Any, **__: Any) -> Names:
            return Names()

    def name_of(i: int) -> str:
        return {EOS: "</s>", 1: "<unk>", sizes.pad: "<pad>"}.get(i, f"t{i}")

    converted = folder / "ctranslate2"
    if not converted.exists():
        Converter(str(folder)).convert(str(converted))
    model = ct2.Translator(str(converted), compute_type=kind, inter_threads=1, intra_threads=threads)
    ids = {name_of(i): i for i in range(sizes.vocabulary)}

    def run(sources: Output, batch: int) -> Output:
        named = [[name_of(i) for i in row] for row in sources]
        found = model.translate_batch(
            named, max_batch_size=batch, beam_size=4, length_penalty=1.0, max_decoding_length=511
        )
        return [[ids[token] for token in one.hypotheses[0]] for one in found]

    return Contender(f"CTranslate2 {kind}", run)


class Products(TorchDispatchMode):
    """Notes the matrix products with weights, to do them again and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.flops = 0.0
        self._rows: dict[int, Tensor] = {}

    def __torch_dispatch__(self, op: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.linear.default:
            count, width = args[0].numel() // args[0].shape[-1], args[0].shape[-1]
            rows = self._rows.setdefault(count * 2**20 + width, torch.randn(count, width))
            self.pairs.append((rows, args[1]))
            self.flops += 2.0 * count * args[1].numel()
        return op(*args, **(kwargs or {}))

    def seconds(self) -> float:
        """Return what they take alone."""
        with torch.inference_mode():
            start = time.perf_counter()
            for rows, weight in self.pairs:
                F.linear(rows, weight)
            return time.perf_counter() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 96])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="also ours in bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = SIZES[options.size]
    sizes = sizes._replace(vocabulary=options.vocabulary or sizes.vocabulary)
    with tempfile.TemporaryDirectory() as temporary:
        report = compare(options, sizes, Path(temporary))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def contenders(options: argparse.Namespace, sizes: Sizes, folder: Path) -> list[Contender]:
    """Return all who take part, this library and the reference first."""
    reference = copying_marian(sizes)
    reference.save_pretrained(folder)
    loaded = load(folder)
    settings = loaded.recommended()
    found = [ours("polyformer", loaded.model, settings, sizes), hugging_face(reference, sizes)]
    if library() is not None:
        kinds: tuple[Precision, ...] = ("fp32", "q8")
        found += [native(loaded.model, settings, sizes, kind, options.threads) for kind in kinds]
    if options.bf16:
        found.append(ours("polyformer bf16", load(folder, dtype=torch.bfloat16).model, settings, sizes))
    try:
        found += [ctranslate2(folder, sizes, kind, options.threads) for kind in ("float32", "int8")]
    except ImportError:
        print("ctranslate2 is not installed; it is left out")
    return found


def compare(options: argparse.Namespace, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Run all contenders in turn, print the table and return it."""
    sources = make_sources(options.sentences, sizes)
    everyone = contenders(options, sizes, folder)
    for one in everyone:
        one.run(sources[:4], 4)
    for batch in options.batch:
        for one in everyone:
            one.trial[batch] = one.time(sources, batch)
    for _ in range(options.rounds):
        for one in everyone:
            one.seconds.append(one.time(sources, one.batch))
    own, reference = everyone[:2]
    with Products() as noted:
        own.run(sources, own.batch)
    floor = statistics.median(noted.seconds() for _ in range(3))
    rows = [row_of(one, own, reference) for one in everyone]
    print(
        f"{options.sentences} sentences, beam 4, {sizes}, {options.threads} threads; medians of {options.rounds} rounds"
    )
    print(f"{'':18}{'batch':>6}{'seconds':>9}{'tokens/s':>10}{'x HF':>7}{'polyformer is':>15}{'same output':>13}")
    for row in rows:
        same = f"{row['same']}/{options.sentences}"
        print(
            f"{row['name']:18}{row['batch']:>6}{row['seconds']:>9.2f}{row['tokens_per_second']:>10.0f}"
            f"{row['times_hugging_face']:>7.2f}{row['ours_over_it']:>13.2f} x{same:>13}"
        )
    share = floor / statistics.median(own.seconds)
    print(
        f"its matrix products alone ({noted.flops / 1e9:.0f} GFLOP): {floor:.2f} s at {noted.flops / floor / 1e9:.0f} "
        f"GFLOP/s, {share:.0%} of polyformer's time"
    )
    return {
        "sizes": sizes._asdict(),
        "sentences": options.sentences,
        "threads": options.threads,
        "rows": rows,
        "matrix_products_seconds": floor,
        "matrix_products_share": share,
    }


def row_of(one: Contender, own: Contender, reference: Contender) -> dict[str, Any]:
    """Return a line of the table; ratios are medians of the rounds' ratios."""
    tokens = sum(len(row) + 1 for row in one.output)
    pairs = zip(one.seconds, own.seconds, reference.seconds, strict=True)
    ratios = [(theirs / mine, mine / ours) for mine, ours, theirs in pairs]
    return {
        "name": one.name,
        "batch": one.batch,
        "seconds": statistics.median(one.seconds),
        "trials": one.trial,
        "rounds": one.seconds,
        "tokens_per_second": tokens / statistics.median(one.seconds),
        "times_hugging_face": statistics.median(ratio for ratio, _ in ratios),
        "ours_over_it": statistics.median(ratio for _, ratio in ratios),
        "same": sum(a == b for a, b in zip(one.output, reference.output, strict=True)),
    }


if __name__ == "__main__":
    main()
