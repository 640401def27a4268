# ruff: noqa: E501 (one line is one template)
"""Jinja's language as it is walked here, against Jinja itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from polyformer.data.templates import Template, said
from polyformer.data.templates.values import Budget
from polyformer.errors import DataError

jinja2 = pytest.importorskip("jinja2")
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402

VALUES: dict[str, Any] = {
    "text": "  Hello, World!\nnext <b>line</b> ",
    "empty": "",
    "number": 7,
    "ratio": 2.5,
    "yes": True,
    "nothing": None,
    "list": [3, 1, 2],
    "words": ["beta", "Alpha", "gamma", "alpha"],
    "table": {"b": 1, "A": [1, {"x": "ü"}], "c": {"items": 3, "type": "deep"}},
    "rows": [{"n": "x", "v": 2, "d": {"k": 1}}, {"n": "y", "v": 1}, {"n": "z"}],
}

SNIPPETS = [
    # names, items, methods
    "{{ text }}|{{ empty }}|{{ number }}|{{ ratio }}|{{ yes }}|{{ nothing }}|{{ missing }}",
    "{{ table.b }}{{ table['A'][1].x }}{{ table.A[0] }}{{ table.nope }}{{ table['nope'] }}{{ list[9] }}",
    "{{ table.c['items'] }}{{ table.c.type }}{{ table.get('b') }}{{ table.get('q', 'd') }}{{ table.keys() | list }}",
    "{{ text[2] }}{{ text[-2] }}{{ text[2:7] }}{{ text[::-1] }}{{ text[:-1] }}{{ list[1:] }}{{ list[::-1] }}{{ list[-1] }}",
    "{{ text.strip() }}|{{ text.lstrip() }}|{{ text.rstrip() }}|{{ text.strip(' !H') }}|{{ text.upper() }}|{{ text.title() }}",
    "{{ text.split() }}{{ text.split('l') }}{{ text.split('l', 1)[-1] }}{{ text.rsplit(maxsplit=1) }}{{ text.splitlines() }}",
    "{{ text.startswith('  H') }}{{ text.endswith('x') }}{{ text.find('o') }}{{ text.count('l') }}{{ 'x1'.isdigit() }}",
    "{{ text.replace('l', 'L') }}{{ text.replace('l', '', 1) }}{{ ', '.join(words) }}{{ 'ab'.partition('b') | list }}",
    "{{ 'pre-x'.removeprefix('pre-') }}{{ 'x.py'.removesuffix('.py') }}{{ '{} and {1}{{}}{k}'.format(1, 2, k=3) if 0 else 'n' }}",
    "{{ '{} {}'.format('a', 2) }}{{ '{1}{0}'.format('a', 'b') }}{{ '{k}{{}}'.format(k=text) }}",
    "{{ 'a'.center(5) }}|{{ 'a'.ljust(4, '-') }}|{{ '7'.zfill(3) }}|{{ 'aXb'.swapcase() }}",
    # expressions
    "{{ 1 + 2 * 3 - 4 / 2 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ -number }}{{ +number }}{{ 'a' * 3 }}{{ [1] * 2 + [2] }}",
    "{{ 'a' ~ 1 ~ none ~ [1, 'x'] ~ 2.5 ~ true }}{{ 'a' + 'b' }}{{ (1, 'a') }}{{ {'a': 1, 2: [none]} }}",
    "{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 'a' < 'b' }}{{ 1 == 1.0 }}{{ 1 != 2 }}{{ 2 >= 2 }}{{ 3 <= 2 }}{{ 'a' == text }}",
    "{{ 'l' in text }}{{ 'q' not in text }}{{ 1 in list }}{{ 'b' in table }}{{ 'x' in missing }}{{ [1] in [[1]] }}",
    "{{ yes and number }}{{ nothing or 'else' }}{{ not empty }}{{ missing or 'm' }}{{ 'a' if yes else 'b' }}{{ 'a' if nothing }}|",
    "{{ '%s and %d%%' % ('a', 3) }}{{ '%05.1f' % ratio }}{{ '%s' | format(text) }}{{ '%(k)s' % {'k': 1} }}",
    # statements
    "{% for x in list %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{% endfor %}",
    "{% for x in list %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for k, v in table.items() %}{{ k }}={{ v }};{% else %}none{% endfor %}{% for x in [] %}{% else %}none{% endfor %}",
    "{% for k in table %}{{ k }}{% endfor %}{% for c in 'abc' %}{{ c }}-{% endfor %}{% for x in missing %}!{% endfor %}",
    "{% for x in list if x > 1 %}{{ loop.index }}{{ x }}{{ loop.length }}{% endfor %}",
    "{% for x in list %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% if x == 2 %}{% break %}{% endif %}{% endfor %}",
    "{% for x in list %}{% for y in list %}{{ loop.index }}{{ loop.depth }}{% endfor %}{{ loop.index }}{% endfor %}",
    "{% set a = 1 %}{% for x in list %}{% set a = a + x %}{{ a }}{% endfor %}{{ a }}",
    "{% set a = 1 %}{% if yes %}{% set a = 2 %}{% endif %}{{ a }}{% if nothing %}1{% elif number == 7 %}2{% else %}3{% endif %}",
    "{% set ns = namespace(a=1, b='x') %}{% for x in list %}{% set ns.a = ns.a + x %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.c }}",
    "{% set a, b = 1, [2, 3] %}{{ a }}{{ b }}{% for (x, y) in [(1, 2)] %}{{ x }}{{ y }}{% endfor %}",
    "{% set block %}in {{ number }}{% endset %}[{{ block }}]{% set up | upper %}low{% endset %}{{ up }}",
    "{% macro m(a, b='d', c=a) %}({{ a }}{{ b }}{{ c }}){% endmacro %}{{ m(1) }}{{ m(1, c=3) }}{{ m() }}{{ m(b=1, a=2) }}",
    "{% macro v() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ v(1, 2, k=3) }}",
    "{% macro outer(x) %}{{ later }}{{ number }}{{ x }}{% endmacro %}{% set later = 'L' %}{{ outer('a') }}",
    "{% macro box() %}<{{ caller() }}>{% endmacro %}{% call box() %}in {{ number }}{% endcall %}",
    "{% macro box() %}{% for i in list %}{{ caller(i) }}{% endfor %}{% endmacro %}{% call(i) box() %}[{{ i }}]{% endcall %}",
    "{% macro down(n) %}{{ n }}{% if n %}{{ down(n - 1) }}{% endif %}{% endmacro %}{{ down(5) }}",
    "{% with a = 1, b = number %}{{ a }}{{ b }}{% endwith %}{{ a }}{% filter upper %}x{{ number }}y{% endfilter %}",
    "{# comment #}a  {%- if yes -%}  b  {%- endif %}  c\n{% if yes %}\nd\n{% endif %}\n   {% if yes %}e{% endif %}\n{{- number -}}  f",
    "{% raw %}{{ raw }}{% endraw %}{{ '{{' }}",
    # filters
    "{{ text | trim }}|{{ text | upper }}|{{ text | lower }}|{{ text | title }}|{{ text | capitalize }}|{{ 'o-k (a)' | title }}",
    "{{ text | length }}{{ list | count }}{{ table | length }}{{ list | first }}{{ list | last }}{{ [] | first }}{{ 'ab' | last }}",
    "{{ words | join(', ') }}{{ rows | join('-', attribute='n') }}{{ [1, none] | join }}{{ 'abc' | join('.') }}",
    "{{ missing | default('d') }}{{ nothing | default('d') }}{{ nothing | d('d', true) }}{{ empty | default('d', boolean=true) }}",
    "{{ words | sort }}{{ list | sort(reverse=true) }}{{ rows[:2] | sort(attribute='v') | map(attribute='n') | list }}",
    "{{ words | sort(case_sensitive=true) }}{{ words | unique | list }}{{ list | min }}{{ list | max }}{{ words | max }}{{ list | sum }}",
    "{{ rows | map(attribute='v', default=0) | sum }}{{ rows | map(attribute='d.k', default='-') | list }}{{ words | map('upper') | list }}",
    "{{ list | select('odd') | list }}{{ list | reject('odd') | list }}{{ [0, 1, ''] | select | list }}{{ list | select('gt', 1) | list }}",
    "{{ rows | selectattr('v') | map(attribute='n') | list }}{{ rows | rejectattr('v', 'defined') | map(attribute='n') | list }}",
    "{{ rows | selectattr('v', 'equalto', 2) | list | length }}{{ rows | selectattr('n', 'in', ['x', 'z']) | list | length }}",
    "{{ table | dictsort }}{{ {'a': 2, 'b': 1} | dictsort(by='value') }}{{ table | items | list | length }}{{ missing | items | list }}",
    "{{ text | replace('l', 'L') }}{{ text | replace('l', 'L', 1) }}{{ 'abc' | reverse }}{{ list | reverse | list }}{{ text | list | length }}",
    "{{ 'a\nb\n\nc' | indent }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\n\nb' | indent(2, blank=true) }}|{{ 'a\nb' | indent('> ') }}|{{ '' | indent }}",
    "{{ '12' | int }}{{ 'x' | int }}{{ 'x' | int(5) }}{{ '3.9' | int }}{{ 2.9 | int }}{{ '2.5' | float }}{{ 'x' | float }}{{ none | int }}",
    "{{ 2.567 | round(1) }}{{ 2.5 | round }}{{ 2.51 | round(1, 'ceil') }}{{ 2.59 | round(method='floor') }}{{ -3 | abs }}{{ number | string }}{{ number | string | length }}{{ '<b>' | safe }}",
    # tests
    "{{ text is defined }}{{ missing is defined }}{{ missing is undefined }}{{ nothing is none }}{{ text is string }}{{ table is mapping }}",
    "{{ list is iterable }}{{ text is iterable }}{{ number is iterable }}{{ list is sequence }}{{ table is sequence }}{{ number is number }}",
    "{{ yes is boolean }}{{ yes is true }}{{ number is true }}{{ false is false }}{{ number is integer }}{{ ratio is float }}{{ yes is integer }}",
    "{{ 3 is odd }}{{ 3 is even }}{{ 9 is divisibleby 3 }}{{ 'a' is lower }}{{ 'A' is upper }}{{ 1 is eq 1 }}{{ 1 is ne(1) }}{{ 2 is gt 1 }}",
    "{{ 'a' is in 'abc' }}{{ number is not none }}{{ none is sameas none }}{{ range is callable }}{{ text is callable }}",
    # functions
    "{{ range(3) | list }}{{ range(1, 7, 2) | list }}{% for i in range(2) %}{{ i }}{% endfor %}{{ dict(a=1, b=2) }}{{ dict([('x', 1)]) }}",
]  # fmt: skip


def rendered(source: str, values: dict[str, Any]) -> str:
    return Template(source, "it").run(values, Budget(100_000, 1_000_000))


@pytest.mark.parametrize("source", SNIPPETS)
def test_it_writes_what_jinja_writes(source: str) -> None:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    expected = environment.from_string(source).render(**VALUES)
    assert rendered(source, VALUES) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ missing.deeper }}", "{{ missing[0] }}", "{{ missing + 'a' }}", "{{ missing() }}", "{{ text() }}", "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}", "{{ list | nofilter }}", "{{ list is notest }}", "{{ nothing | length }}", "{{ number | join }}",
        "{% for x in number %}{% endfor %}", "{{ 'a' in number }}", "{{ [1, 'a'] | sort }}", "{{ 1 < 'a' }}",
        "{% set ns.x = 1 %}", "{% set a, b = [1] %}", "{{ range('a') }}", "{{ range }}{{ range | tojson }}", "{{ list.append(1) }}",
        "{{ table.update({}) }}", "{{ table.pop('b') }}", "{{ text.__class__.x }}",
        "{% macro m(a) %}{{ a.b }}{% endmacro %}{{ m() }}",
    ],
)  # fmt: skip
def test_it_refuses_what_jinja_refuses(source: str) -> None:
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    with pytest.raises((jinja2.TemplateError, TypeError, ZeroDivisionError, AttributeError, ValueError)):
        environment.from_string(source).render(**VALUES, ns=3)
    with pytest.raises(DataError, match=r"^it, line 1: "):
        rendered(source, VALUES | {"ns": 3})


@pytest.mark.parametrize(
    "source", ["{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{% block x %}{% endblock %}", "{% for x in list recursive %}{% endfor %}"]
)  # fmt: skip
def test_what_needs_other_files_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="chat templates"):
        rendered(source, VALUES)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("a\n{% if %}", "it, line 2: Expected an expression"),
        ("{% for x in y %}", "it, line 1: Unexpected end of template"),
        ("{{ 'a", "it, line 1: unexpected char"),
        ("\n\n{{ a.b.c }}", "it, line 3: 'a' is undefined, so it has no 'b'"),
        ("{{ raise() }}", "it, line 1: 'raise' is undefined, so it can't be called"),
        ("{% break %}", "it, line 1: a break or continue outside of a loop"),
        ("{{ raise_exception('No!') }}", "it, line 1: it refuses these messages: No!"),
    ],
)
def test_errors_name_the_line(source: str, told: str) -> None:
    with pytest.raises(DataError, match=told.replace("(", r"\(")):
        rendered(source, {})


def test_json_is_written_as_python_writes_it() -> None:
    value = {"b": ["<a>", "ü'\"", 1.5, None, True], "a": {"x": []}}
    for options, named in [("", {}), ("indent=4", {"indent": 4}), ("ensure_ascii=true", {"ensure_ascii": True}),
                           ("separators=(',', ':')", {"separators": (",", ":")}), ("sort_keys=true", {"sort_keys": True})]:  # fmt: skip
        written = rendered("{{ value | tojson(" + options + ") }}", {"value": value})
        assert written == json.dumps(value, **{"ensure_ascii": False} | named)  # type: ignore[arg-type]


def test_a_run_changes_nothing_that_it_was_given() -> None:
    values = {"list": [1, 2], "table": {"a": [said("x")]}}
    rendered("{% set list = list + [3] %}{% set table = dict(table, b=1) %}{{ list | sort(reverse=true) }}", values)
    assert values == {"list": [1, 2], "table": {"a": ["x"]}}
