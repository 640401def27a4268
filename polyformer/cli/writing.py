"""Verbs that write: continue texts, and chat."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from polyformer.cli.common import Adapter, AsJson, Model, Weights, app, lines_of_input, load_writer
from polyformer.cli.sampling import samples
from polyformer.errors import PolyformerError, RunError

if TYPE_CHECKING:
    from polyformer.generate import Answer, Engine, Handle, Sampling
    from polyformer.loaded import Loaded, Writer

Texts = Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Standard input, line by line, if none.")]
Stats = Annotated[bool, typer.Option("--stats", help="Tell how fast it was, on the error stream or in the JSON.")]
LEAVE = ("/exit", "/quit")


@app.command(epilog='Example: polyformer generate smollm2 "The capital of France is" --max-tokens 20 --stats')
@samples()
def generate(
    model: Model,
    asked: Any,
    prompts: Texts = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each text is a message, put in the model's chat template.")
    ] = False,
    adapter: Adapter = None,
    weights: Weights = None,
    as_json: AsJson = False,
    stats: Stats = False,
) -> None:
    """Continue texts, or answer them with an encoder-decoder model, all together, and print them as they come."""
    sampling, guess = asked
    loaded = load_writer(model, weights, guess, adapter)
    searches = loaded.reads_source and not sampling.temperature
    if searches and guess is not None:
        raise RunError(
            "a search judges all that it writes; --guess is for texts that are sampled or taken as they come"
        )
    engine = loaded.engine(guess=guess)
    for some in [prompts] if prompts else lines_of_input():
        if searches and not chat:
            _searched(cast("Loaded", loaded), some, sampling, as_json)
            continue
        if chat:
            requests = loaded.chat_requests([[{"role": "user", "content": one}] for one in some], sampling)
        else:
            requests = loaded.requests(some, sampling)
        clock = Clock()
        for prompt, handle in zip(some, [engine.submit(one) for one in requests], strict=True):
            if not as_json:
                _shown(handle, clock, "" if chat or loaded.reads_source else prompt)
            told = {"prompt": prompt, **_told(handle.result())}
            if as_json:
                typer.echo(json.dumps(told | ({"stats": clock.told(engine)} if stats else {}), ensure_ascii=False))
        if stats and not as_json:
            typer.echo(clock.sentence(engine), err=True)


@app.command(epilog="Example: polyformer chat smollm2 --system 'Answer in one sentence.'")
@samples(limit=512, temperature=0.7, top_p=0.9)
def chat(
    model: Model,
    asked: Any,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    adapter: Adapter = None,
    weights: Weights = None,
    stats: Stats = False,
) -> None:
    """Talk with a model: /clear begins anew, /exit leaves, and an interrupt stops an answer.

    Standard input may be a file or a pipe: each line is a message, and each answer is printed.
    """
    from polyformer.generate import Capacity

    loaded = load_writer(model, weights, asked.guess, adapter)
    first = [] if system is None else [{"role": "system", "content": system}]
    talk = Talk(loaded, loaded.engine(2, Capacity(kept=1), asked.guess), asked.sampling, list(first))
    if sys.stdin.isatty():
        typer.echo("/clear begins anew, /exit leaves; Ctrl-C stops an answer.", err=True)
    for line in _messages():
        if line in LEAVE:
            return
        if line == "/clear":
            talk.messages = list(first)
            continue
        try:
            clock = talk.answer(line)
        except PolyformerError as error:
            if not sys.stdin.isatty():
                raise
            typer.echo(f"polyformer: {error}", err=True)
            continue
        if stats:
            typer.echo(clock.sentence(talk.engine), err=True)


@dataclass
class Talk:
    """A conversation and who answers in it."""

    loaded: Loaded | Writer
    engine: Engine
    sampling: Sampling
    messages: list[dict[str, str]]

    def answer(self, said: str) -> Clock:
        """Print the answer to what was said, as it comes, and remember both; if there is none, neither."""
        messages = [*self.messages, {"role": "user", "content": said}]
        seeded = self.sampling.replace(seed=self.sampling.seed + len(messages))
        (request,) = self.loaded.chat_requests([messages], seeded)
        clock, handle = Clock(), self.engine.submit(request)
        with _interrupts(handle):
            _shown(handle, clock, "")
        self.messages = [*messages, {"role": "assistant", "content": handle.result().text.strip()}]
        return clock


@dataclass
class Clock:
    """Measures writing from its beginning on."""

    begun: float = field(default_factory=time.perf_counter)
    first: float | None = None

    def token(self) -> None:
        """Note that something was written."""
        if self.first is None:
            self.first = time.perf_counter() - self.begun

    def told(self, engine: Engine) -> dict[str, Any]:
        """Return the figures."""
        seconds, counts = time.perf_counter() - self.begun, engine.counts
        told: dict[str, Any] = {
            "seconds": seconds,
            "written": counts.written,
            "steps": counts.steps,
            "rows": counts.rows,
        }
        told |= {"reused": counts.reused, "first_token_seconds": self.first}
        return told if engine.guesser is None else told | {"guesses": engine.guesses.to_data()}

    def sentence(self, engine: Engine) -> str:
        """Return the figures for a person, and set the engine's counts to nothing."""
        told, guesses = self.told(engine), engine.guesses
        engine.counts, engine.guesses = type(engine.counts)(), type(guesses)()
        rate = told["written"] / max(told["seconds"], 1e-9)
        first = "" if self.first is None else f", the first after {self.first:.2f} s"
        reused = f", {told['reused']} of the prompt found in the cache" if told["reused"] else ""
        guessed = ""
        if engine.guesser is not None:
            left = f", left off in {guesses.stopped} of the texts" if guesses.stopped else ""
            right = f"{guesses.acceptance:.0%} of {guesses.guessed} guesses right"
            guessed = f"; {right}, {guesses.gain:.2f} tokens a pass{left}"
        return f"{told['written']} tokens in {told['seconds']:.2f} s, {rate:.1f} tokens/s{first}{reused}{guessed}"


