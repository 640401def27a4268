r"""Whether the native runtime writes what the reference library writes, and what stands behind the first difference.

    python benchmarks/exactness.py [MODEL] [--json FILE] [--tokens 200] [--prompts 20] [--forms fp32,q8,as\ stored]

MODEL is a GGUF file or a Hugging Face folder of a decoder-only model. Each form writes so many tokens behind each
prompt, always the likeliest. The reference library is then given the whole texts, in single precision and with the very
numbers that the form's matrices stand for (rounded as the form rounds them; a stored form's blocks as floats): so each
text is compared until its first difference, and all scores of all its places are, in one pass.

A form's scores differ from the reference's by rounding: of sums in another order, and, where matrices are coded, of
what goes into products to 8 bits. `error` is ‖ours - reference‖ / ‖reference‖ over all places. `swing` is what that
does to a choice: the root mean square, over all places, of the change in the distance between the reference's two
likeliest tokens. Where a text first differs, `margin` is how much more the reference gives its own token than ours. A
margin below three swings is a tie within rounding; any other counts as wrong, and the program ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polyformer as pf
from polyformer.errors import PolyformerError
from polyformer.generate import Engine, Request, Rows, Sampling
from polyformer.loaded import Loaded
from polyformer.loaded.ready import ready_path
from polyformer.native.given import from_tensors
from polyformer.native.kinds import Precision, kinds_for
from polyformer.native.lowering import lower
from polyformer.native.machine import Machine
from polyformer.native.runner import NativeRunner, runner
from polyformer.native.words import packed_weights

TIE = 3.0
GROUP = 32
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Water boils at a lower temperature on a mountain because",
    "To sort a list in Python,",
    "The three branches of government are",
    "A good recipe for bread begins with",
    "In the year 1969,",
    "Dear Sir or Madam, I am writing to",
    "The difference between a virus and a bacterium is",
    "def fibonacci(n):",
    "My favourite season is autumn, since",
    "The train left the station at noon and",
    "Photosynthesis is the process by which",
    "The main character of the novel",
    "If a triangle has sides of 3, 4 and 5, then",
    "She opened the door and saw",
    "The history of the Roman Empire",
    "Electric cars are",
    "How do I make my garden attract more bees?",
    "The most important thing about learning a language is",
)


@dataclass
class Text:
    """A text that a form wrote.

    Attributes:
        same: tokens before the first difference; all of them where there is none.
        ours, theirs: the tokens there.
        margin: the reference's score of its token less that of ours.
    """

    prompt: str
    written: int
    same: int
    ours: str | None = None
    theirs: str | None = None
    margin: float | None = None


@dataclass
class Form:
    """What was found of one form; `texts` are those that it wrote."""

    name: str
    texts: list[Text]
    error: float
    swing: float
    agreement: float
    seconds: float

    @property
    def wrong(self) -> list[Text]:
        """The texts whose first difference is no tie."""
        return [one for one in self.texts if one.margin is not None and one.margin >= TIE * self.swing]


def stands_for(tensor: Tensor, kind: str) -> Tensor:
    """Return the numbers [N, K] that a matrix's codes stand for: groups of 32, with scales of half precision."""
    if kind == "f32":
        return tensor
    pad = -tensor.shape[1] % GROUP
    groups = torch.nn.functional.pad(tensor.float(), (0, pad)).unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if kind == "q8":
        low, scale, least, most = torch.zeros_like(low), groups.abs().amax(-1, keepdim=True) / 127, -127, 127
    else:
        low, least, most = low.half().float(), 0, 15
        scale = (high - low) / 15
    scale = scale.half().float()
    codes = ((groups - low) * torch.where(scale != 0, 1 / scale, 0)).round().clamp(least, most)
    return (codes * scale + low).flatten(1)[:, : tensor.shape[1]]


def rounded(loaded: Loaded, form: Precision) -> None:
    """Put the numbers that a form's matrices stand for in the place of a model's own."""
    program, tensors = lower(loaded.spec), loaded.model.state_dict()
    give, kind = from_tensors(program, tensors, 1), kinds_for(program, form)
    for path in packed_weights(program):
        if path in tensors:
            tensors[path].copy_(stands_for(tensors[path], kind(path, give(path))))


