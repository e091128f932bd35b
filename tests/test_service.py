"""The service over a FakeEngine: no HTTP."""

from __future__ import annotations

import asyncio
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tabstop.answer import Answer
from tabstop.call import Call, TextDelta, TextPrompt, TokenPrompt
from tabstop.config import ServerConfig
from tabstop.engine.fake import INFO, FakeEngine, hashed, scripted
from tabstop.errors import (
    ContextLengthError,
    DeadlineError,
    EngineDeadError,
    InputError,
    OverloadedError,
    TabstopError,
    UnavailableError,
    UnknownModelError,
)
from tabstop.limits import MAX_STOP_CHARACTERS
from tabstop.service import ServedModel, Service, make_service, route_by_session
from tabstop.text import load_text
from tabstop.text.chat import MARKS, Conversation
from tabstop.text.tokenizer import Tokenizer
from tabstop.types import FinishReason, Priority, Stage, unpack_ids
from tests import tiny
from tests.api.serving import EOS, text_checkpoint

TINY = Tokenizer(tiny.tokenizer_json())
TEXT = "return x + 1\nprint(10)"


@pytest.fixture
def checkpoint(tmp_path: Path):
    return text_checkpoint(tmp_path)


def engine_saying(*texts: str, **options: Any) -> FakeEngine:
    continuations = [[*TINY.encode(text), EOS] for text in texts]
    return FakeEngine(script=scripted(*continuations), stop_sets={"eos": frozenset([EOS])}, **options)


def service_over(checkpoint, engine: FakeEngine, **options: Any) -> Service:
    return make_service(checkpoint, [engine], ServerConfig(**options))


def call(*texts: str, **options: Any) -> Call:
    return Call(prompts=tuple(map(TextPrompt, texts or ("def f(x):\n    ",))), **options)


async def collect(answer: Answer) -> list[TextDelta]:
    """One merged delta a choice, in order; closes the answer."""
    choices: dict[int, TextDelta] = {}
    while deltas := await answer.next_deltas():
        for delta in deltas:
            if delta.index in choices:
                assert choices[delta.index].finish is None, "a choice ended twice"
                choices[delta.index].append(delta)
            else:
                choices[delta.index] = delta
    await answer.close()
    return [choices[index] for index in sorted(choices)]


async def assert_idle(service: Service, engine: FakeEngine) -> None:
    async with asyncio.timeout(5):
        while engine.num_live:
            await asyncio.sleep(0)
    assert service.num_text_states == 0 and not service.answers


async def test_one_answer(checkpoint) -> None:
    engine = engine_saying(TEXT)
    service = service_over(checkpoint, engine)
    answer = await service.start(call())
    (choice,) = await collect(answer)
    assert choice.text == TEXT
    assert choice.finish is FinishReason.STOP and choice.stop_reason is None
    assert choice.token_ids == [*TINY.encode(TEXT), EOS]
    assert answer.usage.num_prompt_tokens == len(TINY.encode("def f(x):\n    "))
    assert answer.usage.num_completion_tokens == len(TINY.encode(TEXT)) + 1
    assert answer.summary.outcome == "ok" and answer.summary.first_token_seconds is not None
    await assert_idle(service, engine)


async def test_prompts_and_samples_are_numbered_prompt_first(checkpoint) -> None:
    engine = engine_saying("a", "b")
    service = service_over(checkpoint, engine)
    answer = await service.start(call("x", "yy", num_samples=2))
    choices = await collect(answer)
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert [choice.text for choice in choices] == ["a", "b", "a", "b"]
    assert engine.num_submitted == 2  # one Submit a prompt: the engine forks
    assert [submit.num_samples for submit in engine.submitted] == [2, 2]
    assert answer.usage.num_prompt_tokens == 3 and answer.usage.num_completion_tokens == 8
    await assert_idle(service, engine)


