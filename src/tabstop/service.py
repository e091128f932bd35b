"""One call → token ids → Submits → a running Answer. Knows text and the engine's waist; no HTTP, no JSON, no torch.

Holds the models by name, each with its engines, and decides which of them serves a call. All methods belong to one
event loop; texts are encoded in threads.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec import structs

from tabstop.answer import Answer, EncodedPrompt, Observer
from tabstop.call import Call, Summary
from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.encoding import PromptPolicy, encode_prompts, make_sampling
from tabstop.engine.client import EngineClient
from tabstop.errors import (
    InternalError,
    TabstopError,
    UnknownModelError,
    from_code,
)
from tabstop.grammar.specs import thinking_constraint
from tabstop.limits import ServiceLimits, check_call, check_room, in_time, limits_of, share_of
from tabstop.text import DEFAULT_OPTIONS, ModelText, TextOptions, load_text
from tabstop.types import (
    CachePolicy,
    ConstraintSpec,
    Limits,
    Priority,
    RequestId,
    Sampling,
    Submit,
    pack_ids,
)

log = logging.getLogger(__name__)

DEFAULT_POLICY = PromptPolicy()
DEFAULT_LIMITS = ServiceLimits()

SEED_BITS = 63
"""Seeds of clients are taken modulo that many bits."""

ChooseEngine = Callable[[Call, Sequence[EngineClient]], EngineClient]


def route_by_session(call: Call, engines: Sequence[EngineClient]) -> EngineClient:
    """The same engine for the same session, where its prefixes are cached; without a session the least loaded one."""
    if len(engines) == 1:
        return engines[0]
    if call.session:
        return engines[zlib.crc32(f"{call.tenant}/{call.session}".encode()) % len(engines)]
    return min(engines, key=lambda engine: engine.stats.num_waiting + engine.stats.num_running)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model under its first name. Its engines are equal."""

    name: str
    engines: Sequence[EngineClient]
    text: ModelText
    aliases: tuple[str, ...] = ()  # its other names
    created: int = 0  # seconds since 1970
    policy: PromptPolicy = DEFAULT_POLICY

    @property
    def max_model_len(self) -> int:
        """Longest prompt + completion. Raises EngineDeadError, or UnavailableError while it loads."""
        return self.engines[0].info.max_model_len


class _Nobody:
    """An observer that does not look."""

    def on_text_states(self, change: int) -> None: ...
    def on_first_token(self, model: str, seconds: float) -> None: ...
    def on_next_tokens(self, model: str, seconds: float, num_tokens: int) -> None: ...
    def on_end(self, summary: Summary) -> None: ...


