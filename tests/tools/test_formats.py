"""Each family's calls, as its template writes them, and as its models get them wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tabstop.errors import ConfigError
from tabstop.tools import CHOICES, FORMATS, NAME, Function, ToolUse, load_format
from tests.tools.reading import USE, cut_at, hear, made

V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
    "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
HERMES = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
TWO = {
    "hermes": HERMES + "\n" + HERMES,
    "hermes bare": '{{"name": "{}", "arguments": {}}}\n{{"name": "{}", "arguments": {}}}',
    "hermes fenced": '```json\n{{ "name": "{}",\n "arguments": {}}}\n```\n```json{{"name": "{}", "arguments": {}}}```',
    "hermes tools": '<tools>\n{{"name": "{}", "arguments": {}}}\n{{"name": "{}", "arguments": {}}}\n</tools>',
    "mistral": '[TOOL_CALLS][{{"name": "{}", "arguments": {}}}, {{"name": "{}", "arguments": {}, "id": "123456789"}}]',
    "mistral 2025": "[TOOL_CALLS]{}[ARGS]{}[TOOL_CALLS]{}[ARGS]{}",
    "mistral ids": "[TOOL_CALLS]{}[CALL_ID]123456789[ARGS]{}[TOOL_CALLS]{}{}",
    "deepseek": V3,
    "deepseek 3.1": V31,
    "llama3": '{{"name": "{}", "parameters": {}}}; {{"name": "{}", "parameters": {}}}',
    "llama3 tagged": '<|python_tag|>{{"name": "{}", "parameters": {}}}; {{"name": "{}", "parameters": {}}}',
    "granite": '<|tool_call|>[{{"name": "{}", "arguments": {}}}, {{"name": "{}", "arguments": {}}}]',
    "granite bare": '[{{"name": "{}", "arguments": {}}}, {{"name": "{}", "arguments": {}}}]',
}
ARGUMENTS = {"city": 'São "Paulo"\n\\', "days": 3, "hourly": True, "note": None, "place": {"at": [1.5, -2e3]}}

CODER = """\
I look.

<tool_call>
<function=get_weather>
<parameter=city>
def f():
\treturn "</b>"

