"""Verbs that write: continue texts, and chat."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from polyformer.cli.common import AsJson, Model, app, lines_of_input
from polyformer.cli.opening import opening
from polyformer.cli.sampling import samples
from polyformer.errors import PolyformerError, RunError

if TYPE_CHECKING:
    from polyformer.generate import Answer, Counts, Engine, Handle, Sampling
    from polyformer.generate.speculative import Guesses
    from polyformer.loaded import Loaded, Writer

Texts = Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Standard input, line by line, if none.")]
Stats = Annotated[bool, typer.Option("--stats", help="Tell how fast it was, on the error stream or in the JSON.")]
LEAVE = ("/exit", "/quit")


@app.command(epilog='Example: polyformer generate smollm2 "The capital of France is" --max-tokens 20 --stats')
@opening
@samples()
def generate(
    model: Model,
    sampling: Any,
    opened: Any,
    prompts: Texts = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each text is a message, put in the model's chat template.")
    ] = False,
    as_json: AsJson = False,
    stats: Stats = False,
) -> None:
    """Continue texts, or answer them with an encoder-decoder model, all together, and print them as they come."""
    loaded = opened.writer(model)
    searches = loaded.reads_source and not sampling.temperature
    if searches and opened.guess is not None:
        raise RunError(
            "a search judges all that it writes; --guess is for texts that are sampled or taken as they come"
        )
    engine = None if searches and not chat else loaded.engine(guess=opened.guess)
    for some in [prompts] if prompts else lines_of_input():
        if engine is None:
            _searched(cast("Loaded", loaded), some, sampling, as_json, stats)
            continue
        if chat:
            asked = loaded.chat_requests([[{"role": "user", "content": one}] for one in some], sampling)
        else:
            asked = loaded.requests(some, sampling)
        clock = Clock()
        for prompt, handle in zip(some, [engine.submit(one) for one in asked], strict=True):
            if not as_json:
                _shown(handle, clock, "" if chat or loaded.reads_source else prompt)
            told = {"prompt": prompt, **_told(handle.result())}
            if as_json:
                figures = {"stats": clock.told(*_counted(engine))} if stats else {}
                typer.echo(json.dumps(told | figures, ensure_ascii=False))
        if stats and not as_json:
            _print_counts(clock, engine)


@app.command(epilog="Example: polyformer chat smollm2 --system 'Answer in one sentence.'")
@opening
@samples(limit=512, temperature=0.7, top_p=0.9)
def chat(
    model: Model,
    sampling: Any,
    opened: Any,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    stats: Stats = False,
) -> None:
    """Talk with a model: /clear begins anew, /exit leaves, and an interrupt stops an answer.

    Standard input may be a file or a pipe: each line is a message, and each answer is printed.
    """
    from polyformer.generate import Capacity

    loaded = opened.writer(model)
    first = [] if system is None else [{"role": "system", "content": system}]
    talk = Talk(loaded, loaded.engine(2, Capacity(kept=1), opened.guess), sampling, list(first))
    if sys.stdin.isatty():
        if sampling.temperature:  # tokens are drawn by PyTorch, which is there then when the first line is typed
            threading.Thread(target=importlib.import_module, args=("torch",)).start()
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
            _print_counts(clock, talk.engine)


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

    def told(self, counts: Counts, guesses: Guesses | None = None) -> dict[str, Any]:
        """Return the figures."""
        told: dict[str, Any] = {
            "seconds": time.perf_counter() - self.begun,
            "written": counts.written,
            "steps": counts.steps,
        }
        told |= {"rows": counts.rows, "reused": counts.reused, "first_token_seconds": self.first}
        return told if guesses is None else told | {"guesses": guesses.to_data()}

    def sentence(self, counts: Counts, guesses: Guesses | None = None) -> str:
        """Return the figures for a person."""
        told = self.told(counts)
        rate = told["written"] / max(told["seconds"], 1e-9)
        first = "" if self.first is None else f", the first after {self.first:.2f} s"
        reused = f", {told['reused']} of the prompt found in the cache" if told["reused"] else ""
        guessed = ""
        if guesses is not None:
            left = f", left off in {guesses.stopped} of the texts" if guesses.stopped else ""
            right = f"{guesses.acceptance:.0%} of {guesses.guessed} guesses right"
            guessed = f"; {right}, {guesses.gain:.2f} tokens a pass{left}"
        return f"{told['written']} tokens in {told['seconds']:.2f} s, {rate:.1f} tokens/s{first}{reused}{guessed}"


def _counted(engine: Engine) -> tuple[Counts, Guesses | None]:
    """Return what an engine has counted."""
    return engine.counts, None if engine.guesser is None else engine.guesses


def _print_counts(clock: Clock, engine: Engine) -> None:
    """Print an engine's figures, and set its counts to nothing."""
    typer.echo(clock.sentence(*_counted(engine)), err=True)
    engine.counts, engine.guesses = type(engine.counts)(), type(engine.guesses)()


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


def _searched(loaded: Loaded, texts: list[str], sampling: Sampling, as_json: bool, stats: bool) -> None:
    """Print what the search that the model recommends finds."""
    from polyformer.generate import Counts, Limit, Sampling

    if sampling != Sampling(limit=sampling.limit, seed=sampling.seed):
        raise RunError("an encoder-decoder model is searched unless it is sampled: give --temperature too")
    search = loaded.recommended().replace(limit=Limit(sampling.limit))
    clock, counts = Clock(), Counts()
    answers = loaded.translate(texts, search, counts=counts)
    figures = {"stats": clock.told(counts)} if stats else {}
    for prompt, found in zip(texts, answers, strict=True):
        told = {"prompt": prompt, "text": found[0].text, "log_probability": found[0].log_probability, **figures}
        typer.echo(json.dumps(told, ensure_ascii=False) if as_json else found[0].text)
    if stats and not as_json:
        typer.echo(clock.sentence(counts), err=True)


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
