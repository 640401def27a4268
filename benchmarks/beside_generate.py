"""Writing speed of a GPT-2-like and a T5-like model beside the reference library's `generate` and CTranslate2.

    python benchmarks/beside_generate.py [--json FILE] [--model gpt2 t5] [--threads 2] [--rounds 3] [--busy]

Models have the sizes of the published ones (GPT-2: 12 layers of 768, 50,257 words; T5-small: 6 + 6 of 512, 32,128
words) and random weights, the very same for everyone. Such weights never end a text, so that everyone writes the same
number of tokens, all greedily: GPT-2 64 behind a prompt of 16, T5 32 for a source of 24. Contenders take turns, round
after round, in one process; figures are medians, and ratios those of the rounds. "same" is the share of tokens that
are the reference's, up to the first difference of each text.

On a machine that isn't quiet, `--busy` measures the processor's time of one thread in place of the clock's.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from polyformer.generate import Capacity, Engine, Limit, Request, Sampling, Search, SpecialTokens, Text, search_slots
from polyformer.loaded import load
from polyformer.native.kinds import Precision
from polyformer.native.machine import Machine
from polyformer.native.runner import runner

Rows = list[list[int]]
PROMPT, SOURCE = 16, 24
WRITTEN = {"gpt2": 64, "t5": 32}
BATCHES = (1, 8)


@dataclass
class Contender:
    """One that writes: prompts or sources in, what was written out.

    Attributes:
        seconds: of each round, by how many texts there were at once.
        found: what was written last, by the same.
    """

    name: str
    write: Callable[[Rows], Rows]
    seconds: dict[int, list[float]] = field(default_factory=dict)
    found: dict[int, Rows] = field(default_factory=dict)

    def round(self, given: Rows, clock: Callable[[], float]) -> None:
        """Write once, and note how long it took."""
        start = clock()
        self.found[len(given)] = self.write(given)
        self.seconds.setdefault(len(given), []).append(clock() - start)


def reference(kind: str) -> Any:
    """Return a random model of the reference library."""
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    else:
        sizes = {"d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    model.generation_config.eos_token_id = None
    return model.eval()


def theirs(kind: str, model: Any) -> Contender:
    """Return the reference library's generate."""
    count = WRITTEN[kind]

    def write(given: Rows) -> Rows:
        ids = torch.tensor(given)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
        )
        return [row[-count:] for row in out.tolist()]

    return Contender("reference, fp32", write)


def engine(kind: str, model: Any, weights: Precision, threads: int) -> Contender:
    """Return the engine over the native runtime."""
    run = runner(model, weights, Machine(max(BATCHES), 128, threads))

    def write(given: Rows) -> Rows:
        working = Engine(run, Capacity())
        settings = Sampling(limit=WRITTEN[kind])
        asked = [Request(row, settings) if kind == "gpt2" else Request([0], settings, source=row) for row in given]
        handles = [working.submit(one) for one in asked]
        working.work()
        return [one.result().ids for one in handles]

    return Contender(f"engine, {weights}", write)


def searched(kind: str, model: Any, weights: Precision, threads: int) -> Contender:
    """Return a greedy search over the native runtime, which finds the best tokens there."""
    run = runner(model, weights, Machine(max(BATCHES), 128, threads))
    special = SpecialTokens(1, 1, 1)  # the end token has no share in random weights' texts

    def write(given: Rows) -> Rows:
        texts = [Text(row) if kind == "gpt2" else Text([0], row) for row in given]
        found = search_slots(run, texts, Search(1, limit=Limit(WRITTEN[kind])), special)
        return [one[0].ids for one in found]

    return Contender(f"search, {weights}", write)


