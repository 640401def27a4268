"""From the messages of a conversation to a model's input, by the chat template that comes with the checkpoint.

A template decides which control tokens stand around what somebody said. What was said itself never becomes one: every
string of a message is marked as said, the marks survive what the template does to it, and only control tokens that
the template wrote are encoded as such.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.data.templates.origin import said
from polyformer.data.templates.run import Template
from polyformer.data.templates.values import Budget
from polyformer.errors import DataError

# What a template may use up: about half a second, and for a long conversation in proportion to it. Of 73 published
# templates none uses a third of it, although some go through all messages, or their characters, for each message.
STEPS, CHARACTERS = 200_000, 8_000_000
STEPS_PER_MESSAGE = 10_000
STEPS_PER_CHARACTER, CHARACTERS_PER_CHARACTER = 32, 128

_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")

Message = Mapping[str, Any]


class ChatTemplate:
    """A chat template in Jinja's language, run within bounds of time, memory and output.

    A template may come from anybody. It can reach nothing but the messages and the tables of
    `polyformer.data.templates.functions`, and what it may use up is counted as it runs: steps, and characters that it
    makes, in proportion to the messages.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, name: str = "the chat template") -> None:
        """Read a template.

        Args:
            source: in Jinja's language.
            tokens: what the template finds under `bos_token`, `eos_token` and so on.
            name: what to call it in messages.
        Raises:
            DataError: it is not in Jinja's language, or the package jinja2 is missing.
        """
        self._template = _read(source, name)
        self._tokens = dict(tokens or {})

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, which knows what was said in it (`polyformer.data.templates.Text`).

        Args:
            messages: each with a `role`, and `content` or whatever the template knows; plain JSON values.
            tools: descriptions of functions, as JSON Schema.
            add_generation_prompt: whether the text ends where the model is to speak.
            variables: what else the template knows, such as `enable_thinking`.
        Raises:
            DataError: messages that are no such thing, that the template refuses, or for which it uses up more than
                it may.
        """
        values = {
            "messages": [_message(message, i) for i, message in enumerate(messages)],
            "tools": None if tools is None else _plain(list(tools), "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **_plain(dict(variables or {}), "variables"),
        }
        return self._run(values)

    def said_by(self, role: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Return the text of a whole conversation, which knows what those of a role said in it and nothing else.

        Raises:
            DataError: as `render` does.
        """
        own = [isinstance(message, Mapping) and message.get("role") == role for message in messages]
        marked = [_message(message, i, own[i]) for i, message in enumerate(messages)]
        others = None if tools is None else _plain(list(tools), "tools", mark=str)
        return self._run({"messages": marked, "tools": others, "documents": None, "add_generation_prompt": False})

    def _run(self, values: dict[str, Any]) -> str:
        size = _size(values)
        steps = STEPS + STEPS_PER_MESSAGE * len(values["messages"]) + STEPS_PER_CHARACTER * size
        return self._template.run(self._tokens | values, Budget(steps, CHARACTERS + CHARACTERS_PER_CHARACTER * size))


def encode_chat(
    tokenizer: TextTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the ids of a conversation, as `ChatTemplate.render` puts it and with nothing added.

    Control tokens that are typed in a message, a tool or a variable are encoded as the text that they are.

    Raises:
        DataError: the tokenizer has no chat template, or as `ChatTemplate.render`.
    """
    if tokenizer.chat_template is None:
        raise DataError("this model's tokenizer has no chat template; encode a text of your own making instead")
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    return tokenizer.encode_rendered(template.render(messages, tools, add_generation_prompt, variables))


@functools.lru_cache(maxsize=16)
def _read(source: str, name: str) -> Template:
    return Template(source, name)


def _message(message: Any, number: int, marked: bool = True) -> dict[str, Any]:
    """Copy a message with all strings marked as said, if any are, but the role, which can only be a word."""
    if not isinstance(message, Mapping):
        raise DataError(f"message {number + 1} is a {type(message).__name__}, not a table with a role and content")
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise DataError(f"message {number + 1} has no role, which is a word such as 'user'")
    return {**_plain(message, f"message {number + 1}", mark=said if marked else str), "role": str(role)}


def _plain(value: Any, where: str, depth: int = 0, mark: Callable[[str], str] = said) -> Any:
    """Copy JSON values with all strings marked as said, or as `mark` has it."""
    if depth > 64:
        raise DataError(f"{where} is nested too deeply")
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise DataError(f"{where} has a key that is no text")
        return {mark(key): _plain(one, where, depth + 1, mark) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, where, depth + 1, mark) for one in value]
    raise DataError(f"{where} holds a {type(value).__name__}, which a chat template can't be given")


def _size(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(_size(one) for pair in value.items() for one in pair)
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str) else 1
