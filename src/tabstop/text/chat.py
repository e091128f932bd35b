"""Messages → token ids by the checkpoint's own chat template. Templates never come from clients.

Rendered in a sandbox that bounds what a template may cost (text/sandbox.py), with what transformers gives templates.
What users write is marked before rendering so that it cannot spell control tokens (text/tokenizer.py: mark_control).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2

from tabstop.errors import InputError, NotSupportedError, UnsupportedModelError
from tabstop.text.marks import MARKS, escaped, free_marks, marked, marked_message
from tabstop.text.reasoning import AUTO, LINE_ENDS, Reasoning, find_reasoning
from tabstop.text.sandbox import RenderLimits, Sandbox
from tabstop.text.sandbox_bounds import TemplateLimitError
from tabstop.text.tokenizer import Tokenizer
from tabstop.tools import ToolFormat
from tabstop.tools.description import described
from tabstop.tools.replay import CallShape, find_shape

ROLES = ("system", "developer", "user", "assistant", "tool")

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    SyntaxError,
    NameError,  # `1e999` compiles to the name inf
)
"""Of compiling or rendering: a template's refusal, messages that it cannot digest, a limit of the sandbox."""

DEFAULT_LIMITS = RenderLimits()

PROBE = "what is asked"

MAX_REASON = 500
"""Characters that are shown of a template's own complaint."""

Message = Mapping[str, Any]
"""`role` (one of ROLES) and `content` (text), and what else templates read: name, tool_call_id, tool_calls."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat request gives the template."""

    messages: Sequence[Message]
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the last message is the beginning of the answer
    tools: Sequence[Mapping[str, Any]] | None = None  # what the template is told of functions, as clients write it
    switches: Mapping[str, bool | str] = field(default_factory=dict)  # variables of the template, of SWITCHES

    @property
    def begun(self) -> str:
        """What there is of the answer."""
        return (self.messages[-1].get("content") or "") if self.continue_final_message else ""


