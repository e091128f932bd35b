"""Strings ↔ ids: tokenizer, detokenizer, chat templates, holes in files, reasoning, and a checkpoint's defaults.

The folder's contract is ModelText: everything textual of one model, loaded once a process. It imports no torch.

- ids: tokenizer.py, from the files that folder_vocabulary.py, gguf_vocabulary.py, sentencepiece.py, tekken.py,
  tiktoken.py and byte_level.py read; detokenizer.py back
- chats: messages.py (as clients write them) → chat.py (the template, in sandbox.py; marks.py guards its texts);
  reasoning.py tells thoughts from answers
- holes: fim.py lays one out; a new family is an entry of fim_families.py, what its repository looks like one of
  fim_frames.py, and what tells its vocabulary from others is in fim_detection.py; fim_budget.py cuts, fim_transcode.py
  reads foreign markers, healing.py takes the cursor back to a border
- answers: shaping.py (line ends, indents, time), reporting.py (log-probabilities)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tabstop.checkpoint import Checkpoint
    from tabstop.text.chat import ChatTemplate
    from tabstop.text.fim import FillIn
    from tabstop.text.healing import Healer
    from tabstop.text.reasoning import Reasoning
    from tabstop.text.tokenizer import Tokenizer
    from tabstop.tools import ToolFormat
    from tabstop.types import Sampling


@dataclass(frozen=True, slots=True)
class ModelText:
    """Shared by all requests of one model; immutable."""

    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the model cannot chat
    sampling: Sampling  # where a client gives no value
    fill: FillIn  # how it fills holes in files
    healer: Healer  # takes prompts back to where their tokens are stable
    reasoning: Reasoning | None = None  # how its thoughts in a chat are told from its answer; None: it has none
    tools: ToolFormat | None = None  # how it writes calls; None: it calls nothing


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What of a model's texts is not left to its checkpoint."""

    fim: str = "auto"  # auto, off or the family in whose layout holes are filled (--fim)
    reasoning: str = "auto"  # auto, off or a style of text/reasoning.py (--reasoning)
    tool_format: str = "auto"  # auto, off or one of tools/__init__.py (--tool-format)


DEFAULT_OPTIONS = TextOptions()


def load_text(
    checkpoint: Checkpoint, tokenizer: Checkpoint | None = None, options: TextOptions = DEFAULT_OPTIONS
) -> ModelText:
    """The text side of a checkpoint; tokenizer and template from another checkpoint if one is given (--tokenizer).

    Raises StartupError subclasses.
    """
    from tabstop.text.chat import load_chat_template
    from tabstop.text.defaults import sampling_defaults
    from tabstop.text.fim import load_fill_in
    from tabstop.text.healing import Healer
    from tabstop.text.reasoning import find_reasoning
    from tabstop.text.tokenizer import load_tokenizer
    from tabstop.tools import load_format

    source = tokenizer or checkpoint
    loaded = load_tokenizer(source)
    template = load_chat_template(source.tokenizer_config)
    form = load_format(template.source_for_tools if template else None, options.tool_format)
    if template is not None and "tools" not in template.source_for_tools:
        template.described_by = form
    return ModelText(
        loaded,
        template,
        sampling_defaults(checkpoint),
        load_fill_in(checkpoint, loaded, options.fim),
        Healer(loaded.token_bytes),
        find_reasoning(options.reasoning, template.source if template else None),
        form,
    )
