"""One running answer: engine deltas → text deltas, stop strings, usage, and the end in whatever way it comes.

Made by the service (service.py) for one call; read by a dialect. All calls come from one event loop. A sample's text
state lives from `open` to its end or to `close`, whichever is first; Observer.on_text_states counts it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from tabstop.call import Call, Confidence, Summary, TextDelta, Usage, up_to_end
from tabstop.engine.client import EngineClient
from tabstop.errors import DeadlineError, InputError, InternalError, TabstopError, UnavailableError, from_code
from tabstop.grammar.specs import Thinking
from tabstop.parts import Parts
from tabstop.text.detokenizer import Detokenizer, StopStrings
from tabstop.text.fim import FillReport
from tabstop.text.reporting import ReportedPrompt, Reporter, report_prompt
from tabstop.text.shaping import Shape, Shaper
from tabstop.text.tokenizer import Tokenizer
from tabstop.tools import ToolFormat
from tabstop.types import ConstraintSpec, Delta, FinishReason, Submit, TokenLogprobs, single_tokens

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who counts and measures (api/metrics.py). Called on the event loop: must be quick and must not raise."""

    def on_text_states(self, change: int) -> None: ...

    def on_first_token(self, model: str, seconds: float) -> None: ...

    def on_next_tokens(self, model: str, seconds: float, num_tokens: int) -> None:
        """A sample's next tokens came `seconds` after its last ones."""
        ...

    def on_end(self, summary: Summary) -> None: ...


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt's ids, and what reading its answer needs."""

    ids: list[int]
    echo: str = ""  # goes before the text
    fill: FillReport | None = None  # of a hole
    healed: bytes = b""  # the answer begins with these bytes, which the client has already
    num_healed: int = 0  # tokens that they were
    stop_strings: tuple[str, ...] = ()  # beside the call's
    overlap: str = ""  # a stop string, too: the start of the suffix
    crlf: bool = False
    constraints: tuple[ConstraintSpec, ...] | None = None  # instead of the call's
    tools: ToolFormat | None = None  # calls of the call's tools are read out of the text
    thinking: Thinking | None = None  # what comes before the answer's text


@dataclass(slots=True, eq=False)
class _Request:
    """One prompt of the call."""

    engine: EngineClient
    submit: Submit
    first_index: int  # the choice of its sample 0
    num_open: int  # samples not ended
    prompt: EncodedPrompt
    max_tokens: int | None  # where the engine was given more, for those that are skipped
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # so far
    report: ReportedPrompt | None = None  # of them, once they are there

    def make_report(self, tokenizer: Tokenizer) -> None:
        """Of the whole prompt; nothing where a deadline came first."""
        ids, given = self.prompt.ids, self.prompt_logprobs
        if self.submit.sampling.num_prompt_logprobs is not None and self.report is None and len(given) == len(ids) - 1:
            self.report, self.prompt_logprobs = report_prompt(tokenizer, ids, given, self.prompt.echo), []