async def test_a_stop_string_ends_the_answer_and_tells_the_engine(checkpoint) -> None:
    engine = FakeEngine(script=scripted(TINY.encode(TEXT) * 1000), stop_sets={"eos": frozenset()})
    service = service_over(checkpoint, engine)
    answer = await service.start(call(stop_strings=("+ 1\npr", "never")))
    (choice,) = await collect(answer)
    assert choice.text == "return x "
    assert choice.finish is FinishReason.STOP and choice.stop_reason == "+ 1\npr"
    kept = TINY.decode(choice.token_ids)
    assert kept.startswith("return x + 1\npr") and answer.usage.num_completion_tokens == len(choice.token_ids)
    assert not engine.num_aborted, "a stop is not an abort"
    assert engine.num_finished[FinishReason.STOP] == 1
    await assert_idle(service, engine)


async def test_log_probabilities_end_where_the_tokens_do(checkpoint) -> None:
    """Those of tokens after a stop string are cut; each offset is where its token begins in the text."""
    ids = [*TINY.encode("h\u00e9"), *TINY.encode(TEXT)]
    engine = FakeEngine(script=scripted(ids * 100), stop_sets={"eos": frozenset()})
    service = service_over(checkpoint, engine)
    answer = await service.start(call(stop_strings=("+ 1\npr",), num_logprobs=2, echo=True))
    while engine.num_live:  # the reader is slow: deltas merge
        await asyncio.sleep(0)
    (choice,) = await collect(answer)
    prompt = "def f(x):\n    "
    assert choice.text == prompt + "h\u00e9return x "
    assert [token.chosen.token_id for token in choice.logprobs] == choice.token_ids == ids[: len(choice.token_ids)]
    for token, following in pairwise(choice.logprobs):
        shown = (prompt + "h\u00e9" + TEXT)[token.offset : following.offset]
        assert shown in (token.chosen.text, "", "\u00e9")  # bytes of a character that is not whole yet add none
    assert choice.logprobs[0].offset == len(prompt)
    (silent,) = await collect(await service.start(call(stop_strings=("pr",))))
    assert silent.logprobs == [] and engine.submitted[-1].sampling.num_logprobs is None
    await assert_idle(service, engine)


async def test_control_tokens_and_stop_tokens_show_on_request(checkpoint) -> None:
    service = service_over(checkpoint, engine_saying("a"))
    stop = {"stop_token_ids": (TINY.encode("a")[0],)}
    for options, text in (
        ({}, "a"),
        ({"show_control": True}, "a"),
        ({"show_control": True, "keep_stop_string": True}, "a<|im_end|>"),
        (stop, ""),
        (stop | {"keep_stop_string": True}, "a"),
    ):
        (choice,) = await collect(await service.start(call(**options)))
        assert (choice.text, choice.finish) == (text, FinishReason.STOP)
    shown = FakeEngine(script=scripted([EOS, *TINY.encode("b")]), stop_sets={"eos": frozenset([EOS])})
    (choice,) = await collect(await service_over(checkpoint, shown).start(call(show_control=True, ignore_eos=True)))
    assert choice.text == "<|im_end|>b"


async def test_prompts_are_cut_to_their_last_tokens_on_request(checkpoint) -> None:
    engine = engine_saying("a")
    service = service_over(checkpoint, engine)
    room = INFO.max_model_len
    for prompt, options, length in (
        (TextPrompt("x" * 30 + "yz"), {"truncate_prompt": 2}, 2),
        (TextPrompt("yz"), {"truncate_prompt": 9}, 2),
        (TextPrompt("x" * room + "yz"), {"truncate_prompt": 0, "max_tokens": 10}, room - 10),
        (TextPrompt("x" * 100 * room + "yz"), {"truncate_prompt": room, "max_tokens": 10}, room - 10),
        (TokenPrompt(TINY.encode("<|im_start|>" + "x" * 9 + "yz")), {"truncate_prompt": 3}, 3),
    ):
        await collect(await service.start(Call(prompts=(prompt,), **options)))
        ids = unpack_ids(engine.submitted[-1].prompt_ids)
        assert len(ids) == length and TINY.decode(ids).endswith("yz")
    assert ids[0] == TINY.encode("<|im_start|>")[0], "a BOS stays in front"


