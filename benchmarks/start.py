"""How long a cold process takes to its first token, and how much memory at most, beside what it must import.

    python benchmarks/start.py [MODEL.gguf] [--json FILE] [--rounds 5] [--tokens 16]

Each line is a process of its own, started anew in every round; all take turns, so that the machine's moods reach all
alike. "first" is the time from its start to the first byte of the answer (of imports: to their end), the best and the
median of the rounds; "processor" is the processor's time until the end, the least, which a busy machine changes
little; "peak" is the largest resident memory. The peak is compared with what counts as needed: the file, the cache of
the text, and what the imports alone hold.

The reference library takes part where it is installed, with the same weights in single precision in a folder;
llama.cpp where llama-cpp-python is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from polyformer.loaded.ready import ready_path

PROMPT = "The capital of France is"

IMPORTS = """
import numpy, tokenizers, typer.main, typer._adapters
import polyformer.cli, polyformer.generate.engine, polyformer.loaded.start, polyformer.data.checkpoint_tokenizer
"""

REFERENCE = """
import os, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
given = tokenizer(sys.argv[2], return_tensors="pt")
for count in (1, int(sys.argv[3])):
    found = model.generate(**given, max_new_tokens=count, do_sample=False)
    os.write(1, tokenizer.decode(found[0, given.input_ids.shape[1] :]).encode() or b" ")
"""

LLAMA = """
import os, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], verbose=False, n_ctx=512, n_threads=len(os.sched_getaffinity(0)))
for piece in model(sys.argv[2], max_tokens=int(sys.argv[3]), temperature=0, stream=True):
    os.write(1, piece["choices"][0]["text"].encode() or b" ")
"""


@dataclass
class Contender:
    """A command, what it prints before the answer, and what was measured.

    Attributes:
        kept: whether plans that earlier processes kept are there; otherwise each finds an empty cache.
    """

    name: str
    command: list[str]
    before: int = 0
    kept: bool = True
    first: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)

    def run(self, cache: str) -> None:
        """Run it once, cold; raises `RuntimeError` if it fails."""
        with tempfile.TemporaryDirectory() as empty:
            own = {**os.environ, "XDG_CACHE_HOME": cache if self.kept else empty}
            begun = time.perf_counter()
            process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=own)
            assert process.stdout is not None
            assert process.stderr is not None
            count, first = 0, 0.0
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                count += len(chunk)
                first = first or (time.perf_counter() - begun if count > self.before else 0.0)
            said = process.stderr.read().decode("utf-8", "replace")
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not first:
            raise RuntimeError(said.strip().splitlines()[-1] if said.strip() else f"{self.name} said nothing")
        self.first.append(first)
        self.processor.append(used.ru_utime + used.ru_stime)
        self.peak.append(used.ru_maxrss * 1024)

    def told(self) -> dict[str, float]:
        """Return the figures."""
        return {
            "best": min(self.first),
            "median": statistics.median(self.first),
            "processor": min(self.processor),
            "peak": max(self.peak),
        }


def contenders(model: Path, tokens: int, folder: Path) -> list[Contender]:
    """Return all that can take part; the model is saved into a folder for the reference library."""
    python = [sys.executable, "-c"]
    end = "import os; os.write(1, b'.')"
    write = [sys.executable, "-m", "polyformer", "generate", str(model), PROMPT, "--max-tokens", str(tokens)]
    asked = [str(model), PROMPT, str(tokens)]
    found = [
        Contender("python alone", [*python, end]),
        Contender("imports", [*python, IMPORTS + end]),
        Contender("imports, with PyTorch", [*python, IMPORTS + "import torch\n" + end]),
        Contender("generate", write, len(PROMPT)),
        Contender("generate, the first time", write, len(PROMPT), kept=False),
        Contender("generate --weights pytorch", [*write, "--weights", "pytorch"], len(PROMPT)),
    ]
    if importlib.util.find_spec("transformers"):
        saved = "import sys, polyformer as pf; pf.save(pf.load(sys.argv[1]), sys.argv[2])"
        subprocess.run([*python, saved, str(model), str(folder)], check=True)
        found.append(Contender("the reference library", [*python, REFERENCE, str(folder), *asked[1:]]))
    if importlib.util.find_spec("llama_cpp"):
        found.append(Contender("llama.cpp", [*python, LLAMA, *asked]))
    return found


def needs(model: Path, tokens: int, imports: float) -> tuple[float, str]:
    """Return the bytes that a process can't do without, and what they are for."""
    from polyformer.loaded import Writer, open_writer  # late: a child counts as its own what its parent holds

    writer = open_writer(model)
    assert isinstance(writer, Writer)
    cache = writer.runner(1).bytes_for(len(writer.texts.encode(PROMPT)) + tokens)
    file = model.stat().st_size
    told = f"{file / 1e6:.0f} MB of file, {cache / 1e6:.1f} MB of cache, {imports / 1e6:.0f} MB of imports"
    return file + cache + imports, told


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path("smollm2"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    asked = parser.parse_args()
    model = ready_path(asked.model).resolve()
    with tempfile.TemporaryDirectory() as cache:
        found = contenders(model, asked.tokens, Path(cache) / "folder")
        next(one for one in found if one.name == "generate").run(cache)  # so that its plan is there, and files are read
        for one in found:
            one.first, one.processor, one.peak = [], [], []
        for _ in range(asked.rounds):
            for one in list(found):
                try:
                    one.run(cache)
                except RuntimeError as error:
                    print(f"{one.name} takes no part: {error}", file=sys.stderr)
                    found.remove(one)
    told = {one.name: one.told() for one in found}
    print(f"{'':28}{'first, best':>12}{'median':>9}{'processor':>11}{'peak':>9}")
    for name, figures in told.items():
        seconds = f"{figures['best']:10.2f} s{figures['median']:7.2f} s{figures['processor']:9.2f} s"
        print(f"{name:28}{seconds}{figures['peak'] / 1e6:6.0f} MB")
    needed, told_of = needs(model, asked.tokens, told["imports"]["peak"])
    share = told["generate"]["peak"] / needed
    print(f"\nneeded: {told_of}; the peak of generate is {share:.2f} × that")
    if asked.json:
        asked.json.write_text(json.dumps({"contenders": told, "needed": needed, "share": share}, indent=1))


if __name__ == "__main__":
    main()