@dataclass(slots=True, eq=False)
class _Sample:
    """Text state of one choice."""

    request: _Request
    detokenizer: Detokenizer
    echo: str  # goes before its first text
    shaper: Shaper
    reporter: Reporter | None  # where log-probabilities are wanted
    keeps_stop: bool  # a stop token is part of the text
    parts: Parts  # reasoning and calls
    confidence: Confidence | None = None  # so far, where it is wanted
    hides_logprobs: bool = False  # they were not asked for themselves
    last_time: float | None = None  # of its last tokens
    num_shown: int = 0  # tokens that are not skipped
    is_overlap: bool = False  # ended because it repeated the suffix
    has_prompt: bool = False  # its prompt's log-probabilities went out

    def read(self, delta: Delta, index: int) -> TextDelta:
        """The text of an engine delta, cut where the answer ends, as it goes out."""
        pieces = single_tokens(delta) if self.parts.may_end else (delta,)
        return up_to_end(self._read(piece, index) for piece in pieces)

    def _read(self, delta: Delta, index: int) -> TextDelta:
        delta, num_skipped = self._limited(delta)
        text = self._cut(delta, index)
        text.text = self.shaper.feed(text.text)
        if self.shaper.is_done and text.finish is not FinishReason.STOP:
            text.finish, text.stop_reason = FinishReason.LENGTH, None
        text.text, self.echo = self.echo + text.text, ""
        text.prompt, self.has_prompt = None if self.has_prompt else self.request.report, True
        logprobs = delta.logprobs[num_skipped : len(text.token_ids)]  # those of cut tokens are cut with them
        text.token_ids = text.token_ids[num_skipped:]
        if self.reporter is not None:
            text.logprobs = self.reporter.read(text.token_ids, logprobs)
        if self.confidence is not None:
            self.confidence.add(text.logprobs)
        if self.hides_logprobs:
            text.logprobs = []
        self.parts.read(text)
        if text.finish is not None:
            text.fill, text.confidence = self.request.prompt.fill, self.confidence
        return text

    def _limited(self, delta: Delta) -> tuple[Delta, int]:
        """The delta without tokens beyond the client's limit, and how many of its tokens are skipped."""
        ids, most = delta.token_ids, self.request.max_tokens
        num_skipped = self.detokenizer.count_skipped(ids)
        if most is not None and self.num_shown + len(ids) - num_skipped >= most:
            left = num_skipped + most - self.num_shown
            is_whole = len(ids) <= left
            finish = delta.finish if is_whole and delta.finish is not None else FinishReason.LENGTH
            stop_id = delta.stop_token_id if is_whole else None
            num_cached, logprobs = delta.num_cached_tokens, delta.logprobs[:left]
            delta = Delta(delta.request_id, delta.sample, ids[:left], finish, stop_id, num_cached, logprobs=logprobs)
        self.num_shown += len(delta.token_ids) - num_skipped
        return delta, num_skipped

    def _cut(self, delta: Delta, index: int) -> TextDelta:
        text_ids = delta.token_ids if delta.stop_token_id is None or self.keeps_stop else delta.token_ids[:-1]
        num_before = self.detokenizer.num_tokens
        text = self.detokenizer.feed(text_ids)
        if delta.finish is not None:
            text += self._without_overlap(self.detokenizer.finish(), delta.finish)
        stop_string = self.detokenizer.stop_string
        if stop_string is None:
            named = self.request.submit.limits.stop_token_ids  # an end token of the model is no reason worth naming
            reason = delta.stop_token_id if delta.stop_token_id in named else None
            return TextDelta(index, text, list(delta.token_ids), delta.finish, reason)
        kept = text_ids[: self.detokenizer.num_tokens - num_before]
        self.is_overlap = self.is_overlap or stop_string == self.request.prompt.overlap
        is_ours = self.is_overlap or stop_string in self.request.prompt.stop_strings
        return TextDelta(index, text, kept, FinishReason.STOP, None if is_ours else stop_string)

    def _without_overlap(self, tail: str, finish: FinishReason) -> str:
        """The last of the text, without a start of the suffix that only lacks its line end."""
        overlap = self.request.prompt.overlap.removesuffix("\n")
        if not overlap or finish is not FinishReason.STOP or not tail.endswith(overlap):
            return tail
        self.is_overlap = True
        return tail[: -len(overlap)]