async def test_nothing_of_a_reported_prompt_is_taken_back(checkpoint) -> None:
    engine = engine_saying("int(1)")
    service = service_over(checkpoint, engine, token_healing="on")
    for options in ({}, {"num_prompt_logprobs": 1}, {"echo": True, "num_logprobs": 0}):
        (choice,) = await collect(await service.start(call("x = pr", **options)))
        ids = unpack_ids(engine.submitted[-1].prompt_ids)
        assert (ids == TINY.encode("x = pr")) == (choice.prompt is not None) == bool(options)
        if choice.prompt is not None:
            assert choice.prompt.opening == TINY.spelled(ids[0])
            assert [token.chosen.token_id for token in choice.prompt.tokens] == ids[1:]


async def test_bad_words_become_every_run_that_spells_them(checkpoint) -> None:
    engine = engine_saying("a")
    service = service_over(checkpoint, engine)
    await collect(await service.start(call(bad_words=("print", "<|im_end|>"), banned_ids=(7,))))
    runs = engine.submitted[-1].sampling.banned
    spelled = [TINY.decode(list(run)) for run in runs]
    assert runs[0] == (7,) and spelled[1:] == ["print", " print", "<|im_end|>", " <|im_end|>"]
    assert (EOS,) not in runs, "texts never name control tokens"


async def test_one_sample_stops_the_others_go_on(checkpoint) -> None:
    engine = engine_saying("aXb", "ccc")
    service = service_over(checkpoint, engine)
    choices = await collect(await service.start(call(num_samples=2, stop_strings=("X",))))
    assert [choice.text for choice in choices] == ["a", "ccc"]
    await assert_idle(service, engine)


async def test_closing_early_aborts_and_drops_text_at_once(checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.001)
    service = service_over(checkpoint, engine)
    answer = await service.start(call("a", "b", num_samples=3))
    await answer.next_deltas()
    assert service.num_text_states == 6 and engine.num_live == 2
    await answer.close()
    assert service.num_text_states == 0 and engine.num_live == 0
    assert engine.num_aborted == {Stage.DECODING: 2}
    assert answer.summary.outcome == "cancelled"
    assert await answer.next_deltas() == []


async def test_cancelling_the_start_leaves_nothing(checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=30)
    service = service_over(checkpoint, engine)
    task = asyncio.create_task(service.start(call()))
    async with asyncio.timeout(5):
        while not engine.num_live:
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.num_aborted == {Stage.WAITING: 1}
    await assert_idle(service, engine)


async def test_a_slow_reader_gets_merged_deltas(checkpoint) -> None:
    engine = engine_saying("x" * 50)
    service = service_over(checkpoint, engine)
    answer = await service.start(call())
    await asyncio.sleep(0.05)
    deltas = await answer.next_deltas()
    assert len(deltas) == 1 and len(deltas[0].text) > 10
    await answer.close()


async def test_sampling_comes_from_the_call_then_the_checkpoint(tmp_path: Path) -> None:
    folder = text_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.3, "top_p": 0.9, "top_k": 7}')
    engine = engine_saying("a")
    service = service_over(folder, engine)
    await collect(await service.start(call()))
    await collect(await service.start(call(temperature=0.0, top_k=0, top_p=1.0, seed=-1, min_tokens=1)))
    first, second = (submit.sampling for submit in engine.submitted)
    assert (first.temperature, first.top_k, first.top_p) == (0.3, 7, 0.9)
    assert (second.temperature, second.top_k, second.top_p, second.seed) == (0.0, 0, 1.0, 2**63 - 1)
    await collect(await service.start(call()))
    assert engine.submitted[-1].sampling.seed != first.seed, "an absent seed must be drawn for each request"


