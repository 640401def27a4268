"""The statements of a chat template: what each node of Jinja's syntax tree writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polyformer.data.templates import strings
from polyformer.data.templates.expressions import Expressions, Node, Scope
from polyformer.data.templates.values import Budget, Function, Loop, Missing, Namespace, entries, fault, made, show

_DEEPEST_CALL = 25


class Macro(Function):
    """What `{% macro %}` makes, and the body of `{% call %}`."""

    def __init__(self, walk: Walk, node: Node, scope: Scope) -> None:
        super().__init__(getattr(node, "name", "caller"), self._write)
        self.walk, self.node, self.scope = walk, node, scope

    def _write(self, budget: Budget, /, *args: Any, **named: Any) -> str:
        names = [argument.name for argument in self.node.args]
        inner = Scope({"varargs": args[len(names) :], "caller": named.pop("caller", Missing("caller"))}, self.scope)
        given = dict(zip(names, args, strict=False)) | {name: named.pop(name) for name in names if name in named}
        defaults = dict(zip(reversed(names), reversed(self.node.defaults), strict=False))
        inner.names["kwargs"] = named
        for name in names:
            if name in given:
                inner.names[name] = given[name]
            else:
                inner.names[name] = self.walk.value(defaults[name], inner) if name in defaults else Missing(name)
        return self.walk.nested(self.node.body, inner)


class Break(Exception):  # noqa: N818 (they are no errors)
    """`{% break %}`: leaves the innermost loop."""


class Continue(Exception):  # noqa: N818
    """`{% continue %}`: goes on with the innermost loop's next value."""


class Walk(Expressions):
    """One run of a template."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        self.depth = 0

    def write(self, nodes: Sequence[Node], scope: Scope, out: list[str]) -> None:
        """Append what statements write to `out`."""
        for node in nodes:
            self.budget.step()
            write = _WRITERS.get(type(node).__name__.lower())
            if write is None:
                fault(f"a statement '{type(node).__name__.lower()}' is not for chat templates")
            write(self, node, scope, out)

    def nested(self, nodes: Sequence[Node], scope: Scope) -> str:
        """Return what statements write, as a value."""
        self.depth += 1
        if self.depth > _DEEPEST_CALL:
            fault("its macros call each other too deeply")
        out: list[str] = []
        try:
            self.write(nodes, scope, out)
        finally:
            self.depth -= 1
        return strings.join(self.budget, "", out)

    # -- statements

    def _write_output(self, node: Node, scope: Scope, out: list[str]) -> None:
        for child in node.nodes:
            out.append(made(show(self.value(child, scope), self.budget), self.budget))

    def _write_if(self, node: Node, scope: Scope, out: list[str]) -> None:
        for branch in (node, *node.elif_):
            if self.value(branch.test, scope):
                self.write(branch.body, scope, out)
                return
        self.write(node.else_, scope, out)

    def _write_for(self, node: Node, scope: Scope, out: list[str]) -> None:
        if node.recursive:
            fault("recursive loops are not for chat templates")
        items = entries(self.value(node.iter, scope), self.budget)
        if node.test is not None:
            items = [one for one in items if self.value(node.test, self._bound(node.target, one, scope))]
        loop = Loop(items)
        for index, one in enumerate(items):
            self.budget.step()
            loop.index0 = index
            inner = self._bound(node.target, one, scope)
            inner.names["loop"] = loop
            try:
                self.write(node.body, inner, out)
            except Continue:
                continue
            except Break:
                break
        if not items:
            self.write(node.else_, Scope({}, scope), out)

    def _write_break(self, node: Node, scope: Scope, out: list[str]) -> None:
        raise Break

    def _write_continue(self, node: Node, scope: Scope, out: list[str]) -> None:
        raise Continue

    def _write_scope(self, node: Node, scope: Scope, out: list[str]) -> None:
        self.write(node.body, Scope({}, scope), out)

    def _write_with(self, node: Node, scope: Scope, out: list[str]) -> None:
        inner = Scope({}, scope)
        for target, value in zip(node.targets, node.values, strict=True):
            self._assign(target, self.value(value, scope), inner)
        self.write(node.body, inner, out)

    def _write_assign(self, node: Node, scope: Scope, out: list[str]) -> None:
        self._assign(node.target, self.value(node.node, scope), scope)

    def _write_assignblock(self, node: Node, scope: Scope, out: list[str]) -> None:
        text = self.nested(node.body, Scope({}, scope))
        self._assign(node.target, text if node.filter is None else self.filtered(node.filter, scope, text), scope)

    def _write_filterblock(self, node: Node, scope: Scope, out: list[str]) -> None:
        inner = Scope({}, scope)
        out.append(show(self.filtered(node.filter, inner, self.nested(node.body, inner)), self.budget))

    def _write_macro(self, node: Node, scope: Scope, out: list[str]) -> None:
        scope.names[node.name] = Macro(self, node, scope)

    def _write_callblock(self, node: Node, scope: Scope, out: list[str]) -> None:
        called = self.called(node.call, scope, {"caller": Macro(self, node, scope)})
        out.append(made(show(called, self.budget), self.budget))

    def _bound(self, target: Node, value: Any, outer: Scope) -> Scope:
        inner = Scope({}, outer)
        self._assign(target, value, inner)
        return inner

    def _assign(self, target: Node, value: Any, scope: Scope) -> None:
        what = type(target).__name__
        if what == "Name":
            scope.names[target.name] = value
        elif what == "NSRef":
            space = scope.find(target.name)
            if not isinstance(space, Namespace):
                fault(f"'{target.name}' is no namespace")
            space.fields[target.attr] = value
        else:
            values = entries(value, self.budget)
            if len(values) != len(target.items):
                fault(f"{len(values)} values can't be unpacked to {len(target.items)} names")
            for inner, one in zip(target.items, values, strict=True):
                self._assign(inner, one, scope)


_WRITERS: dict[str, Callable[[Walk, Node, Scope, list[str]], None]] = {
    name.removeprefix("_write_"): method for name, method in vars(Walk).items() if name.startswith("_write_")
}