def reference(loaded: Loaded) -> Any:
    """Return the reference library's model of the same numbers."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        pf.save(loaded, Path(folder) / "model")
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
        return model.eval()


def compared(
    run: NativeRunner, peer: Any, loaded: Loaded, prompts: list[str], tokens: int
) -> Iterator[tuple[Text, Tensor]]:
    """Write behind all prompts, and yield each text with its differences: of all scores, and of the two likeliest."""
    engine = Engine(run)
    rows = loaded.texts.encode_batch(prompts)
    answers = [one.result() for one in [engine.submit(Request(row, Sampling(limit=tokens))) for row in rows]]
    for prompt, row, answer in zip(prompts, rows, answers, strict=True):
        ids = [*row, *answer.ids]
        run.clear(0)
        ours = torch.as_tensor(run.step(Rows([0] * len(ids), list(range(len(ids))), ids), list(range(len(ids)))))
        run.clear(0)
        with torch.inference_mode():
            theirs = peer(torch.tensor([ids])).logits[0]
        likely, best = theirs.topk(2, -1)
        swing = (ours.gather(1, best) - likely).diff(dim=1).flatten()
        figures = torch.stack(((ours - theirs).square().sum(-1), theirs.square().sum(-1), swing.square()))
        figures = torch.cat((figures, (ours.argmax(-1) == best[:, 0]).float()[None]))
        choices, places = best[:, 0].tolist(), range(len(row) - 1, len(ids) - 1)
        differs = next((i for i in places if choices[i] != ids[i + 1]), None)
        if differs is None:
            yield Text(prompt, len(answer.ids), len(answer.ids)), figures
            continue
        own, other = ids[differs + 1], choices[differs]
        words = [loaded.texts.decode([one]) for one in (own, other)]
        margin = float(theirs[differs, other] - theirs[differs, own])
        yield Text(prompt, len(answer.ids), differs + 1 - len(row), *words, margin), figures


def measured(path: Path, form: Precision, prompts: list[str], asked: argparse.Namespace) -> Form:
    """Compare one form."""
    begun = time.perf_counter()
    machine = Machine(slots=len(prompts), room=asked.tokens + 128, threads=asked.threads)
    loaded = pf.load(path, dtype=torch.float32)
    from_file = path.is_file() and form == "as stored"
    run = runner(path if from_file else loaded.model, form, machine)
    if not from_file:
        rounded(loaded, form)
    found = list(compared(run, reference(loaded), loaded, prompts, asked.tokens))
    sums = torch.cat([figures for _, figures in found], 1).double()
    off, whole, swing, agrees = sums.mean(1).tolist()
    error, seconds = (off / whole) ** 0.5, time.perf_counter() - begun
    return Form(form, [text for text, _ in found], error, swing**0.5, agrees, seconds)


def table(forms: list[Form], tokens: int) -> str:
    """Return the figures for people to read."""
    lines = [f"{'form':<10} {'texts':>6} {'whole':>6} {'ties':>5} {'wrong':>6} {'agree':>8} {'error':>9} {'swing':>9}"]
    for one in forms:
        whole = sum(text.margin is None for text in one.texts)
        ties = len(one.texts) - whole - len(one.wrong)
        counts = f"{one.name:<10} {len(one.texts):>6} {whole:>6} {ties:>5} {len(one.wrong):>6}"
        lines.append(f"{counts} {one.agreement:>8.2%} {one.error:>9.1e} {one.swing:>9.1e}")
    for one in forms:
        for text in one.texts:
            if text.margin is not None:
                told = f"{one.name}: after {text.same} of {tokens} tokens of {text.prompt[:30]!r}"
                lines.append(f"{told}: {text.ours!r} for {text.theirs!r}, {text.margin / one.swing:.2f} swings")
    return "\n".join(lines)


def main() -> None:
    """Compare all forms and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", nargs="?", type=Path, default=Path("smollm2"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--forms", default="fp32,q8,as stored")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    try:
        path, prompts = ready_path(asked.model), list(PROMPTS[: max(asked.prompts, 1)])
        forms = [measured(path, form, prompts, asked) for form in asked.forms.split(",")]
    except PolyformerError as error:
        sys.exit(f"exactness: {error}")
    print(table(forms, asked.tokens))
    if asked.json is not None:
        found = [asdict(one) | {"wrong": len(one.wrong)} for one in forms]
        asked.json.write_text(json.dumps({"model": str(asked.model), "tokens": asked.tokens, "forms": found}, indent=1))
    sys.exit(any(one.wrong for one in forms))


if __name__ == "__main__":
    main()