async def test_what_the_scheduler_must_know_arrives(checkpoint) -> None:
    engine = engine_saying("a")
    service = service_over(checkpoint, engine)
    request = call(
        tenant="t", session="s", adapter="", cache_salt="salt", priority=Priority.INTERACTIVE, deadline_ms=60_000,
        cache_read=False, cache_retain=False, stop_token_ids=(5,), ignore_eos=True, max_tokens=9, min_tokens=2,
    )  # fmt: skip
    await collect(await service.start(request))
    submit = engine.submitted[-1]
    assert (submit.tenant, submit.session, submit.priority) == ("t", "s", Priority.INTERACTIVE)
    assert (submit.cache.read, submit.cache.write, submit.cache.retain) == (False, True, False)
    assert submit.cache.scope.split("\0") == ["t", "tiny", "", "salt"]
    assert (submit.limits.stop_sets, submit.limits.stop_token_ids) == ((), (5,))
    assert (submit.limits.max_tokens, submit.limits.min_tokens) == (9, 2)
    assert submit.limits.deadline_ms is not None and 0 < submit.limits.deadline_ms <= 60_000


async def test_stop_tokens_of_the_call_are_named(checkpoint) -> None:
    comma = TINY.encode(",")[0]
    service = service_over(checkpoint, engine_saying("a,b"))
    (choice,) = await collect(await service.start(call(stop_token_ids=(comma,))))
    assert (choice.text, choice.stop_reason) == ("a", comma)
    assert choice.token_ids == TINY.encode("a,")


async def test_limits_by_the_context(checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, engine_info=replace_info(max_model_len=20))
    service = service_over(checkpoint, engine)
    await collect(await service.start(call("a" * 8)))
    assert engine.submitted[-1].limits.max_tokens == 12  # all that fits
    await collect(await service.start(call("a" * 8, default_max_tokens=5)))
    assert engine.submitted[-1].limits.max_tokens == 5
    await collect(await service.start(call("a" * 18, default_max_tokens=5)))
    assert engine.submitted[-1].limits.max_tokens == 2
    await collect(await service.start(call("a" * 20, max_tokens=0)))
    assert engine.submitted[-1].limits.max_tokens == 0
    num_submitted = engine.num_submitted
    for refused, param in (
        (call("a" * 8, max_tokens=13), "max_tokens"),
        (call("a" * 20), "prompt"),
        (call("a" * 10**6), "prompt"),
    ):
        with pytest.raises(ContextLengthError) as caught:
            await service.start(refused)
        assert caught.value.param == param and caught.value.status == 400
    assert engine.num_submitted == num_submitted
    await assert_idle(service, engine)


def replace_info(**changes: Any):
    import msgspec

    return msgspec.structs.replace(INFO, **changes)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"num_samples": 33}, "n"),
        ({"num_samples": 0}, "n"),
        ({"stop_strings": tuple(map(str, range(65)))}, "stop"),
        ({"stop_strings": ("a", "")}, "stop"),
        ({"bad_words": (" ",)}, "bad_words"),
        ({"bad_words": ("a" * 65,)}, "bad_words"),
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"allowed_token_ids": (10**6,)}, "allowed_token_ids"),
        ({"logit_bias": ((10**6, 1.0),)}, "logit_bias"),
        ({"num_logprobs": 21}, "logprobs"),
        ({"min_p": 2.0}, "min_p"),
        ({"stop_strings": ("a" * (MAX_STOP_CHARACTERS + 1),)}, "stop"),
        ({"min_tokens": 10, "max_tokens": 9}, "min_tokens"),
        ({"prompts": (TokenPrompt([1, 1 << 18]),)}, "prompt"),
        ({"prompts": (TokenPrompt([1]),) * 1025}, "prompt"),
        ({"prompts": ()}, "prompt"),
        ({"prompts": (Conversation([{"role": "user", "content": "".join(MARKS)}]),)}, "messages"),
    ],
)  # fmt: skip
async def test_refused_calls_reach_no_engine(checkpoint, options: dict[str, Any], param: str) -> None:
    engine = engine_saying("a")
    service = service_over(checkpoint, engine)
    with pytest.raises(InputError) as caught:
        await service.start(Call(**{"prompts": (TextPrompt("x"),)} | options))
    assert caught.value.param == param
    assert engine.num_submitted == 0 and not service.answers