def ctranslate2(kind: str, folder: Path, compute: str, threads: int, vocabulary: int) -> Contender:
    """Return CTranslate2 on the same weights."""
    import ctranslate2 as peer
    from ctranslate2.converters import TransformersConverter

    names = [f"t{i}" for i in range(vocabulary)]

    class Names:
        """What the converter asks of a tokenizer: a name for each token."""

        bos_token, eos_token, unk_token, pad_token = "t0", "t1", "t2", "t0"

        def __init__(self) -> None:
            self.special_tokens_map: dict[str, str] = {}

        def get_vocab(self) -> dict[str, int]:
            return {name: i for i, name in enumerate(names)}

        def convert_ids_to_tokens(self, i: int) -> str:
            return names[i]

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, *_: Any, **__: Any) -> Names:
            return Names()

    made = folder / "ctranslate2"
    if not made.exists():
        Converter(str(folder)).convert(str(made))
    of = peer.Generator if kind == "gpt2" else peer.Translator
    model = of(str(made), compute_type=compute, inter_threads=1, intra_threads=threads)
    count = WRITTEN[kind]

    def write(given: Rows) -> Rows:
        named = [[names[i] for i in row] for row in given]
        if kind == "gpt2":
            bounds = {"max_length": count, "min_length": count, "include_prompt_in_result": False}
            return [one.sequences_ids[0][:count] for one in model.generate_batch(named, **bounds)]
        found = model.translate_batch(named, beam_size=1, max_decoding_length=count, min_decoding_length=count)
        return [[int(name[1:]) for name in one.hypotheses[0]] for one in found]

    return Contender(f"CTranslate2, {compute}", write)


def contenders(kind: str, folder: Path, threads: int) -> list[Contender]:
    """Return all who write, the reference first."""
    model = reference(kind)
    model.save_pretrained(folder)
    ours = load(folder).model
    found = [theirs(kind, model)]
    for weights in ("fp32", "q8"):
        found += [engine(kind, ours, weights, threads), searched(kind, ours, weights, threads)]  # type: ignore[arg-type]
    try:
        found += [ctranslate2(kind, folder, one, threads, model.config.vocab_size) for one in ("float32", "int8")]
    except ImportError:
        print("ctranslate2 is not installed; it is left out")
    return found


def prompts(kind: str, count: int) -> Rows:
    """Return random tokens."""
    chance = torch.Generator().manual_seed(count)
    length = PROMPT if kind == "gpt2" else SOURCE
    return torch.randint(3, 30000, (count, length), generator=chance).tolist()


def same(found: Rows, wanted: Rows) -> float:
    """Return the share of tokens that are equal, up to the first that isn't."""
    shares = []
    for row, other in zip(found, wanted, strict=True):
        alike = next((i for i, pair in enumerate(zip(row, other, strict=False)) if pair[0] != pair[1]), len(other))
        shares.append(alike / len(other))
    return statistics.mean(shares)


def main() -> None:
    """Measure and print."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--json", type=Path)
    asked.add_argument("--model", nargs="+", choices=WRITTEN, default=list(WRITTEN))
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--busy", action="store_true")
    options = asked.parse_args()
    clock = time.process_time if options.busy else time.perf_counter
    threads = 1 if options.busy else options.threads
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    report = {}
    for kind in options.model:
        with tempfile.TemporaryDirectory() as folder:
            everyone = contenders(kind, Path(folder), threads)
            for one in everyone:
                one.write(prompts(kind, 1))
            for _ in range(options.rounds):
                for count in BATCHES:
                    for one in everyone:
                        one.round(prompts(kind, count), clock)
        report[kind] = told(kind, everyone)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def told(kind: str, everyone: list[Contender]) -> list[dict[str, Any]]:
    """Print a table and return it."""
    base, rows = everyone[0], []
    print(
        f"{kind}, {WRITTEN[kind]} tokens each{'':8}"
        + "".join(f"{f'{n} at once':>12}{'x ref':>7}{'same':>6}" for n in BATCHES)
    )
    for one in everyone:
        row: dict[str, Any] = {"name": one.name}
        line = f"{one.name:30}"
        for count in BATCHES:
            speed = count * WRITTEN[kind] / statistics.median(one.seconds[count])
            ratios = [b / a for a, b in zip(one.seconds[count], base.seconds[count], strict=True)]
            ratio, alike = statistics.median(ratios), same(one.found[count], base.found[count])
            row[str(count)] = {"tokens_per_second": speed, "times_reference": ratio, "same": alike}
            line += f"{speed:12.1f}{ratio:7.2f}{alike:6.0%}"
        print(line)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