class Service:
    """Models by name, and the answers that are open."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        refuse_unknown: bool = False,
        limits: ServiceLimits = DEFAULT_LIMITS,
        route: ChooseEngine = route_by_session,
        log_prompts: bool = False,
    ) -> None:
        """The first model also answers to "" and, unless `refuse_unknown`, to names that nobody has."""
        assert models
        self.models = list(models)
        self.limits = limits
        self.observer: Observer = _Nobody()
        self.answers: set[Answer] = set()
        """Those not closed yet."""
        self._refuse_unknown = refuse_unknown
        self._route = route
        self._log_prompts = log_prompts
        self._noted: set[str] = set()  # models whose lack of markers was logged
        self._by_name = {name: model for model in reversed(self.models) for name in (model.name, *model.aliases)}

    # ---- models

    def resolve(self, name: str) -> ServedModel:
        """The model that answers to a name. Raises UnknownModelError."""
        model = self._by_name.get(name)
        if model is not None:
            return model
        if name and self._refuse_unknown:
            known = ", ".join(self._by_name)
            raise UnknownModelError(f"no model of that name is served here; known: {known}", param="model")
        return self.models[0]

    def shown_name(self, name: str) -> str:
        """What an answer calls its model: the name asked for if it is known."""
        return name if name in self._by_name else self.resolve(name).name

    def check_alive(self) -> None:
        """Raises EngineDeadError when an engine is gone, UnavailableError while one loads."""
        for model in self.models:
            for engine in model.engines:
                _ = engine.info

    def check_room(self) -> None:
        """Raises OverloadedError when no engine would take a request."""
        check_room([engine for model in self.models for engine in model.engines])

    async def warm_up(self) -> None:
        """Lets every engine generate one real token. Raises what prevents it."""
        for model in self.models:
            for engine in model.engines:
                await _generate_one(model, engine)

    # ---- calls

    async def start(self, call: Call) -> Answer:
        """Encodes, sends, and waits for the first news from the engine, so that errors come before an answer begins.

        Raises every TabstopError that a call can end with. Cancelling it leaves nothing behind.
        """
        start_time = time.perf_counter()
        model = self.resolve(call.model)
        engine = self._route(call, model.engines)
        info = engine.info
        check_call(call, self.limits, info)
        check_room([engine], len(call.prompts))
        prompts = await asyncio.to_thread(encode_prompts, call, model.text, info, model.policy)
        share = share_of(call, self.limits, prompts)
        seconds = time.perf_counter() - start_time
        bounds = [limits_of(call, info, len(prompt.ids), share) for prompt in prompts]
        limits = [in_time(bound, call, seconds, self.limits.max_queue_age) for bound in bounds]
        answer = Answer(call, self.shown_name(call.model), model.text.tokenizer, self.observer, self.answers.discard)
        answer.start_time = start_time
        if self._log_prompts:
            answer.transcript = [model.text.tokenizer.decode(prompt.ids) for prompt in prompts]
        self.answers.add(answer)
        try:
            for prompt, limit in zip(prompts, limits, strict=True):
                if prompt.fill is not None and prompt.fill.family is None:
                    self._note_plain(model)
                submit = _submit(call, model, engine.new_request_id(), prompt, limit)
                answer.open(engine, submit, prompt, limit.max_tokens)
            await answer.started()
        except TabstopError as error:
            answer.fail(error)
            await answer.close()
            raise
        except BaseException:
            await answer.close()
            raise
        return answer

    @property
    def num_text_states(self) -> int:
        """Samples whose text is being assembled; zero when idle."""
        return sum(answer.num_text_states for answer in self.answers)

    def end_all(self, error: TabstopError) -> None:
        """Ends every open answer with an error."""
        for answer in list(self.answers):
            answer.fail(error)

    def _note_plain(self, model: ServedModel) -> None:
        """Says once that a model cannot fill holes."""
        if model.name not in self._noted:
            self._noted.add(model.name)
            log.warning("%s has no fill-in-the-middle tokens: prefixes are continued, suffixes ignored", model.name)


def _submit(call: Call, model: ServedModel, request_id: RequestId, prompt: EncodedPrompt, limits: Limits) -> Submit:
    vocab_size = model.engines[0].info.vocab_size
    seed = secrets.randbits(SEED_BITS) if call.seed is None else call.seed % (1 << SEED_BITS)
    is_laid_out = not model.text.fill.layout_ids.isdisjoint(prompt.ids)
    if is_laid_out and not call.ignore_eos:
        limits = structs.replace(limits, stop_sets=(*limits.stop_sets, "fim"))
    constraints = call.constraints if prompt.constraints is None else prompt.constraints
    if prompt.healed:  # at worst every byte is a token; the answer ends at the client's limit
        room = model.max_model_len - len(prompt.ids)
        limits = structs.replace(limits, max_tokens=min(limits.max_tokens + len(prompt.healed), room))
        constraints = (ConstraintSpec("healing", prompt.healed.hex()), *constraints)
    if prompt.thinking is not None and constraints:
        constraints = (thinking_constraint(prompt.thinking), *constraints)
    # Only the last part is free text, so no two scopes can spell the same.
    scope = "\0".join((call.tenant, model.name, call.adapter, call.cache_salt))
    return Submit(
        request_id=request_id,
        prompt_ids=pack_ids(prompt.ids),
        sampling=make_sampling(call, model.text, vocab_size, seed),
        limits=limits,
        num_samples=call.num_samples,
        constraints=constraints,
        cache=CachePolicy(scope, call.cache_read, call.cache_write, call.cache_retain),
        priority=call.priority,
        tenant=call.tenant,
        session=call.session,
        adapter=call.adapter,
    )


async def _generate_one(model: ServedModel, engine: EngineClient) -> None:
    """One real token through one engine, leaving nothing in its prefix cache. Raises what prevents it."""
    submit = Submit(
        request_id=engine.new_request_id(),
        prompt_ids=pack_ids([model.text.tokenizer.bos_id or 0]),
        sampling=Sampling(temperature=0.0),
        limits=Limits(max_tokens=1, stop_sets=()),
        cache=CachePolicy(read=False, write=False),
        priority=Priority.INTERACTIVE,
    )
    num_tokens = 0
    async for delta in engine.submit(submit):
        if delta.failure is not None:
            raise from_code(delta.failure.code, delta.failure.message)
        num_tokens += len(delta.token_ids)
    if num_tokens != 1:
        raise InternalError(f"the warm-up of {model.name} gave {num_tokens} tokens instead of one")


def make_service(
    checkpoint: Checkpoint,
    engines: Sequence[EngineClient],
    config: ServerConfig,
    *,
    tokenizer: Checkpoint | None = None,
    options: TextOptions = DEFAULT_OPTIONS,
) -> Service:
    """A service with one model: its tokenizer, template and defaults come from the checkpoint.

    `tokenizer`: where to take tokenizer and template from instead (--tokenizer). Raises StartupError
    subclasses.
    """
    names = config.served_model_name or (checkpoint.name,)
    model = ServedModel(
        names[0],
        engines,
        load_text(checkpoint, tokenizer, options),
        aliases=names[1:],
        created=checkpoint.created,
        policy=PromptPolicy(config.transcode_fim, config.token_healing),
    )
    return Service(
        [model],
        refuse_unknown=config.unknown_model == "refuse",
        limits=ServiceLimits(
            **{field.name: getattr(config, field.name) for field in dataclasses.fields(ServiceLimits)}
        ),
        log_prompts=config.log_prompts,
    )