async def test_more_prompts_than_the_queue_holds_are_no_matter_of_time(checkpoint) -> None:
    engine = engine_saying("a", engine_info=replace_info(max_num_waiting=3))
    service = service_over(checkpoint, engine)
    with pytest.raises(InputError, match="4 prompts are more than the queue of 3") as caught:
        await service.start(call(*"abcd"))
    assert (caught.value.status, caught.value.param, engine.num_submitted) == (400, "prompt", 0)
    assert len(await collect(await service.start(call(*"abc", num_samples=4)))) == 12


async def test_an_empty_prompt_is_the_beginning_of_a_text(checkpoint) -> None:
    engine = engine_saying("a")
    await collect(await service_over(checkpoint, engine).start(call("")))
    assert unpack_ids(engine.submitted[-1].prompt_ids) == [tiny.IM_START]


async def test_echo_comes_before_the_first_text(checkpoint) -> None:
    service = service_over(checkpoint, engine_saying("a", "b"))
    choices = await collect(await service.start(call("héllo ", num_samples=2, echo=True)))
    assert [choice.text for choice in choices] == ["héllo a", "héllo b"]
    ids = TokenPrompt(TINY.encode("x = "))
    (choice,) = await collect(await service.start(Call(prompts=(ids,), echo=True, max_tokens=0)))
    assert (choice.text, choice.finish) == ("x = ", FinishReason.LENGTH)


async def test_cached_tokens_are_counted_once_a_prompt(checkpoint) -> None:
    engine = engine_saying("a b c")
    service = service_over(checkpoint, engine)
    prompt = "x" * 40
    for expected in (0, 32):
        answer = await service.start(call(prompt, num_samples=3))
        await collect(answer)
        assert answer.usage.num_cached_tokens == expected


async def test_errors_of_the_engine_before_the_first_token(checkpoint) -> None:
    engine = engine_saying("a", max_num_requests=0)
    service = service_over(checkpoint, engine)
    with pytest.raises(OverloadedError):
        await service.start(call())
    engine.die("gone")
    with pytest.raises(EngineDeadError):
        await service.start(call())
    with pytest.raises(EngineDeadError):
        service.check_alive()
    await assert_idle(service, engine)


async def test_death_in_the_middle_comes_after_the_text_before_it(checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.001)
    service = service_over(checkpoint, engine)
    answer = await service.start(call())
    engine.die("gone")
    assert (await answer.next_deltas())[0].token_ids
    with pytest.raises(EngineDeadError, match="gone"):
        await answer.next_deltas()
    await answer.close()
    assert answer.summary.outcome == "engine_dead"
    await assert_idle(service, engine)


async def test_deadlines(checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.001)
    service = service_over(checkpoint, engine)
    (choice,) = await collect(await service.start(call(deadline_ms=500)))
    assert choice.finish is FinishReason.DEADLINE and choice.text
    engine.delay = 0.1
    with pytest.raises(DeadlineError):
        await service.start(call(deadline_ms=20))
    await assert_idle(service, engine)


async def test_an_abort_from_outside_is_an_error(checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.001)
    service = service_over(checkpoint, engine)
    answer = await service.start(call())
    engine.abort(engine.submitted[-1].request_id)
    with pytest.raises(UnavailableError):
        while await answer.next_deltas():
            pass
    await answer.close()
    await assert_idle(service, engine)


