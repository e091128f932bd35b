"""A tiny real model whose vocabulary has every family's markers, and a template that is told of tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import tiny

CONTROL = (
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|tool_call|>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
)
PLAIN = ("<tool_call>", "</tool_call>")

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tool_model(folder: Path) -> Path:
    """The folder of a checkpoint with random weights."""
    names = [*CONTROL, *PLAIN]
    size = tiny.VOCAB_SIZE + len(names)
    tiny.write_checkpoint(folder, tiny.llama_config(vocab_size=size, max_position_embeddings=4096))
    definition = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition["added_tokens"] += [
        {"id": tiny.VOCAB_SIZE + at, "content": name, "special": name in CONTROL} | flags
        for at, name in enumerate(names)
    ]
    _write(folder / "tokenizer.json", definition)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    _write(folder / "tokenizer_config.json", settings | {"chat_template": TEMPLATE})
    return folder


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
