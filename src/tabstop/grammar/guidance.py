"""JSON schemas, regular expressions, choices and grammars, through llguidance (a parser over the token trie, in Rust).

Its masks are laid out as ours. Each sample has a matcher of its own, copied from a compiled one that is kept. What a
client sends may be made to cost much: size, depth and time are bounded here, and so is the time of the masks
(engine/masks.py bounds a single one). llguidance knows one end token, an id behind the model's; which tokens end a
sample is the request's.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from tabstop.errors import InputError, OverloadedError
from tabstop.grammar import Before, GrammarLimits, Vocabulary
from tabstop.grammar.json_schema import explained, prepared
from tabstop.grammar.specs import Thinking

LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,  # a tenth of llguidance's: ((a{100}){100}){100} took 1.3 s and 180 MB at its own
    step_max_items=20_000,  # llguidance's 50,000 let one mask of an ambiguous grammar take 0.8 s
    max_lexer_states=50_000,  # 1 to 2 kB each
    verbose_errors=False,  # would repeat the client's grammar
)

MAX_ENCODED = 128
"""Characters of a forced text that are spelled at once; the rest of a long one waits for the next time."""

MAX_GBNF = 16 << 10
"""Characters: the converter is Python, and its time grows by the square of the number of rules."""

MAX_RUNAWAYS = 4
"""Compilations that took too long and still run; they cannot be stopped, but they end."""

START_SECONDS, TOKEN_SECONDS = 0.25, 0.002
"""What the masks of a sample may take together, in a thread's time: so much, and so much more for each token."""

MAX_MESSAGE = 300


