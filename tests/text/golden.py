"""Our rendering of a chat template beside transformers': `python -m tests.text.golden FOLDER` compares *.jinja files.

Both get the same conversations (conversations.py) and the same small vocabulary with the template's special tokens.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from tabstop.errors import InputError, UnsupportedModelError
from tabstop.text.chat import ChatTemplate, Conversation
from tabstop.text.messages import make_conversation, read_messages, read_switches
from tabstop.text.tokenizer import Tokenizer
from tests.text.conversations import CONVERSATIONS, Body
from tests.text.fim_vocabularies import byte_level_definition, sentencepiece_definition

HEADER = re.compile(r"\{#-(.*?)-?#\}", re.DOTALL)
LIKELY_TOKENS = re.compile(r"<\|[^<>|{}'\n ]{1,40}\|>|<｜[^<>{}'\n]{1,40}｜>|\[/?[A-Z_]{2,20}\]")
LIKELY_ADDED = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value|tools)>")


@dataclass(frozen=True)
class Family:
    """A template and what its checkpoints say beside it."""

    source: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()  # tokens of their own that are not special
    pieces: bool = False  # a SentencePiece vocabulary
    tokens: dict[str, str] = field(default_factory=dict)  # bos_token, …
    shapes: tuple[tuple[bool, ...], ...] = ((True, False, False),)
    """(arguments are objects, no content is none, contents are lists of parts): what transformers is given."""

    def definition(self) -> dict[str, Any]:
        """Its tokenizer.json."""
        make = sentencepiece_definition if self.pieces else byte_level_definition
        definition = make((*self.special, *self.added))
        for token in definition["added_tokens"]:
            if token["content"] in self.added:
                token["special"] = False
        return definition


def read_family(path: Path) -> Family:
    """A file whose first comment holds the family's settings as JSON; of another one they are guessed."""
    source = path.read_text(encoding="utf-8")
    header = HEADER.match(source)
    if header is not None and header[1].strip().startswith("{"):
        given = json.loads(header[1])
        shapes = tuple((*shape, False) for shape in given.pop("shapes", [[True, False]]))
        lists = {name: tuple(given.pop(name, ())) for name in ("special", "added")}
        return Family(source, **lists, shapes=shapes, **given)
    special = tuple(dict.fromkeys(["<s>", "</s>", *LIKELY_TOKENS.findall(source)]))
    shapes = tuple(itertools.product((True, False), (False, True), (False, True)))
    added = tuple(dict.fromkeys(LIKELY_ADDED.findall(source)))
    return Family(source, special, added, tokens={"bos_token": "<s>", "eos_token": "</s>"}, shapes=shapes)


def conversation(body: Body) -> Conversation:
    """As the HTTP side reads a body."""
    return make_conversation(
        read_messages(body["messages"]),
        body.get("add_generation_prompt", True),
        body.get("continue_final_message"),
        body.get("tools"),
        read_switches(body.get("chat_template_kwargs")),
    )


def as_transformers_takes_it(body: Body, family: Family, shape: tuple[bool, ...]) -> dict[str, Any]:
    """Arguments of apply_chat_template, made without our code, as transformers' documentation has them."""
    as_objects, with_none, as_parts = shape
    messages = []
    for given in body["messages"]:
        message = dict(given)
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
        if message["role"] == "developer" and "developer" not in family.source:
            message["role"] = "system"
        if "tool_calls" in message:
            message["content"] = message["content"] or (None if with_none else "")
            message["tool_calls"] = [
                call | {"function": {"name": made["name"], "arguments": json.loads(made["arguments"])}}
                if as_objects
                else call
                for call in message["tool_calls"]
                for made in [call["function"]]
            ]
        if as_parts and isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        messages.append(message)
    continues = body.get("continue_final_message", messages[-1]["role"] == "assistant")
    generates = body.get("add_generation_prompt", True) and not continues
    return {
        "conversation": messages,
        "tools": body.get("tools"),
        "add_generation_prompt": generates,
        "continue_final_message": continues,
        **body.get("chat_template_kwargs", {}),
    }


class Pair:
    """A family here and there."""

    def __init__(self, family: Family) -> None:
        from transformers import PreTrainedTokenizerFast

        definition = family.definition()
        self.family = family
        self.tokenizer = Tokenizer(definition, bos_token=family.tokens.get("bos_token"))
        self.template = ChatTemplate(family.source, family.tokens)
        built = tokenizers.Tokenizer.from_str(json.dumps(definition))
        self.oracle = PreTrainedTokenizerFast(
            tokenizer_object=built, chat_template=family.source, clean_up_tokenization_spaces=False, **family.tokens
        )

    def ours(self, body: Body) -> tuple[str, list[int]] | None:
        """None: refused."""
        try:
            asked = conversation(body)
            ids = self.template.encode(self.tokenizer, asked)
        except InputError:
            return None
        if asked.continue_final_message:  # what is rendered of it is text of the whole message
            return self.oracle.decode(ids), ids
        return self.template.render(asked), ids

    def theirs(self, body: Body) -> list[tuple[str, list[int]] | None]:
        """For each shape in which calls may be given."""
        found: list[tuple[str, list[int]] | None] = []
        for shape in self.family.shapes:
            given = as_transformers_takes_it(body, self.family, shape)
            try:
                text, ids = self._render_with_none(given) if shape[1] else self._render(given)
            except Exception:
                found.append(None)
                continue
            found.append((self.oracle.decode(ids) if given["continue_final_message"] else text, ids))
        return found

    def _render(self, given: dict[str, Any]) -> tuple[str, list[int]]:
        text = self.oracle.apply_chat_template(tokenize=False, **given)
        return text, list(self.oracle.apply_chat_template(tokenize=True, return_dict=False, **given))

    def _render_with_none(self, given: dict[str, Any]) -> tuple[str, list[int]]:
        """What apply_chat_template did before it dropped keys that are None, as templates that ask for them expect."""
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), _ = render_jinja_template(
            conversations=[given.pop("conversation")], chat_template=self.family.source, **self.family.tokens, **given
        )
        return text, list(self.oracle(text, add_special_tokens=False)["input_ids"])


def differences(path: Path) -> Iterator[str]:
    try:
        pair = Pair(read_family(path))
    except UnsupportedModelError as error:
        yield f"{path.name}: {error.message}"
        return
    for name, body in CONVERSATIONS.items():
        ours, theirs = pair.ours(body), pair.theirs(body)
        if ours not in theirs:
            yield f"{path.name}: {name}\n  ours:   {ours and ours[0]!r}\n  theirs: {theirs[0] and theirs[0][0]!r}"


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).glob("*.jinja"))
    found = [line for file in files for line in differences(file)]
    print(*found, sep="\n")
    print(f"{len(files)} templates, {len(CONVERSATIONS)} conversations each, {len(found)} differences")