class Answer:
    """Iterate with `next_deltas` until it returns nothing; then, or at any time before, `await close()`."""

    def __init__(
        self, call: Call, model: str, tokenizer: Tokenizer, observer: Observer, on_close: Callable[[Answer], None]
    ) -> None:
        """`model`: the name to show. `on_close` is called once."""
        self.call = call
        self.usage = Usage()
        self.submits: list[Submit] = []  # one for each prompt
        self.summary = Summary(model, call.request_id, self.usage, client=call.client)
        self._tokenizer = tokenizer
        self._observer = observer
        self._on_close = on_close
        self._stop_strings = StopStrings(call.stop_strings) if call.stop_strings else None
        self._samples: dict[int, _Sample] = {}  # by choice, those not ended
        self._tasks: list[asyncio.Task[None]] = []  # one for each request
        self._waiting: dict[int, TextDelta] = {}  # by choice, in the order in which they began to wait
        self._error: TabstopError | None = None
        self._changed = asyncio.Event()
        self.start_time = time.perf_counter()
        """From when times are measured; the service sets it back to the call's arrival."""
        self._closed = False
        self.transcript: list[str] | None = None
        """All text as it came, if somebody put a list here (--log-prompts)."""

    @property
    def num_text_states(self) -> int:
        """Samples whose text is still being assembled."""
        return len(self._samples)

    # ---- the service's side

    def open(self, engine: EngineClient, submit: Submit, prompt: EncodedPrompt, max_tokens: int) -> None:
        """Sends one prompt's request and reads its deltas from now on. `max_tokens`: of the text that is shown.

        Raises EngineDeadError.
        """
        first, limit = len(self._tasks) * submit.num_samples, max_tokens if prompt.healed else None
        request = _Request(engine, submit, first, submit.num_samples, prompt, limit)
        stream = engine.submit(submit)
        self.submits.append(submit)
        self.summary.engine_ids.append(submit.request_id)
        self.usage.num_prompt_tokens += len(prompt.ids) + prompt.num_healed
        self._spend(len(prompt.ids) + prompt.num_healed)
        self.summary.num_healed_tokens += prompt.num_healed
        if prompt.fill is not None:
            self.summary.fills.append(prompt.fill)
        stop_strings = self._stop_strings_of(prompt)
        for index in range(request.first_index, request.first_index + submit.num_samples):
            self._samples[index] = self._make_sample(request, stop_strings)
        self._observer.on_text_states(submit.num_samples)
        self._tasks.append(asyncio.create_task(self._read(stream, request)))

    def _stop_strings_of(self, prompt: EncodedPrompt) -> StopStrings | None:
        extra = (*prompt.stop_strings, *([prompt.overlap] if prompt.overlap else []))
        return StopStrings((*self.call.stop_strings, *extra)) if extra else self._stop_strings

    def _make_sample(self, request: _Request, stop_strings: StopStrings | None) -> _Sample:
        call, prompt = self.call, request.prompt
        detokenizer = Detokenizer(
            self._tokenizer,
            stop_strings,
            min_tokens=call.min_tokens,
            keep_stop_string=call.keep_stop_string,
            skip=len(prompt.healed),
        )
        parts = Parts(call, prompt.thinking, prompt.tools, self._tokenizer, self.usage)
        detokenizer.control_bytes = parts.control_bytes
        shaper = Shaper(Shape(prompt.crlf, call.min_indent, call.max_seconds))
        reporter = None if call.num_reported is None else Reporter(self._tokenizer, len(prompt.echo))
        sample = _Sample(request, detokenizer, prompt.echo, shaper, reporter, call.keep_stop_string, parts)
        sample.confidence = Confidence() if call.confidence else None
        sample.hides_logprobs = call.num_logprobs is None and call.num_best is None
        return sample

    async def started(self) -> None:
        """Waits for the first news from the engine. Raises the TabstopError that prevents an answer."""
        await self._changed.wait()
        if self._error is not None:
            raise self._error

    # ---- the dialect's side

    async def next_deltas(self) -> list[TextDelta]:
        """All text that waits, at least one delta, merged by choice; nothing when the answer is complete or closed.

        Raises the TabstopError that ended it, after the text before it.
        """
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if not self._samples:
                return []
            self._changed.clear()
            await self._changed.wait()
        deltas = list(self._waiting.values())
        self._waiting.clear()
        return deltas

    def fail(self, error: TabstopError) -> None:
        """Ends the answer with an error: open samples are aborted and their text state dropped at once.

        Too late for an answer whose samples have all ended.
        """
        if self._error is None and not self._closed and (self._samples or not self._tasks):
            self._error = error
            self._drop()

    async def close(self) -> None:
        """Leaves the answer: what has not ended is aborted and dropped at once. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._error is not None:
            self.summary.outcome = self._error.code
        elif not self._samples:
            self.summary.outcome = "ok"
        self._drop()
        self._waiting.clear()
        self.summary.seconds = time.perf_counter() - self.start_time
        if self.transcript is not None:
            log.info("transcript of %s: %r", self.call.request_id, "".join(self.transcript))
        self._observer.on_end(self.summary)
        self._on_close(self)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()  # a cancelled one keeps its frame, which keeps this answer

    # ---- inside

    async def _read(self, stream: AsyncIterator[Delta], request: _Request) -> None:
        """Takes the deltas of one request until its last sample has ended."""
        try:
            async for delta in stream:
                self._take(delta, request)
                if not request.num_open:
                    break
        except TabstopError as error:
            self.fail(error)
        except Exception:
            log.exception("reading an answer failed")
            self.fail(InternalError("the answer could not be read; see the server's log"))
        finally:
            if request.num_open:
                self.fail(InternalError("the engine ended a request without saying so"))
            aclose = getattr(stream, "aclose", None)
            if aclose is not None:
                await aclose()

    def _take(self, delta: Delta, request: _Request) -> None:
        index = request.first_index + delta.sample
        sample = self._samples.get(index)
        if sample is None:  # ended by a stop string, of which the engine had not heard yet
            return
        if delta.failure is not None:
            error = from_code(delta.failure.code, delta.failure.message)
            if type(error) is InputError:  # an engine knows constraints, not who asked for them
                error.param = self.call.constraint_param
            return self.fail(error)
        if delta.finish in (FinishReason.ABORT, FinishReason.ERROR):
            return self.fail(UnavailableError("the engine ended the request; try again", retry_after=1))
        self.usage.num_cached_tokens += delta.num_cached_tokens - request.num_cached_tokens
        request.num_cached_tokens = delta.num_cached_tokens
        request.prompt_logprobs += delta.prompt_logprobs
        if not delta.token_ids and delta.finish is None:  # a part of the prompt
            return None
        request.make_report(self._tokenizer)
        text = sample.read(delta, index)
        if text.token_ids:
            self._measure(sample, len(text.token_ids))
        elif text.finish is FinishReason.DEADLINE and not self.usage.num_completion_tokens:
            return self.fail(DeadlineError("the deadline passed before the first token"))
        if text.finish is not None:
            self._end_sample(index, text.finish, is_known=delta.finish is not None)
        if text.text or text.reasoning or text.calls or text.token_ids or text.finish is not None:
            self._push(text)
        return None

    def _end_sample(self, index: int, finish: FinishReason, *, is_known: bool) -> None:
        """Drops the text state; tells the engine when it does not know that the sample ended."""
        ended = self._samples.pop(index)
        request = ended.request
        request.num_open -= 1
        self.summary.num_overlaps += ended.is_overlap
        self.summary.finishes.append(finish)
        self.usage.seconds = time.perf_counter() - self.start_time
        self._observer.on_text_states(-1)
        if not is_known:
            sample = index - request.first_index
            self._abort(request, (sample,), FinishReason.STOP)

    def _measure(self, sample: _Sample, num_tokens: int) -> None:
        now = time.perf_counter()
        self.usage.num_completion_tokens += num_tokens
        self._spend(num_tokens)
        if self.summary.first_token_seconds is None:
            self.summary.first_token_seconds = self.usage.prompt_seconds = now - self.start_time
            self._observer.on_first_token(self.summary.model, now - self.start_time)
        elif sample.last_time is not None:
            self._observer.on_next_tokens(self.summary.model, now - sample.last_time, num_tokens)
        sample.last_time = now

    def _spend(self, num_tokens: int) -> None:
        if self.call.spend_tokens is not None:
            self.call.spend_tokens(num_tokens)

    def _push(self, delta: TextDelta) -> None:
        if self.transcript is not None:
            self.transcript.append(f"[{delta.index}]{delta.text}{delta.calls or ''}")
        waiting = self._waiting.get(delta.index)
        if waiting is None:
            self._waiting[delta.index] = delta
        else:
            waiting.append(delta)
        self._changed.set()

    def _drop(self) -> None:
        """Ends what has not ended: the engine's side by aborts, ours by forgetting."""
        requests = {sample.request for sample in self._samples.values()}
        if self._samples:
            self._observer.on_text_states(-len(self._samples))
        self._samples.clear()
        for request in requests:
            request.num_open = 0
            self._abort(request, None, FinishReason.ABORT)
        self._changed.set()

    def _abort(self, request: _Request, samples: tuple[int, ...] | None, reason: FinishReason) -> None:
        try:
            request.engine.abort(request.submit.request_id, samples, reason)
        except TabstopError as error:  # the engine is gone, and the request with it
            log.debug("abort: %s", error)
