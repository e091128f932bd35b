"""Templates that loop for ever or blow up memory are cut, wherever they do it, before they have done it."""

from __future__ import annotations

import re
import tracemalloc

import pytest

from tabstop.errors import InputError, UnsupportedModelError
from tabstop.text.chat import ChatTemplate, Conversation
from tabstop.text.sandbox import LEFT_OUT, RenderLimits

LIMITS = RenderLimits(num_characters=1 << 18, seconds=0.2)
PATIENT = RenderLimits(num_characters=1 << 18, seconds=600)  # only counts may end it
HI = Conversation([{"role": "user", "content": "hi there"}])

DOUBLED = "{% set ns = namespace(x=X) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x is string }}"

TOO_LONG = {
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set r = range(5000) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "loops with a condition": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "sorted lists": "{% for a in range(99999) %}{% set x = range(99999) | reverse | sort | first %}{% endfor %}",
    "filters in filters": "{% for a in range(99999) %}{% set x = range(9999) | map('string') | list %}{% endfor %}",
    "recursive loops": "{% for a in [1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}",
}

TOO_MUCH = {
    "output": "{% for a in range(99999) %}0123456789{% endfor %}",
    "output of values": "{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "a macro's output": "{% macro m() %}{% for a in range(99999) %}0123456789{% endfor %}{% endmacro %}"
    "{{ m() | length }}",
    "a block that is set": "{% set x %}{% for a in range(99999) %}0123456789{% endfor %}{% endset %}{{ x | length }}",
    "a block that is filtered": "{% filter upper %}{% for a in range(99999) %}0123456789{% endfor %}{% endfilter %}",
    "texts times numbers": "{{ 'x' * 10 ** 9 }}",
    "numbers times texts": "{{ 10 ** 9 * messages[0].content }}",
    "lists times numbers": "{{ ([0] * 10 ** 9) | length }}",
    "doubling by +": DOUBLED.replace("X", "'ab'").replace("STEP", "ns.x + ns.x"),
    "doubling by ~": DOUBLED.replace("X", "'ab'").replace("STEP", "ns.x ~ ns.x"),
    "doubling by %": DOUBLED.replace("X", "'ab'").replace("STEP", "'%s%s' % (ns.x, ns.x)"),
    "doubling by format": DOUBLED.replace("X", "'ab'").replace("STEP", "'{0}{0}'.format(ns.x)"),
    "doubling by format_map": DOUBLED.replace("X", "'ab'").replace("STEP", "'{a}{a}'.format_map({'a': ns.x})"),
    "doubling by the filter format": DOUBLED.replace("X", "'ab'").replace("STEP", "'%s%s' | format(ns.x, ns.x)"),
    "doubling by join": DOUBLED.replace("X", "'ab'").replace("STEP", "''.join([ns.x, ns.x])"),
    "doubling by the filter join": DOUBLED.replace("X", "'ab'").replace("STEP", "[ns.x, ns.x] | join"),
    "doubling by replace": DOUBLED.replace("X", "'ab'").replace("STEP", "ns.x.replace('a', 'aab')"),
    "doubling by the filter replace": DOUBLED.replace("X", "'a'").replace("STEP", "ns.x | replace('a', 'aa')"),
    "escapes": "{% set x = '&' * 99999 %}{% set y = x | e %}",
    "escapes of URLs": "{% set x = '%' * 99999 %}{% set y = x | urlencode %}",
    "doubling by lists": DOUBLED.replace("X", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "doubling by tuples": DOUBLED.replace("X", "[1]").replace("STEP", "(ns.x, ns.x)"),
    "doubling by dicts": DOUBLED.replace("X", "[1]").replace("STEP", "{'a': ns.x, 'b': ns.x}"),
    "doubling by dict()": DOUBLED.replace("X", "[1]").replace("STEP", "dict(a=ns.x, b=ns.x)"),
    "doubling by fromkeys": DOUBLED.replace("X", "[1]").replace("STEP", "dict.fromkeys(['a', 'b'], ns.x)"),
    "doubling by batch": DOUBLED.replace("X", "[1]").replace("STEP", "[1] | batch(3, ns.x) | list"),
    "doubling by batch and times": DOUBLED.replace("X", "[1]").replace("STEP", "(ns.x | batch(9) | list) * 2"),
    "doubling by sum": DOUBLED.replace("X", "[[1]]").replace("STEP", "[[ns.x, ns.x] | sum(start=[])]"),
    "slices that are kept": "{% set x = 'x' * 9999 %}{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [x[1:]] %}{% endfor %}",
    "a list as text": "{% set x = ['x' * 99999] * 99 %}{{ x }}",
    "a list as text by a filter": "{% set x = ['x' * 9999] * 99 %}{% set y = x | string %}",
    "a list as text in a format": "{% set x = ['x' * 9999] * 99 %}{% set y = '%s' % x %}",
    "a list as JSON": "{% set x = ['x' * 9999] * 99 %}{% set y = x | tojson %}",
    "JSON's indentation": "{% set x = [[[[[[1]]]]]] * 999 %}{% set y = x | tojson(indent=999) %}",
    "indent": "{% set y = ('\n' * 999) | indent(999) %}",
    "indent by a text": "{% set y = ('\n' * 999) | indent('x' * 999) %}",
    "expandtabs": "{% set y = ('\t' * 999).expandtabs(999) %}",
    "many lists": "{% set ns = namespace(x=[]) %}{% for a in range(9999) %}{% set ns.x = ns.x + [[1]] %}{% endfor %}",
    "lists of characters": "{% set x = ('x' * 99999) | list %}",
    "split": "{% set x = ('x ' * 50000).split() %}",
}

REFUSED = {
    "center": "{{ 'x' | center(10 ** 9) }}",
    "str.center": "{{ 'x'.center(10 ** 9) }}",
    "ljust": "{{ 'x'.ljust(10 ** 9) }}",
    "zfill": "{{ 'x'.zfill(10 ** 9) }}",
    "expandtabs far": "{{ '\t'.expandtabs(10 ** 9) }}",
    "indent far": "{{ 'x\ny' | indent(10 ** 9) }}",
    "tojson far": "{{ [1] | tojson(indent=10 ** 9) }}",
    "printf": "{{ '%1000000000d' % 1 }}",
    "printf's precision": "{{ '%.1000000000f' % 1 }}",
    "printf's star": "{{ '%*d' % (10 ** 9, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format inside format": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "slice": "{{ [1] | slice(10 ** 9) | list }}",
    "round": "{{ 5 | round(-10 ** 9) }}",
    "round up": "{{ 5 | round(10 ** 9, 'ceil') }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "powers of powers": "{% set x = 2 ** 2000 %}{{ x ** x }}",
    "product": "{% set x = 2 ** 4000 %}{{ x * x }}",
    "range": "{{ range(10 ** 9) | list }}",
    "to_bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "translate": "{{ 'x'.translate({120: 'y' * 999}) }}",
    "encode": "{{ 'x'.encode() }}",
    "lorem ipsum": "{{ lipsum(10 ** 9) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "dates": "{{ strftime_now('%c' * 9999) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as x %}",
    "underscores": "{% set ns = namespace(_x=1) %}",
    "underscores later": "{% set ns = namespace() %}{% set ns['_x'] = 1 %}",
} | {name: f"{{{{ 'x' | {name} }}}}" for name in LEFT_OUT}


def refusal(source: str) -> str:
    """Why rendering is refused, having used no more memory than the limits allow with some room."""
    template = ChatTemplate(source, limits=PATIENT)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            template.render(HI)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    assert caught.value.param == "messages"
    return caught.value.message


@pytest.mark.parametrize("name", TOO_LONG)
def test_endless_templates_are_cut(name: str) -> None:
    template = ChatTemplate(TOO_LONG[name], limits=LIMITS)
    with pytest.raises(InputError, match=r"takes too long|writes too much"):
        template.render(HI)


@pytest.mark.parametrize("name", TOO_MUCH)
def test_growing_templates_are_cut(name: str) -> None:
    assert re.search("writes too much|adds up", refusal(TOO_MUCH[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_single_steps_that_are_too_large_are_refused(name: str) -> None:
    try:
        refused = refusal(REFUSED[name])
    except UnsupportedModelError:  # a constant: it is computed when the template is compiled
        refused = "does not compile"
    assert refused


@pytest.mark.parametrize("depth", [25, 400, 20_000])
def test_templates_that_python_cannot_compile(depth: int) -> None:
    loops = "{% for a in [1] %}" * depth + "{% endfor %}" * depth
    for source in (loops, "{{ " + "(" * depth + "1" + ")" * depth + " }}", "{{ " + "-" * depth + "1 }}"):
        try:
            text = ChatTemplate(source).render(HI)
        except (UnsupportedModelError, InputError) as error:
            text = error.message
        assert text


def test_what_templates_do_is_allowed() -> None:
    source = """
    {%- macro show(x, n=2) %}{{ ('%s' | format(x)).center(9) | trim | indent(n) }}{% endmacro %}
    {%- set ns = namespace(seen=[], last=none) %}
    {%- for m in messages if m.content %}
        {%- set ns.seen = ns.seen + [m.role ~ '-' ~ loop.index] %}
        {%- set ns.last = {'role': m.role, 'n': (1, 2, [3])} %}
        {{- loop.first }}{{ loop.length }}{{ m.content[::-1] }}{{ 'a%sb%05.2f' % (m.role, 1.5) }}
    {%- endfor %}
    {{- ns.seen | join(', ') | upper }} {{ ns.last | tojson(indent=1) | length }} {{ show('x\\ny') }}
    {{- ' {} {a}'.format(1, a=ns.last) }} {{ '-'.join(['a', 'b']) }} {{ 'a b'.split() | map('upper') | list }}
    {{- messages | map(attribute='role') | unique | list }} {{ [3, 1] | sort | sum }} {{ 7 ** 2 }}
    {{- 'x' * 3 }} {{ dict(a=1) | items | list }} {{ dict.fromkeys([1], 2) }}
    {{- messages[0].items() | list | length }}
    {{- {'b': 1, 'a': 2} | dictsort }} {{ '<' | e }} {{ none }} {{ [1, 2, 3] | batch(2, 0) | list }}{{ 2.5 | round }}"""
    expected = (
        "True1ereht ihauserb01.50USER-1 54 x\n  y 1 {'role': 'user', 'n': (1, 2, [3])} a-b ['A', 'B']['user'] 4 49"
        "xxx [('a', 1)] {1: 2}2[('a', 2), ('b', 1)] &lt; None [[1, 2], [3, 0]]2.0"
    )
    assert ChatTemplate(source, limits=LIMITS).render(HI) == expected


def test_large_conversations_have_large_budgets() -> None:
    """Limits are about what a template adds: forty times the limit in messages is no reason to refuse."""
    source = "{% for m in messages %}{{ '<' + m.role + '>' + (m.content | trim) ~ '\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 20_000}] * 500
    text = ChatTemplate(source, limits=LIMITS).render(Conversation(messages))
    assert len(text) == 500 * 20_007
