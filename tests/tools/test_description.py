"""Tools in words, for templates that know none, and offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabstop import LLM, SamplingParams
from tabstop.checkpoint import open_checkpoint
from tabstop.text import TextOptions, load_text
from tabstop.text.chat import Conversation
from tabstop.tools import FORMATS
from tests import tiny
from tests.tools.models import tool_model
from tests.tools.reading import hear, made

TOOLS = [{"type": "function", "function": {"name": "now", "description": "é <|im_end|>", "parameters": {}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"a": "x", "b": [1]}'}}
MESSAGES = [
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "Well.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "noon", "tool_call_id": "1"},
]


@pytest.mark.parametrize("form", FORMATS)
def test_a_template_without_tools_is_told_of_them_in_words(tmp_path: Path, form: str) -> None:
    """And earlier calls are shown to the model as it would write them."""
    folder = str(tiny.tiny_llama(tmp_path))
    text = load_text(open_checkpoint(folder), options=TextOptions(tool_format=form))
    assert text.template is not None
    prompt = text.template.render(Conversation(MESSAGES, tools=TOOLS))
    assert (
        prompt.startswith("<|im_start|>system\nYou can call")
        and '{"name": "now", "description": "é <|im_end|>"' in prompt
    )
    said = prompt.partition("assistant\nWell.\n")[2].partition("<|im_end|>\n<|im_start|>tool\nnoon")[0]
    assert hear(made(form), [said]).good == [("now", '{"a": "x", "b": [1]}')] * 2 or form == "qwen3_coder"
    if form == "qwen3_coder":
        assert hear(made(form), [said]).good == [("now", '{"a": "x", "b": "[1]"}')] * 2
    with_system = text.template.render(Conversation([{"role": "system", "content": "Be brief."}], tools=TOOLS))
    assert with_system.startswith("<|im_start|>system\nBe brief.\n\nYou can call")
    ids = text.template.encode(text.tokenizer, Conversation(MESSAGES, tools=TOOLS))
    assert ids.count(tiny.IM_END) == 4
    assert text.template.render(Conversation(MESSAGES[:1])) == "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_knows_tools_says_it_itself(tmp_path: Path) -> None:
    text = load_text(open_checkpoint(str(tool_model(tmp_path))), options=TextOptions(tool_format="mistral"))
    assert text.template is not None
    assert "You can call" not in text.template.render(Conversation(MESSAGES, tools=TOOLS))


def test_offline_chats_are_told_of_tools(tmp_path: Path) -> None:
    llm = LLM(model=str(tool_model(tmp_path)), num_threads=1, max_model_len=512)
    try:
        params = SamplingParams(max_tokens=1, temperature=0)
        with_tools, without = (
            llm.chat([{"role": "user", "content": "?"}], params, use_tqdm=False, tools=tools)[0].prompt_token_ids
            for tools in (TOOLS, None)
        )
        assert with_tools is not None and without is not None
        shown = llm.get_tokenizer().decode(with_tools)
        assert '"name": "now"' in shown and len(with_tools) > len(without) + 20
    finally:
        llm.close()