async def test_end_all_spares_complete_answers(checkpoint) -> None:
    engine = engine_saying("done")
    service = service_over(checkpoint, engine)
    complete = await service.start(call())
    while engine.num_live:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    running = await service.start(call("x", ignore_eos=True))
    engine.script = hashed
    service.end_all(UnavailableError("bye"))
    assert (await collect(complete))[0].text == "done"
    await running.close()
    await assert_idle(service, engine)


async def test_names_and_policy(checkpoint) -> None:
    served = {"served_model_name": ("first", "second")}
    service = service_over(checkpoint, engine_saying("a"), **served)
    assert service.resolve("second").name == service.resolve("").name == service.resolve("gpt-4").name == "first"
    assert [service.shown_name(name) for name in ("", "second", "gpt-4")] == ["first", "second", "first"]
    strict = service_over(checkpoint, engine_saying("a"), unknown_model="refuse", **served)
    with pytest.raises(UnknownModelError, match="first, second"):
        await strict.start(call(model="gpt-4"))
    assert (await collect(await strict.start(call(model="second"))))[0].text == "a"


async def test_two_models_have_their_own_engines(checkpoint) -> None:
    text = load_text(checkpoint)
    engines = [engine_saying("small"), engine_saying("large")]
    service = Service([ServedModel("small", [engines[0]], text), ServedModel("large", [engines[1]], text)])
    for name in ("large", "small", ""):
        answer = await service.start(call(model=name))
        assert (await collect(answer))[0].text == (name or "small")


async def test_routes(checkpoint) -> None:
    engines = [engine_saying("a"), engine_saying("b")]
    assert {id(route_by_session(call(session="s"), engines)) for _ in range(9)} == {
        id(route_by_session(call(session="s"), engines))
    }
    assert {id(route_by_session(call(session=str(n)), engines)) for n in range(50)} == set(map(id, engines))
    engines[0].submit(submit_to(engines[0]))
    assert route_by_session(call(), engines) is engines[1]
    await asyncio.sleep(0.01)


def submit_to(engine: FakeEngine):
    from tabstop.types import Limits, Sampling, Submit, pack_ids

    return Submit(engine.new_request_id(), pack_ids([1]), Sampling(), Limits(max_tokens=1))


async def test_every_front_end_says_the_same_time_of_a_model(checkpoint) -> None:
    os.utime(checkpoint.folder, (0, 1_700_000_000))
    assert service_over(checkpoint, engine_saying("a")).models[0].created == 1_700_000_000


async def test_warm_up_generates_a_real_token(checkpoint) -> None:
    engine = engine_saying("a")
    service = service_over(checkpoint, engine)
    await service.warm_up()
    assert engine.num_generated == 1 and not engine.submitted[-1].cache.write
    engine.die("gone")
    with pytest.raises(TabstopError):
        await service.warm_up()


async def test_a_hundred_answers_closed_at_random_points_leave_nothing(checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()})
    service = service_over(checkpoint, engine)

    async def one(number: int) -> None:
        request = call("x" * (1 + number % 7), num_samples=1 + number % 3, max_tokens=40, stop_strings=("\n", "ab"))
        task = asyncio.create_task(service.start(request))
        await asyncio.sleep(0.0005 * (number % 11))
        if not task.done() and number % 2:
            task.cancel()
        try:
            answer = await task
        except asyncio.CancelledError:
            return
        for _ in range(number % 5):
            await answer.next_deltas()
        await answer.close()

    await asyncio.gather(*map(one, range(100)))
    assert engine.num_submitted >= 50  # those that nobody cancelled
    await assert_idle(service, engine)


async def test_prompts_are_logged_only_on_request(checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        await collect(await service_over(checkpoint, engine_saying("answered")).start(call("asked")))
        assert "asked" not in caplog.text and "answered" not in caplog.text
        loud = service_over(checkpoint, engine_saying("answered"), log_prompts=True)
        await collect(await loud.start(call("asked")))
        assert "asked" in caplog.text and "answered" in "".join(caplog.text.split("[0]"))