class Grammar:
    """A Constraint (grammar/__init__.py): llguidance's matcher of one sample."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, num_tokens: int = 0, seconds: float = 0.0) -> None:
        """`num_tokens`, `seconds`: accepted, and taken, so far."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._num_tokens = num_tokens
        self._seconds = seconds
        self._own = np.empty(-(-(vocab_size + 1) // 32), np.uint32)  # the last mask, one bit longer than others
        self._place = self._own.ctypes.data, self._own.nbytes
        self._end_bit = np.uint32(1 << vocab_size % 32)

    def fill(self, mask: np.ndarray, ends: np.ndarray) -> None:
        own, is_whole = self._own, self._compute()
        if ends.size:
            bits = np.uint32(1) << (ends % 32).astype(np.uint32)
            if is_whole:
                np.bitwise_or.at(own, ends // 32, bits)
            else:
                np.bitwise_and.at(own, ends // 32, ~bits)
        mask &= own[: len(mask)].view(np.int32)

    def _compute(self) -> bool:
        """The next mask; whether the text may end here."""
        start = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(*self._place)
        self._spend(time.thread_time() - start)
        self._check()
        is_whole = bool(self._own[-1] & self._end_bit)
        self._own[-1] &= ~self._end_bit
        return is_whole

    def accept(self, token_id: int) -> None:
        start = time.thread_time()
        is_taken = self._matcher.consume_token(token_id)
        self._num_tokens += 1
        self._spend(time.thread_time() - start)
        if not is_taken:
            self._check()
            raise InputError("the grammar does not allow the token that was drawn")

    def _spend(self, seconds: float) -> None:
        self._seconds += seconds
        if self._seconds > START_SECONDS + TOKEN_SECONDS * self._num_tokens:
            raise InputError("the grammar takes too long to follow; make it simpler or less ambiguous")

    def _check(self) -> None:
        """Raises InputError if the matcher has failed: then its masks would allow an end."""
        if self._matcher.is_error():
            raise InputError(f"the grammar cannot be followed further: {_readable(self._matcher.get_error())}")

    def rollback(self, num_tokens: int) -> None:
        self._num_tokens -= num_tokens
        assert self._matcher.rollback(num_tokens), "more than was accepted"

    @property
    def released(self) -> bool:
        return False

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped()

    def fork(self) -> Grammar:
        return Grammar(self._matcher.deep_copy(), self._vocab_size, self._num_tokens, self._seconds)


class Guidance:
    """The vocabulary as llguidance wants it, and the grammars compiled last."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.limits: GrammarLimits = vocabulary.limits
        self._cache: OrderedDict[tuple[str, Before], Grammar | InputError] = OrderedDict()
        self._lock = threading.Lock()
        self._num_runaways = 0
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(vocabulary)), eos_token=[vocabulary.size])

    def compile(self, grammar: str, before: Before, name: str) -> Grammar:
        """`grammar`: one of llguidance's grammars as JSON, or a list of one and those that it names.

        `name`: of what the client sent.

        Raises InputError, OverloadedError.
        """
        key = (grammar, before)
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
        if found is None:
            found = self._compile(_joined(grammar, before), name)
            with self._lock:
                self._cache[key] = found
                while len(self._cache) > self.limits.num_cached:
                    self._cache.popitem(last=False)
        if isinstance(found, InputError):
            raise InputError(found.message)
        return found

    def _compile(self, grammar: str, name: str) -> Grammar | InputError:
        """The matcher, which knows its first mask by then; or why there is none."""
        results: list[Grammar | InputError] = []
        seconds = self.limits.compile_seconds
        if not self._run_within(seconds, lambda: results.append(self._make(grammar, name))):
            return InputError(f"{name} took over {seconds:g} seconds to compile (--grammar-timeout); make it simpler")
        return results[0]

    def _make(self, grammar: str, name: str) -> Grammar | InputError:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            return InputError(f"{name} cannot be used: {explained(_readable(matcher.get_error()))}")
        return Grammar(matcher, self._vocabulary.size)

    def _run_within(self, seconds: float, work: Callable[[], None]) -> bool:
        """Runs it on a thread of its own, which cannot be stopped, but left. Raises OverloadedError."""
        if self._num_runaways >= MAX_RUNAWAYS:
            raise OverloadedError("too many grammars take too long to compile; retry later", retry_after=5)
        thread = threading.Thread(target=work, name="compile a grammar", daemon=True)
        thread.start()
        thread.join(seconds)
        if not thread.is_alive():
            return True
        with self._lock:
            self._num_runaways += 1
        threading.Thread(target=self._await, args=(thread,), name="await a grammar", daemon=True).start()
        return False

    def _await(self, thread: threading.Thread) -> None:
        thread.join()
        with self._lock:
            self._num_runaways -= 1


class _Tokens:
    """The vocabulary, with an end token behind it, as llguidance's TokenizerWrapper reads it.

    Control tokens match nothing but their own names in a grammar (`<|name|>`, unquoted).
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        control = vocabulary.control_bytes
        self._vocabulary = vocabulary
        self.eos_token_id = vocabulary.size
        self.bos_token_id = None
        names = [spelled or control.get(i, b"") for i, spelled in enumerate(vocabulary.token_bytes)]
        self.tokens = [*names, b"<end of the text>"]
        self.special_token_ids = [i for i, spelled in enumerate(vocabulary.token_bytes) if not spelled and names[i]]
        self.special_token_ids.append(vocabulary.size)

    def __call__(self, text: str | bytes) -> Sequence[int]:
        """How a text that must come is best spelled: as the tokenizer does inside a text, if that is possible."""
        start = (text.decode() if isinstance(text, bytes) else text)[:MAX_ENCODED]
        wanted = start.encode()
        for opening in ("", "\n"):  # some tokenizers begin a text by a blank
            ids = list(self._vocabulary.encode(opening + start))
            while ids and self._spelled(ids) != wanted:
                del ids[0]
            if ids:
                return ids
        return self._longest(wanted)

    def _spelled(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._vocabulary.token_bytes[i] for i in ids)

    def _longest(self, wanted: bytes) -> list[int]:
        """The longest tokens, one after the other, as far as there are any."""
        ids, trie = [], self._vocabulary.trie
        while wanted:
            found = (trie.spelling(wanted[:end]) for end in range(len(wanted), 0, -1))
            token = next((int(some[0]) for some in found if some.size), None)
            if token is None:
                break
            ids.append(token)
            wanted = wanted[len(self._vocabulary.token_bytes[token]) :]
        return ids


# ---- kinds


def compile_json_schema(value: Any, vocabulary: Vocabulary, before: Before = b"") -> Grammar:
    """`value`: the schema as JSON."""
    check_size(value, vocabulary.limits, "the JSON schema")
    schema = prepared(value, vocabulary.limits.max_depth)
    return vocabulary.guidance.compile(schema, before, "the JSON schema")


def compile_regex(value: Any, vocabulary: Vocabulary, before: Before = b"") -> Grammar:
    """`value`: a regular expression of Rust's regex crate; the whole text matches it.

    `\\d` and `\\w` are ASCII, as JSON schemas have them.
    """
    check_size(value, vocabulary.limits, "the regular expression")
    lark = f"start: /{llguidance.regex_to_lark(value, 'dw')}/"
    return vocabulary.guidance.compile(json.dumps({"lark_grammar": lark}), before, "the regular expression")


def compile_choice(value: Any, vocabulary: Vocabulary, before: Before = b"") -> Grammar:
    """`value`: a list of texts as JSON."""
    check_size(value, vocabulary.limits, "the list of choices")
    choices = json.loads(value)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise InputError("choices must be a list of at least one text")
    lark = "start: " + " | ".join(map(_quoted, dict.fromkeys(choices)))
    return vocabulary.guidance.compile(json.dumps({"lark_grammar": lark}), before, "the list of choices")


def compile_lark(value: Any, vocabulary: Vocabulary, before: Before = b"") -> Grammar:
    """`value`: a grammar in llguidance's dialect of Lark; its rule `start` is the text."""
    check_size(value, vocabulary.limits, "the grammar")
    return vocabulary.guidance.compile(json.dumps({"lark_grammar": value}), before, "the grammar")


def compile_gbnf(value: Any, vocabulary: Vocabulary, before: Before = b"") -> Grammar:
    """`value`: a grammar in llama.cpp's GBNF; its rule `root` is the text."""
    check_size(value, vocabulary.limits, "the grammar")
    if len(value) > MAX_GBNF:
        raise InputError(f"a GBNF grammar has at most {MAX_GBNF} characters; write a larger one in Lark")
    try:
        lark = gbnf_to_lark(re.sub(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", _character, value, flags=re.DOTALL))
        check_size(lark, vocabulary.limits, "the grammar")
    except (RecursionError, OverflowError):
        raise InputError("the grammar is nested too deeply, or names no character") from None
    except InputError:
        raise
    except Exception as error:  # the package raises bare ones
        raise InputError(f"the grammar is not valid GBNF: {_readable(str(error))}") from None
    return vocabulary.guidance.compile(json.dumps({"lark_grammar": lark}), before, "the grammar")


def _character(escape: re.Match[str]) -> str:
    """What stands for an escape; llguidance's converter loses zeros of the long ones."""
    if len(escape[1]) == 1:
        return escape[0]
    code = int(escape[1][1:], 16)
    return chr(code) if code > 0x7F else f"\\x{code:02x}"


def _joined(grammar: str, before: Before) -> str:
    """llguidance's list of grammars: the grammar, after some bytes or reasoning."""
    if not before:
        return f'{{"grammars": {grammar if grammar.startswith("[") else f"[{grammar}]"}}}'
    if isinstance(before, bytes):
        try:
            opening = f"start: {_quoted(before.decode())} @body"
        except UnicodeDecodeError:
            raise InputError("a grammar can only follow whole characters") from None
    else:
        opening = _reasoning(before)
    given = json.loads(grammar)
    body, *named = given if isinstance(given, list) else [given]
    start = {"name": "start", "lark_grammar": opening}
    return json.dumps({"grammars": [start, body | {"name": "body"}, *named]})


def _reasoning(thinking: Thinking) -> str:
    """Lark: any text up to the end tag, and at most two line ends; whether there is any is the model's choice."""
    start = _quoted(thinking.start) if thinking.start_id is None else f"<[{thinking.start_id}]>"
    if thinking.end_id is None:
        inside = f"inside\ninside[suffix={_quoted(thinking.end)}]: /(?s:.*)/"
    else:
        inside = f"inside <[{thinking.end_id}]>\ninside: /(?s:.*)/"
    rest = f"think: {inside}\nblank: /[\\n]{{0,2}}/\n"
    return ("start: think blank @body\n" if thinking.is_open else f"start: ({start} think blank)? @body\n") + rest


def _quoted(text: str) -> str:
    """A text as a string of a Lark grammar."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", escaped) + '"'


def check_size(value: Any, limits: GrammarLimits, name: str) -> None:
    """Raises InputError for what is no text, or too long a one."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InputError(f"{name} is not valid Unicode") from None
    if size > limits.max_bytes:
        raise InputError(f"{name} has {size} bytes; at most {limits.max_bytes} are allowed (--max-grammar-bytes)")


def _readable(message: str) -> str:
    """What llguidance says, in one line."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= MAX_MESSAGE else line[:MAX_MESSAGE] + "…"
