"""The offline API, in vLLM's shape: the server's own service over an engine in this process."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from rich.progress import Progress

from tabstop.call import Call, Prompt, TextDelta, TextPrompt, TokenPrompt, best_choices
from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig, ServerConfig
from tabstop.engine import garbage
from tabstop.engine.build import build_core
from tabstop.engine.inproc import InprocClient
from tabstop.errors import ConfigError, EngineDeadError, InputError, NotSupportedError
from tabstop.limits import MAX_CHOICES
from tabstop.outputs import NO_BEAMS, CompletionOutput, Logprob, RequestOutput, SamplingParams
from tabstop.service import Service, make_service
from tabstop.text import TextOptions
from tabstop.text.chat import Conversation
from tabstop.text.messages import make_conversation, read_messages, read_switches
from tabstop.text.reasoning import split_reasoning, thinking_in
from tabstop.text.reporting import ReportedToken
from tabstop.text.tokenizer import Tokenizer
from tabstop.types import unpack_ids

log = logging.getLogger(__name__)

T = TypeVar("T")

PromptLike = str | list[int] | dict[str, Any]
IGNORED = ("trust_remote_code", "enforce_eager", "swap_space", "disable_log_stats", "max_num_partial_prefills")
"""Options of vLLM that change nothing here."""

PROMPT_KINDS = 'a prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'


class LLM:
    """A model in this process. Thread-safe: calls from several threads share one batch.

    model: as in `tabstop serve` · further options: the fields of config.EngineConfig. Raises StartupError subclasses.
    While it lives it sets torch's number of threads. It ends when it is closed, or when nobody holds it any more.
    """

    def __init__(self, model: str = "default", *, tensor_parallel_size: int = 1, **options: Any) -> None:
        if tensor_parallel_size != 1:
            raise NotSupportedError("tensor_parallel_size must be 1; several devices are not supported yet")
        if options.get("trust_remote_code"):
            log.warning("trust_remote_code is ignored: this engine never runs code from a checkpoint")
        options = {name: value for name, value in options.items() if name not in IGNORED}
        try:
            config = EngineConfig(model=model, **options)
        except TypeError as error:
            raise ConfigError(f"unknown option: {error}") from None
        checkpoint = open_checkpoint(config.model, revision=config.revision, offline=config.offline)
        tokenizer = open_checkpoint(config.tokenizer, offline=config.offline) if config.tokenizer else None
        num_threads = torch.get_num_threads()
        self._client = InprocClient(build_core(config))
        garbage.settle()
        self._service: Service = make_service(
            checkpoint,
            [self._client],
            ServerConfig(max_num_samples=MAX_CHOICES, max_queue_age=86_400, max_request_tokens=1 << 40),
            tokenizer=tokenizer,
            options=TextOptions(config.fim, config.reasoning, config.tool_format),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        self._num_at_once = 2 * self._client.info.max_num_seqs  # keeps the batch full and memory flat
        self._end = weakref.finalize(self, _end, self._client, self._loop, self._thread, num_threads)
        self._end.atexit = False  # then the process ends it

    def generate(
        self,
        prompts: PromptLike | Iterable[PromptLike] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: list[int] | list[list[int]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues every prompt; the answers come in the prompts' order.

        A prompt is a text, its token ids, or {"prompt": text} / {"prompt_token_ids": ids}. Raises InputError.
        """
        if prompts is None:
            prompts = prompt_token_ids
        if prompts is None:
            raise InputError("give prompts or prompt_token_ids")
        return self._run([_prompt(entry) for entry in _listed(prompts)], sampling_params, use_tqdm)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, through the checkpoint's chat template. Raises InputError.

        `tools`: what the template is told of functions, in OpenAI's form; calls of them are in the text.
        `chat_template_kwargs`: switches of the template: enable_thinking, thinking, reasoning_effort.
        """
        switches = read_switches(chat_template_kwargs)
        are_several = isinstance(messages, list) and messages and isinstance(messages[0], list)
        prompts = [
            make_conversation(read_messages(entry), add_generation_prompt, continue_final_message, tools, switches)
            for entry in (messages if are_several else [messages])
        ]
        if not all(_is_unicode(message["content"]) for prompt in prompts for message in prompt.messages):
            raise InputError("a message is not valid Unicode; decode it with errors='replace'", param="messages")
        return self._run(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one continuation, piece by piece. Leaving the iterator early aborts it. Raises InputError."""
        self._check_open()
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise InputError("only one continuation can be streamed; leave n at 1")
        answer = self._wait(self._service.start(_call(_prompt(prompt), params)))
        try:
            while deltas := self._wait(answer.next_deltas()):
                yield "".join(delta.text for delta in deltas)
        finally:
            self._wait(answer.close())

    def beam_search(self, *_: Any, **__: Any) -> NoReturn:
        """vLLM's name, so that its users hear it: raises NotSupportedError."""
        raise NotSupportedError(NO_BEAMS)

    def get_tokenizer(self) -> Tokenizer:
        return self._service.models[0].text.tokenizer

    def close(self) -> None:
        """Ends the engine and gives its memory back; running and further calls raise EngineDeadError.

        May be called twice.
        """
        self._end()

    # ---- inside

    def _check_open(self) -> None:
        if self._loop.is_closed():
            raise EngineDeadError("this LLM was closed; make a new one")

    def _run(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, show: bool
    ) -> list[RequestOutput]:
        self._check_open()
        params = _listed_params(params, len(prompts))
        with Progress(disable=not show, transient=True) as progress:
            task = progress.add_task("prompts", total=len(prompts))
            jobs = enumerate(zip(prompts, params, strict=True))
            outputs: list[RequestOutput | None] = [None] * len(prompts)

            async def work() -> None:
                for index, (prompt, its_params) in jobs:
                    outputs[index] = await self._answer(index, prompt, its_params)
                    progress.advance(task)

            async def work_together() -> None:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._num_at_once, len(prompts))):
                        group.create_task(work())

            self._wait(_first_error(work_together()))
        return [output for output in outputs if output is not None]

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs on the background loop; an interrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _answer(self, index: int, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        call = _call(prompt, params)
        choices = [TextDelta(sample, "", []) for sample in range(call.num_samples)]
        answer = await self._service.start(call)
        try:
            while deltas := await answer.next_deltas():
                for delta in deltas:
                    choices[delta.index].append(delta)
        finally:
            await answer.close()
        text = prompt.text if isinstance(prompt, TextPrompt) else None
        outputs = [_output(choice, params) for choice in best_choices(choices, call)]
        prompt_ids = unpack_ids(answer.submits[0].prompt_ids)
        if isinstance(prompt, Conversation):
            self._tell_reasoning(outputs, prompt_ids, prompt.begun)
        output = RequestOutput(str(index), text, prompt_ids, outputs, num_cached_tokens=answer.usage.num_cached_tokens)
        if (reported := choices[0].prompt) is not None:
            output.prompt_logprobs = [None, *map(_entries, reported.tokens)]
        return output

    def _tell_reasoning(self, outputs: Sequence[CompletionOutput], prompt_ids: Sequence[int], begun: str) -> None:
        text = self._service.models[0].text
        thinking = thinking_in(text.reasoning, text.tokenizer, prompt_ids, begun)
        for output in outputs if thinking is not None else ():
            output.reasoning, output.content = split_reasoning(output.text, thinking)


def _output(choice: TextDelta, params: SamplingParams) -> CompletionOutput:
    output = CompletionOutput(choice.index, choice.text, choice.token_ids, choice.finish, choice.stop_reason)
    if params.logprobs is not None:
        output.logprobs = list(map(_entries, choice.logprobs))
        output.cumulative_logprob = sum(token.chosen.logprob for token in choice.logprobs)
    return output


def _entries(token: ReportedToken) -> dict[int, Logprob]:
    return {one.token_id: Logprob(one.logprob, one.rank, one.text) for one in (*token.top, token.chosen)}


def _call(prompt: Prompt, params: SamplingParams) -> Call:
    return Call(
        prompts=(prompt,),
        temperature=params.temperature,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        seed=params.seed,
        num_samples=params.best_of or params.n,
        num_best=params.n if (params.best_of or 0) > params.n else None,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_strings=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        min_p=params.min_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        penalty_window=params.penalty_window,
        logit_bias=tuple((token_id, bias) for token_id, bias in params.logit_bias.items() if bias is not False),
        banned_ids=tuple(token_id for token_id, bias in params.logit_bias.items() if bias is False),
        allowed_token_ids=None if params.allowed_token_ids is None else tuple(params.allowed_token_ids),
        bad_words=tuple(params.bad_words),
        num_logprobs=params.logprobs,
        num_prompt_logprobs=params.prompt_logprobs,
        constraints=params.constraints,
        show_control=not params.skip_special_tokens,
        keep_stop_string=params.include_stop_str_in_output,
        truncate_prompt=None if params.truncate_prompt_tokens is None else max(0, params.truncate_prompt_tokens),
    )


def _listed(prompts: Any) -> list[Any]:
    """One prompt or several, from any iterable."""
    if isinstance(prompts, str | dict):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise InputError(PROMPT_KINDS, param="prompt")
    entries = list(prompts)
    return [entries] if entries and isinstance(entries[0], int) else entries


def _listed_params(params: Any, num_prompts: int) -> list[SamplingParams]:
    """One for each prompt. Raises InputError."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    entries = list(params) if isinstance(params, Iterable) else [params]
    if not all(isinstance(entry, SamplingParams) for entry in entries):
        raise InputError("sampling_params must be a SamplingParams or a list of them", param="sampling_params")
    if len(entries) != num_prompts:
        raise InputError(f"{num_prompts} prompts, but {len(entries)} sampling parameters; give one or as many")
    return entries


def _prompt(entry: PromptLike) -> Prompt:
    if isinstance(entry, dict):
        entry = entry["prompt_token_ids"] if "prompt_token_ids" in entry else entry.get("prompt", entry)
    if isinstance(entry, str):
        if not _is_unicode(entry):
            raise InputError("a prompt is not valid Unicode; decode it as UTF-8 with errors='replace'", param="prompt")
        return TextPrompt(entry)
    if isinstance(entry, list) and all(isinstance(token_id, int) for token_id in entry):
        return TokenPrompt(entry)
    raise InputError(PROMPT_KINDS, param="prompt")


def _is_unicode(text: str) -> bool:
    """False for lone surrogates: they stand for bytes of a file or an argument that were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _end(client: InprocClient, loop: asyncio.AbstractEventLoop, thread: threading.Thread, num_threads: int) -> None:
    """Ends an engine and its loop; torch has `num_threads` again."""
    if threading.current_thread() is thread:  # an interrupted call held the last reference: nobody joins itself
        threading.Thread(target=_end, args=(client, loop, thread, num_threads), name="end of an LLM").start()
        return
    client.close()
    asyncio.run_coroutine_threadsafe(_others_end(), loop).result()  # callers in other threads hear of it
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    torch.set_num_threads(num_threads)
    garbage.resume()


async def _others_end() -> None:
    """Waits until every other task of this loop has ended."""
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


async def _first_error(coroutine: Coroutine[Any, Any, T]) -> T:
    """Unwraps the first error of a task group: callers expect ours, not a group."""
    try:
        return await coroutine
    except* Exception as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
