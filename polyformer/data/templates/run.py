"""A template as it is read by Jinja's parser, and running it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from polyformer.data.templates.expressions import Node, Scope
from polyformer.data.templates.values import Budget, TemplateError
from polyformer.data.templates.walk import Break, Continue, Walk
from polyformer.errors import DataError

LONGEST_SOURCE = 256 * 1024  # characters, ten times the longest of published templates


class Template:
    """A template whose source is read once and run many times.

    Jinja compiles templates to Python, whose sandbox bounds neither time nor memory: `'x' * 10**9` is one operation
    of it. Here only Jinja's parser is used. The syntax tree is walked; each node of it is one step of a budget,
    whatever an operation makes is paid for before it is made, and only what is listed in
    `polyformer.data.templates.functions` can be called, so that there is nothing to break out to.
    """

    def __init__(self, source: str, name: str) -> None:
        """Read a template; `name` is what to call it in messages.

        Raises:
            DataError: it is too long or not in Jinja's language, or the package jinja2 is missing.
        """
        self.name = name
        if len(source) > LONGEST_SOURCE:
            raise DataError(f"{name} is longer than {LONGEST_SOURCE:,} characters")
        environment = _environment()
        from jinja2 import TemplateSyntaxError

        try:
            self._body: list[Node] = environment.parse(source).body
        except TemplateSyntaxError as error:
            raise DataError(f"{name}, line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise DataError(f"{name} is nested too deeply") from None
        except ValueError as error:  # a number of thousands of digits
            raise DataError(f"{name} can't be read: {error}") from None

    def run(self, variables: Mapping[str, Any], budget: Budget) -> str:
        """Return what the template writes; a `Text` if anything in `variables` was said.

        Args:
            variables: plain JSON values.
        Raises:
            DataError: the template does what it may not, uses up the budget, or raises an exception of its own; tells
                the line.
        """
        walk = Walk(budget)
        try:
            return walk.nested(self._body, Scope(dict(variables)))
        except TemplateError as error:
            said = str(error)
        except RecursionError:
            said = "it is nested too deeply"
        except (Break, Continue):
            said = "a break or continue outside of a loop"
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
        raise DataError(f"{self.name}, line {walk.line}: {said[:600]}")


@functools.cache
def _environment() -> Any:
    try:
        from jinja2 import Environment, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
    except ImportError:
        raise DataError("chat templates need the package jinja2: pip install jinja2") from None

    class Generation(Extension):
        """`{% generation %}` marks what a model said, for training; here it is written as if it were not marked."""

        tags = {"generation"}  # noqa: RUF012 (as the base class has it)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