class ChatTemplate:
    """A compiled template. Raises UnsupportedModelError when it does not compile."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, limits: RenderLimits = DEFAULT_LIMITS
    ) -> None:
        """`special_tokens`: bos_token, eos_token, …: variables of the template."""
        self._special_tokens = dict(special_tokens or {})
        self.source = source
        self._knows_developer = "developer" in source
        self._sandbox, self.limits = Sandbox(), limits
        self.described_by: ToolFormat | None = None
        """In whose words a system message describes tools, where the template itself tells nothing of them."""
        self.for_tools: ChatTemplate | None = None
        """Another template, for conversations with tools."""
        try:
            self._template = self._sandbox.compile_template(source)
        except TEMPLATE_ERRORS as error:
            reason = str(error) if isinstance(error, (jinja2.TemplateError, SyntaxError)) else type(error).__name__
            raise UnsupportedModelError(f"the checkpoint's chat template does not compile: {reason}") from None

    @property
    def source_for_tools(self) -> str:
        """Of the template that a conversation with tools is rendered by."""
        return (self.for_tools or self).source

    def render(self, conversation: Conversation) -> str:
        """The prompt text. Raises InputError when the template refuses the messages."""
        if conversation.tools and self.for_tools is not None:
            return self.for_tools.render(conversation)
        return self._render(self._shaped(conversation), conversation.tools, conversation)

    def encode(self, tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
        """The prompt's ids; control tokens come from the template alone. The template writes BOS, if any."""
        if conversation.tools and self.for_tools is not None:
            return self.for_tools.encode(tokenizer, conversation)
        try:
            given = self._shaped(conversation)
            mark, end_mark = free_marks([given, conversation.tools or ()])
            messages = [marked_message(self._unfolded(message, tokenizer), tokenizer, mark) for message in given]
            tools = marked(conversation.tools, tokenizer, mark)
        except RecursionError:
            raise InputError("messages or tools are nested too deeply", param="messages") from None
        if conversation.continue_final_message:
            messages[-1] = messages[-1] | {"content": (messages[-1]["content"] or "") + end_mark}
        text = self._render(messages, tools, conversation)
        for one in (mark, end_mark):
            text = text.replace(escaped(one), one)
        if conversation.continue_final_message:
            text, found, _ = text.rpartition(end_mark)
            if not found or end_mark in text:
                raise InputError("this model's chat template cannot continue the last message", param="messages")
        return tokenizer.encode_marked(text, mark)

    def _unfolded(self, message: Message, tokenizer: Tokenizer) -> Message:
        """Thoughts that the assistant's text holds, taken out of it where their tags are control tokens.

        Marked, a template could not split the text by them; unmarked, they could stay in it.
        """
        content, style = message.get("content"), self._reasoning
        if message["role"] != "assistant" or style is None or style.end not in tokenizer.control_tokens:
            return message
        if not isinstance(content, str) or style.end not in content or "reasoning_content" in message:
            return message
        before, _, after = content.rpartition(style.end)
        thoughts = before.rpartition(style.start)[2].strip(LINE_ENDS)
        if "reasoning_content" in self.source:
            return {**message, "content": after.lstrip(LINE_ENDS), "reasoning_content": thoughts}
        return {**message, "content": after} if "split(" in self.source else message

    @cached_property
    def _reasoning(self) -> Reasoning | None:
        return find_reasoning(AUTO, self.source)

    def _shaped(self, conversation: Conversation) -> list[Message]:
        """The messages, with calls of earlier turns as this template wants them."""
        messages = conversation.messages
        if conversation.tools and self.described_by is not None:
            return described(messages, conversation.tools, self.described_by)
        if not any(message.get("tool_calls") for message in messages):
            return list(messages)
        return [self._call_shape.shaped(message) for message in messages]

    @cached_property
    def _call_shape(self) -> CallShape:
        def render(messages: Sequence[Message]) -> str | None:
            try:
                return self._render(messages, None, Conversation(messages, add_generation_prompt=False))
            except InputError:
                return None

        return find_shape(render)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether it takes contents as lists of parts alone: a text would be read letter by letter."""

        def shows(content: Any) -> bool:
            probe = [{"role": "user", "content": content}]
            try:
                text = self._render_as_given(probe, None, Conversation(probe))
            except InputError:
                return False
            return PROBE in text and "'type'" not in text  # nor as Python writes the list

        return not shows(PROBE) and shows(_as_parts(PROBE))

    def _render(self, messages: Sequence[Message], tools: Any, conversation: Conversation) -> str:
        if not self._knows_developer:
            messages = [_as_system(message) for message in messages]
        if self._wants_parts:
            messages = [{**message, "content": _as_parts(message.get("content"))} for message in messages]
        return self._render_as_given(messages, tools, conversation)

    def _render_as_given(self, messages: Sequence[Message], tools: Any, conversation: Conversation) -> str:
        variables: dict[str, Any] = {
            "messages": messages,
            "tools": tools or None,
            "documents": None,
        } | self._special_tokens
        generate = conversation.add_generation_prompt and not conversation.continue_final_message
        variables |= {"add_generation_prompt": generate, **conversation.switches}
        try:
            return self._sandbox.render(self._template, variables, self.limits)
        except TemplateLimitError as error:
            raise InputError(f"this model's chat template {error.message}", param="messages") from None
        except TEMPLATE_ERRORS as error:
            reason = error.message if isinstance(error, jinja2.TemplateError) else type(error).__name__
            reason = "".join(c for c in str(reason) if c not in MARKS)[:MAX_REASON]
            raise InputError(f"this model's chat template refuses these messages: {reason}", param="messages") from None


def load_chat_template(tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The checkpoint's template, its 'default' one if it has several, with that for tools; None when it has none."""
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):  # [{"name": …, "template": …}]
        source = {entry.get("name"): entry.get("template") for entry in source}
    sources = source if isinstance(source, Mapping) else {"default": source}
    tokens = {
        key: value for key, value in tokenizer_config.items() if key.endswith("_token") and isinstance(value, str)
    }
    made = [
        ChatTemplate(found, tokens) if isinstance(found := sources.get(name), str) else None
        for name in ("default", "tool_use")
    ]
    template, for_tools = made
    if template is not None:
        template.for_tools = for_tools
    return template


def encode_chat(template: ChatTemplate | None, tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """As ChatTemplate.encode. Raises NotSupportedError for a model without a template."""
    if template is None:
        raise NotSupportedError("this model has no chat template; use /v1/completions", param="messages")
    return template.encode(tokenizer, conversation)


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_system(message: Message) -> Message:
    return {**message, "role": "system"} if message["role"] == "developer" else message
