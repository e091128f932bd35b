"""Conversations as OpenAI's clients send them, one for each thing that templates treat in their own ways."""

from __future__ import annotations

from typing import Any

Body = dict[str, Any]
"""messages, and tools, add_generation_prompt, continue_final_message, chat_template_kwargs where they matter."""


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def calls(*made: tuple[str, str, str], content: str | None = None, **more: Any) -> dict[str, Any]:
    """(id, name, arguments as OpenAI sends them: JSON)."""
    listed = [{"id": i, "type": "function", "function": {"name": name, "arguments": given}} for i, name, given in made]
    return {"role": "assistant", "content": content, "tool_calls": listed, **more}


def result(call_id: str, name: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": content}


READ = tool("read_file", "Reads a file.", path={"type": "string", "description": "where it lies"})
RUN = tool(
    "run",
    'Runs a "command" – in a shell.',
    command={"type": "array", "items": {"type": "string"}},
    seconds={"type": ["integer", "null"], "default": 3, "enum": [1, 3, None]},
    env={"type": "object", "additionalProperties": {"type": "string"}},
)
SYSTEM, HI, OK = ("system", "Be brief."), ("user", "Write f."), ("assistant", "def f(): pass")
FIRST = ("call00001", "read_file", '{"path": "a.py"}')
SECOND = ("call00002", "run", '{"command": ["ls", "-l"], "seconds": null, "env": {"ü": "\\"☺\\""}}')
NOTHING = ("call00003", "run", "{}")

CONVERSATIONS: dict[str, Body] = {
    "one question": {"messages": said(HI)},
    "a system message": {"messages": said(SYSTEM, HI)},
    "a developer": {"messages": said(("developer", "Use tabs."), HI)},
    "several turns": {"messages": said(HI, OK, ("user", "Shorter."), ("assistant", "f=0"), ("user", "Thanks."))},
    "several turns under a system message": {"messages": said(SYSTEM, HI, OK, ("user", "And g?"))},
    "nothing said": {"messages": said(("user", ""))},
    "an empty system message": {"messages": said(("system", ""), HI)},
    "blanks around": {"messages": said(("system", "\n a \n"), ("user", "  \n\tx = 1\n\n"), ("assistant", " y "), HI)},
    "all kinds of letters": {"messages": said(("user", "漢字 ☺ e\u0301 שלום \U0001f469\u200d\U0001f4bb \x7f\u2028 ﬁ"))},
    "templates in a template": {"messages": said(("user", "{{ messages }} {% raw %} {# x #} ${a} %s {0}"))},
    "parts": {"messages": said(SYSTEM, ("user", [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]))},
    "an answer that has begun": {"messages": said(HI, ("assistant", "```python\ndef"))},
    "an answer that has begun under a system message": {"messages": said(SYSTEM, HI, OK, HI, ("assistant", "x ="))},
    "no turn for the model": {"messages": said(SYSTEM, HI), "add_generation_prompt": False},
    "a whole conversation": {"messages": said(HI, OK), "continue_final_message": False, "add_generation_prompt": False},
    "a system message later": {"messages": said(HI, OK, SYSTEM, HI)},
    "two questions at once": {"messages": said(HI, ("user", "Now."))},
    "tools": {"messages": said(SYSTEM, HI), "tools": [READ, RUN]},
    "a tool and no system message": {"messages": said(HI), "tools": [READ]},
    "a call": {"messages": [*said(HI), calls(FIRST), result(*FIRST[:2], "x = 1\n")], "tools": [READ, RUN]},
    "a call and its answer": {
        "messages": [*said(SYSTEM, HI), calls(FIRST), result(*FIRST[:2], "{}"), *said(OK, HI)],
        "tools": [READ, RUN],
    },
    "two calls at once": {
        "messages": [*said(HI), calls(FIRST, SECOND), result(*FIRST[:2], "a"), result(*SECOND[:2], "b ☺")],
        "tools": [READ, RUN],
    },
    "calls one after the other": {
        "messages": [
            *said(HI),
            *(
                calls(NOTHING),
                result(*NOTHING[:2], ""),
                calls(SECOND, content="And now:"),
                result(*SECOND[:2], "\nb\n"),
            ),
        ],
        "tools": [RUN],
    },
    "earlier thoughts": {
        "messages": [*said(HI), {**said(OK)[0], "reasoning_content": "Easy.\nDone."}, *said(("user", "Again."))]
    },
    "thoughts before a call": {
        "messages": [*said(HI), calls(FIRST, reasoning_content="I must look."), result(*FIRST[:2], "x")],
        "tools": [READ],
    },
    "thoughts as text": {"messages": said(HI, ("assistant", "<think>\nEasy.\n</think>\n\nf = 0"), HI)},
    "no thinking": {"messages": said(HI), "chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
    "thinking": {"messages": said(SYSTEM, HI), "chat_template_kwargs": {"enable_thinking": True, "thinking": True}},
    "little thinking": {"messages": said(HI), "chat_template_kwargs": {"reasoning_effort": "low"}},
}
