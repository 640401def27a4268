"""The expressions of a chat template: what each node of Jinja's syntax tree is worth."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from polyformer.data.templates import origin, strings
from polyformer.data.templates.functions import (
    FILTERS,
    GLOBALS,
    TESTS,
    field,
    is_key,
    item,
    less,
    named_one,
    same,
    within,
)
from polyformer.data.templates.values import POINTER, Budget, Function, Missing, entries, fault, kind, made

# Nodes are those of `jinja2.nodes`, which is imported only when a template is read.
Node = Any


class Scope:
    """The names of a template, a loop or a macro; those outside of it can be read but not set."""

    def __init__(self, names: dict[str, Any], outer: Scope | None = None) -> None:
        self.names, self.outer = names, outer

    def find(self, name: str) -> Any:
        """Return the value of a name, from the nearest scope that has it."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return GLOBALS.get(name, Missing(name))


class Expressions:
    """Finds the values of expressions, each node for one step of the budget; `line` is where it stands."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.line = 1

    def value(self, node: Node, scope: Scope) -> Any:
        """Return the value of an expression."""
        self.budget.step()
        self.line = node.lineno
        find = _FINDERS.get(type(node).__name__.lower())
        if find is None:
            fault(f"an expression '{type(node).__name__.lower()}' is not for chat templates")
        return find(self, node, scope)

    def _value_templatedata(self, node: Node, scope: Scope) -> Any:
        return node.data

    def _value_const(self, node: Node, scope: Scope) -> Any:
        return node.value

    def _value_name(self, node: Node, scope: Scope) -> Any:
        return scope.find(node.name)

    def _value_tuple(self, node: Node, scope: Scope) -> Any:
        return tuple(self.value(one, scope) for one in node.items)

    def _value_list(self, node: Node, scope: Scope) -> Any:
        return [self.value(one, scope) for one in node.items]

    def _value_dict(self, node: Node, scope: Scope) -> Any:
        found = {}
        for pair in node.items:
            key = self.value(pair.key, scope)
            if not is_key(self.budget, key):
                fault(f"{kind(key)} can't be a key")
            found[key] = self.value(pair.value, scope)
        return found

    def _value_condexpr(self, node: Node, scope: Scope) -> Any:
        if self.value(node.test, scope):
            return self.value(node.expr1, scope)
        return Missing("else") if node.expr2 is None else self.value(node.expr2, scope)

    def _value_and(self, node: Node, scope: Scope) -> Any:
        return self.value(node.left, scope) and self.value(node.right, scope)

    def _value_or(self, node: Node, scope: Scope) -> Any:
        return self.value(node.left, scope) or self.value(node.right, scope)

    def _value_not(self, node: Node, scope: Scope) -> Any:
        return not self.value(node.node, scope)

    def _value_compare(self, node: Node, scope: Scope) -> Any:
        left = self.value(node.expr, scope)
        for one in node.ops:
            right = self.value(one.expr, scope)
            if not _COMPARISONS[one.op](self.budget, left, right):
                return False
            left = right
        return True

    def _value_concat(self, node: Node, scope: Scope) -> Any:
        return strings.join(self.budget, "", [self.value(one, scope) for one in node.nodes])

    def _value_getattr(self, node: Node, scope: Scope) -> Any:
        return field(self.value(node.node, scope), node.attr)

    def _value_getitem(self, node: Node, scope: Scope) -> Any:
        value = self.value(node.node, scope)
        if type(node.arg).__name__ != "Slice":
            key = self.value(node.arg, scope)
            if isinstance(value, Missing):
                fault(f"'{value.name[:80]}' is undefined, so nothing can be taken from it")
            return item(self.budget, value, key)
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        where = slice(*(None if end is None else self.value(end, scope) for end in ends))
        if not isinstance(value, (str, list, tuple)):
            fault(f"{kind(value)} can't be cut")
        if isinstance(value, str) and where.step in (None, 1):
            start, stop, _ = where.indices(len(value))
            return made(origin.cut(value, start, max(start, stop)), self.budget)
        return made(origin.whole(value[where], (value,)), self.budget)

    def _value_test(self, node: Node, scope: Scope) -> Any:
        value = self.value(node.node, scope)
        return named_one(TESTS, node.name, "test")(self.budget, value, *self._arguments(node, scope)[0])

    def _value_filter(self, node: Node, scope: Scope) -> Any:
        return self.filtered(node, scope, self.value(node.node, scope))

    def filtered(self, node: Node, scope: Scope, value: Any) -> Any:
        args, named = self._arguments(node, scope)
        return made(named_one(FILTERS, node.name, "filter")(self.budget, value, *args, **named), self.budget)

    def _value_call(self, node: Node, scope: Scope) -> Any:
        return self.called(node, scope, {})

    def called(self, node: Node, scope: Scope, extra: Mapping[str, Any]) -> Any:
        function = self.value(node.node, scope)
        if isinstance(function, Missing):
            fault(f"'{function.name[:80]}' is undefined, so it can't be called")
        if not isinstance(function, Function):
            fault(f"{kind(function)} can't be called")
        args, named = self._arguments(node, scope)
        return made(function.run(self.budget, *args, **named, **extra), self.budget)

    def _arguments(self, node: Node, scope: Scope) -> tuple[list[Any], dict[str, Any]]:
        args = [self.value(one, scope) for one in node.args]
        named = {one.key: self.value(one.value, scope) for one in node.kwargs}
        if node.dyn_args is not None:
            args += entries(self.value(node.dyn_args, scope), self.budget)
        if node.dyn_kwargs is not None:
            more = self.value(node.dyn_kwargs, scope)
            self.budget.take(POINTER * len(more) if isinstance(more, dict) else fault("'**' needs a mapping"))
            named |= more
        return args, named

    # -- arithmetic

    def _value_neg(self, node: Node, scope: Scope) -> Any:
        return made(-self.value(node.node, scope), self.budget)

    def _value_pos(self, node: Node, scope: Scope) -> Any:
        return made(+self.value(node.node, scope), self.budget)

    def _value_add(self, node: Node, scope: Scope) -> Any:
        a, b = self.value(node.left, scope), self.value(node.right, scope)
        if isinstance(a, str) and isinstance(b, str):
            return strings.join(self.budget, "", (a, b))
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            self.budget.take(POINTER * (len(a) + len(b)))
        return self._plain(operator.add, a, b)

    def _value_mul(self, node: Node, scope: Scope) -> Any:
        a, b = self.value(node.left, scope), self.value(node.right, scope)
        if isinstance(b, (str, list, tuple)):
            a, b = b, a
        if isinstance(a, (str, list, tuple)) and isinstance(b, int):
            self.budget.take(max(b, 0) * (len(a) + POINTER))
            return origin.join([a] * b) if isinstance(a, str) else a * b
        return self._plain(operator.mul, a, b)

    def _value_mod(self, node: Node, scope: Scope) -> Any:
        a, b = self.value(node.left, scope), self.value(node.right, scope)
        return strings.percent(self.budget, a, b) if isinstance(a, str) else self._plain(operator.mod, a, b)

    def _value_pow(self, node: Node, scope: Scope) -> Any:
        a, b = self.value(node.left, scope), self.value(node.right, scope)
        if isinstance(a, int) and isinstance(b, int) and abs(b) * a.bit_length() > 4096:
            fault("a number is too large")
        return self._plain(operator.pow, a, b)

    def _value_sub(self, node: Node, scope: Scope) -> Any:
        return self._plain(operator.sub, self.value(node.left, scope), self.value(node.right, scope))

    def _value_div(self, node: Node, scope: Scope) -> Any:
        return self._plain(operator.truediv, self.value(node.left, scope), self.value(node.right, scope))

    def _value_floordiv(self, node: Node, scope: Scope) -> Any:
        return self._plain(operator.floordiv, self.value(node.left, scope), self.value(node.right, scope))

    def _plain(self, operation: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
        for value in (a, b):
            if isinstance(value, Missing):
                fault(f"'{value.name[:80]}' is undefined")
        return made(operation(a, b), self.budget)


_COMPARISONS: dict[str, Callable[[Budget, Any, Any], bool]] = {
    "eq": same,
    "ne": lambda budget, a, b: not same(budget, a, b),
    "lt": less,
    "gt": lambda budget, a, b: less(budget, b, a),
    "lteq": lambda budget, a, b: less(budget, a, b) or same(budget, a, b),
    "gteq": lambda budget, a, b: less(budget, b, a) or same(budget, a, b),
    "in": within,
    "notin": lambda budget, a, b: not within(budget, a, b),
}

_FINDERS: dict[str, Callable[[Expressions, Node, Scope], Any]] = {
    name.removeprefix("_value_"): method for name, method in vars(Expressions).items() if name.startswith("_value_")
}