</parameter>
<parameter=days>
3
</parameter>
<parameter=hourly>
True
</parameter>
<parameter=note>
null
</parameter>
<parameter=place>
{"at": ["1", 2]}
</parameter>
</function>
</tool_call>
<tool_call>
<function=now>
</function>
</tool_call>"""


@pytest.mark.parametrize("form", TWO)
def test_two_calls(form: str) -> None:
    written = json.dumps(ARGUMENTS, ensure_ascii=False)
    heard = hear(made(form.split()[0]), [TWO[form].format("get_weather", written, "now", "{}")])
    assert (heard.good, heard.num_calls, heard.content) == ([("get_weather", written), ("now", "{}")], 2, "")


@pytest.mark.parametrize("form", [name for name in TWO if "llama3" not in name and "bare" not in name])
def test_content_before_calls_is_content_without_the_blanks(form: str) -> None:
    heard = hear(made(form.split()[0]), ["I look.\n\n" + TWO[form].format("now", "{}", "now", "{}") + "\n"])
    assert (heard.content, heard.good) == ("I look.", [("now", "{}")] * 2)


def test_code_blocks_behind_calls_are_content() -> None:
    text = HERMES.format("now", "{}").removesuffix("</tool_call>") + "```python\nx\n```"
    heard = hear(made("hermes"), [text])
    assert (heard.good, heard.content) == ([("now", "{}")], "```python\nx\n```")


def test_qwen_coder() -> None:
    heard = hear(made("qwen3_coder"), [CODER])
    (name, arguments), now = heard.good
    assert (heard.content, name, now) == ("I look.", "get_weather", ("now", "{}"))
    city = 'def f():\n\treturn "</b>"\n'
    assert json.loads(arguments) == {"city": city, "days": 3, "hourly": True, "note": None, "place": {"at": [1, 2]}}


@pytest.mark.parametrize(
    "text",
    [
        "<function=now>\n</function>",
        "<tool_call>\n<function=now>\n</tool_call>",
        '<tool_call><function="now"></function></tool_call>',
        "<tool_call>\n\n<function=now >\n\n</function>",
    ],
)
def test_what_qwen_coder_forgets(text: str) -> None:
    heard = hear(made("qwen3_coder"), [text])
    assert (heard.content, heard.good) == ("", [("now", "{}")])


def test_values_of_qwen_coder_may_lack_their_end() -> None:
    text = "<function=get_weather>\n<parameter=city>\nRome\n<parameter=note>\nnone\n</function>"
    assert hear(made("qwen3_coder"), [text]).good == [("get_weather", '{"city": "Rome", "note": "none"}')]


NOT_CALLS = {
    "hermes": [
        "<tool_call>",
        "<tool_call>\n</tool_call>",
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "now", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "now", "arguments"',
        "<tool_call>now()</tool_call>",
        "<tool_ca",
        '{"name": "now"}',
        '{"name": "Bob", "arguments": {}}',
        '{"arguments": {}, "name": "now"}',
        'Use {"name": "now", "arguments": {}}',
        '```json\n{"x": {"name": "now", "arguments": {}}}\n```\nand ```json\n[1]```',
        '<tools>{"name": "now"}</tools>',
        "```json",
        "a <tool_call b",
        '<tool_call>[{"name": "now"}]</tool_call>',
        '<tool_call>{"name": "now", "arguments": ' + "9" * 5000 + "}</tool_call>",
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS]rm[ARGS]{}",
        "[TOOL_CALLS] now",
        "[TOOL_CALLS]" + "x" * 99,
        "[TOOL_CALLS][1]",
    ],
    "deepseek": [
        "<｜tool▁calls▁begin｜>now",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>rm\n```json\n{}\n```",
        "<｜tool▁call▁begin｜>" + "x" * 99,
    ],
    "llama3": ['{"x": 1}', "{", '{"name": "Bob", "parameters": {}}', '<|python_tag|>search.call(q="x")', "1 { 2"],
    "granite": ["[1, 2]", "[]", "<|tool_call|>x", "<|tool_call|>", '<|tool_call|>[{"name": "rm"}]'],
    "qwen3_coder": [
        "<function=rm>\n</function>",
        "<tool_call>\nx",
        "<tool_call>" + "<function=" + "x" * 99,
        "<function=now",
    ],
}


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, texts in NOT_CALLS.items() for text in texts])
def test_what_is_no_call_is_content(form: str, text: str) -> None:
    heard = hear(made(form), [text])
    assert (heard.content, heard.calls, heard.num_calls) == (text, [], 0)


BROKEN = {
    "hermes": '<tool_call>{"name": "now", "arguments": {"a": "long", "b": ]}}</tool_call> so',
    "mistral": '[TOOL_CALLS]now[ARGS]{"a": "long", b}',
    "deepseek": '<｜tool▁call▁begin｜>now<｜tool▁sep｜>{"a": tru}<｜tool▁call▁end｜>',
    "llama3": '{"name": "now", "parameters": {"a": 01}}',
    "granite": '[{"name": "now", "arguments": {"a": "\\d"}}]',
    "qwen3_coder": "<tool_call><function=now><parameter=a>\nlong\n</parameter>\nhm</function>",
}


@pytest.mark.parametrize("form", BROKEN)
def test_a_call_that_breaks_is_taken_back_and_is_content(form: str) -> None:
    heard = hear(made(form), [BROKEN[form]])
    assert (heard.content, heard.good, heard.num_calls) == (BROKEN[form], [], 0)
    assert [call[0] for call in heard.calls] == ["now"]


def test_the_calls_before_a_broken_one_stay() -> None:
    heard = hear(made("mistral"), ['[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "now", "arguments": 5}]'])
    assert (heard.good, heard.content) == ([("now", "{}")], ', {"name": "now", "arguments": 5}]')


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "now", "arguments": {"a": 1}',
        '<tool_call>{"name": "now", "arguments": {"a": 1}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}, "name": "now"}',
        '<tool_call>{"id": 7, "name": "now", "parameters": "{\\"a\\": 1}"}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": 1}}<tool_call>',
    ],
)
def test_what_lacks_nothing_that_matters_is_a_call(text: str) -> None:
    heard = hear(made("hermes"), [text])
    assert heard.good == [("now", '{"a": 1}')]
    assert heard.content in ("", "<tool_call>")


def test_a_call_that_is_cut_stays_as_far_as_it_came() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rom'
    heard = hear(made("hermes"), [text], is_cut=True)
    assert (heard.good, heard.content, heard.num_calls) == ([("get_weather", '{"city": "Rom')], "", 1)
    assert hear(made("hermes"), [text]).content == text


@pytest.mark.parametrize("form", ["hermes", "deepseek"])
def test_a_marker_that_is_cut_is_no_content(form: str) -> None:
    text = TWO[form].format("now", "{}", "get_weather", "{}")
    end = text.index(">", text.index("{}")) if form == "hermes" else text.index("end", text.index("{}"))
    for cut in range(text.index("{}") + 3, end):
        heard = hear(made(form), [text[:cut]], is_cut=True)
        assert (heard.good, heard.content) == ([("now", "{}")], ""), text[:cut]


@pytest.mark.parametrize("form", TWO)
def test_one_call_where_only_one_is_wanted(form: str) -> None:
    text = TWO[form].format("now", "{}", "get_weather", "{}")
    use = ToolUse(USE.functions, is_parallel=False)
    for pieces in ([text], list(text)):
        assert hear(made(form.split()[0]), pieces, use).good == [("now", "{}")]


ALL_TEXTS = [
    *(
        (form.split()[0], text.format("get_weather", json.dumps(ARGUMENTS), "now", '{"a": "5"}'))
        for form, text in TWO.items()
    ),
    *((form, text) for form, texts in NOT_CALLS.items() for text in texts),
    *BROKEN.items(),
    ("qwen3_coder", CODER),
]


@given(st.sampled_from(ALL_TEXTS), st.lists(st.integers(0, 5000), max_size=12), st.integers(0, 5000), st.booleans())
@settings(max_examples=400, deadline=None)
@example(ALL_TEXTS[0], list(range(400)), 0, False)
def test_however_a_text_is_cut_it_is_read_alike(
    case: tuple[str, str], places: list[int], end: int, is_cut: bool
) -> None:
    """Also a text that ends anywhere, by itself or by a limit."""
    form, text = case
    text = text[: len(text) - end % len(text)]
    whole = hear(made(form), [text], is_cut=is_cut)
    assert hear(made(form), cut_at(text, places), is_cut=is_cut) == whole
    assert hear(made(form), list(text), is_cut=is_cut) == whole


PIECES = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "now", ',
    '"arguments": {',
    '"a": ',
    "}",
    '"',
    "\\",
    "1",
    "[",
    "]",
    ",",
    " \n",
]
PIECES += [
    "[TOOL_CALLS]",
    "[ARGS]",
    "now",
    "<function=",
    "now>",
    "<parameter=",
    "a>",
    "</parameter>",
    "</function>",
    "null",
]
PIECES += ["<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "```json", "<|python_tag|>", "<|tool_call|>", ";", "é"]
PIECES += ["```json\n", "<tools>", "</tools>"]


@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(PIECES), max_size=25))
@settings(max_examples=400, deadline=None)
def test_nonsense_is_read_alike_and_lost_nowhere(form: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    heard = hear(made(form), [text])
    assert hear(made(form), pieces) == heard == hear(made(form), list(text))
    for _, arguments in heard.good:
        assert isinstance(json.loads(arguments), dict)
    if not heard.good:
        assert heard.content == text


def test_long_arguments_come_as_they_are_written() -> None:
    """Of a text of 20,000 characters no part waits for the rest."""
    reader_use = ToolUse((Function("now"),))
    for form, opening in (
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "'),
        ("qwen3_coder", "<function=now>\n<parameter=a>\n"),
    ):
        for count in (1, 5000):
            heard = hear(made(form), [opening, "x = 1" * count], reader_use, is_cut=True)
            assert heard.good == [("now", '{"a": "' + "x = 1" * count)]


TEMPLATES = {
    "hermes": '{% if tools %}<tools></tools>{% endif %}<tool_call>\n{"name": ',
    "qwen3_coder": "{{ tools }}<tool_call>\n<function=' + name + '>\n<parameter=",
    "mistral": "{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]",
    "deepseek": "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "llama3": '{{ tools }}<|start_header_id|>ipython {"name": , "parameters": }',
    "granite": "{{ tools }}<|start_of_role|>available_tools <|tool_call|>",
}


def test_templates_tell_the_format() -> None:
    for name, template in TEMPLATES.items():
        found = load_format(template)
        assert type(found) is type(made(name)), name
        assert load_format(template, "off") is None
    assert load_format("{{ messages }}") is None is load_format(None)
    assert load_format("<tool_call>") is None  # it is never told of tools
    assert load_format("{{ messages }}", "hermes") is not None
    with pytest.raises(ConfigError, match="choose one of auto, off, deepseek"):
        load_format("", "xml")
    assert set(CHOICES) == {"auto", "off", *TEMPLATES}


def test_templates_tell_the_spelling() -> None:
    single = made("llama3", "This model only supports single tool-calls at once!")
    text = TWO["llama3"].format("now", "{}", "now", "{}")
    assert (len(hear(single, [text]).good), len(hear(made("llama3"), [text]).good)) == (1, 2)
    assert made("mistral", "[TOOL_CALLS][ARGS]").syntax.before == f"[TOOL_CALLS]{NAME}[ARGS]"
    assert made("mistral", "[TOOL_CALLS]").syntax.opening == "[TOOL_CALLS]["
    assert "```json" in made("deepseek", "```json").syntax.before
    assert "```json" not in made("deepseek").syntax.before


@pytest.mark.parametrize(
    "form", ["hermes", "mistral", "mistral [ARGS]", "deepseek", "deepseek ```json", "llama3", "granite"]
)
def test_what_a_grammar_would_force_is_read(form: str) -> None:
    made_form = made(form.split()[0], form)
    syntax = made_form.syntax
    one = syntax.before.replace(NAME, "now") + '{"a": 1}' + syntax.after
    text = syntax.opening + syntax.separator.join([one, one]) + syntax.closing
    assert hear(made_form, [text]).good == [("now", '{"a": 1}')] * 2