def _shown(handle: Handle, clock: Clock, before: str) -> None:
    """Print a text as it comes; what stands before an answer's first letter is left out."""
    typer.echo(before, nl=False)
    begun = bool(before)
    for delta in handle:
        clock.token()
        text = delta.text if begun else delta.text.lstrip()
        begun = begun or bool(text)
        if text:
            typer.echo(text, nl=False)
            sys.stdout.flush()
    typer.echo()


def _told(answer: Answer) -> dict[str, Any]:
    """Return an answer as data."""
    tokens = [
        {"id": one.id, "log_probability": one.log_probability, "likeliest": [list(pair) for pair in one.likeliest]}
        for one in answer.tokens
        if one.likeliest
    ]
    told: dict[str, Any] = {"text": answer.text, "reason": answer.reason, "count": len(answer.ids)}
    return told | {"log_probability": answer.log_probability} | ({"tokens": tokens} if tokens else {})


def _searched(loaded: Loaded, texts: list[str], sampling: Sampling, as_json: bool) -> None:
    """Print what the search that the model recommends finds."""
    from polyformer.generate import Limit, Sampling

    if sampling != Sampling(limit=sampling.limit, seed=sampling.seed):
        raise RunError("an encoder-decoder model is searched unless it is sampled: give --temperature too")
    search = loaded.recommended().replace(limit=Limit(sampling.limit))
    for prompt, found in zip(texts, loaded.translate(texts, search), strict=True):
        told = {"prompt": prompt, "text": found[0].text, "log_probability": found[0].log_probability}
        typer.echo(json.dumps(told, ensure_ascii=False) if as_json else found[0].text)


def _messages() -> Iterator[str]:
    """Yield what is typed, or comes through a pipe. An interrupt while nothing is answered only says how to leave."""
    if not sys.stdin.isatty():
        yield from (line.strip() for lines in lines_of_input() for line in lines if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives the line editing and history
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo(err=True)
            return
        except KeyboardInterrupt:
            typer.echo("\n/exit leaves", err=True)
            continue
        if line:
            yield line


@contextlib.contextmanager
def _interrupts(handle: Handle) -> Iterator[None]:
    """While an answer is written, an interrupt stops it; a second one is an interrupt as always."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        handle.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
