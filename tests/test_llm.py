"""The offline API on a tiny real checkpoint."""

from __future__ import annotations

import gc
import json
import math
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise

import pytest
import torch

from tabstop import LLM, GuidedDecodingParams, SamplingParams, StructuredOutputsParams
from tabstop.engine.garbage import YOUNG_OBJECTS
from tabstop.errors import ConfigError, EngineDeadError, InputError, NotSupportedError
from tabstop.outputs import RequestOutput
from tests import tiny
from tests.text.fim_vocabularies import byte_level_definition
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = str(tiny_llama(tmp_path_factory.mktemp("tiny")))
    llm = LLM(model=model, tensor_parallel_size=1, max_model_len=256, gpu_memory_utilization=0.95, num_threads=1)
    yield llm
    llm.close()


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_one_prompt_or_many_in_order(llm):
    [one] = llm.generate("def f(x):", GREEDY)
    many = llm.generate([f"def f{n}(x):" for n in range(20)] + ["def f(x):"], GREEDY, use_tqdm=False)
    assert isinstance(one, RequestOutput) and one.prompt == "def f(x):" and len(many) == 21
    assert many[-1].outputs[0].text == one.outputs[0].text
    assert len(one.outputs[0].token_ids) == 12 and one.outputs[0].finish_reason == "length"
    assert llm.get_tokenizer().decode(one.prompt_token_ids) == "def f(x):"


def test_token_prompts_equal_text_prompts(llm):
    ids = llm.get_tokenizer().encode("return x", bos=False)
    by_text, by_ids, by_dict = llm.generate(
        [{"prompt": "return x"}, {"prompt_token_ids": ids}, ids], GREEDY, use_tqdm=False
    )
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids == by_dict.outputs[0].token_ids


def test_grammars_by_vllms_names(llm):
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
    forms = [
        ({"json": schema}, lambda text: len(json.loads(text)) == 2),
        ({"regex": "[ab]{4}"}, lambda text: set(text) <= {"a", "b"} and len(text) == 4),
        ({"choice": ["ja", "nein"]}, lambda text: text in ("ja", "nein")),
        ({"grammar": 'start: "x"+ "y"'}, lambda text: text.strip("x") == "y"),
    ]
    for given, is_right in forms:
        for params in (
            {"structured_outputs": StructuredOutputsParams(**given)},
            {"guided_decoding": GuidedDecodingParams(**given)},
            {"structured_outputs": given},
        ):
            sampling = SamplingParams(temperature=1, seed=3, max_tokens=200, **params)
            [output] = llm.generate("x", sampling, use_tqdm=False)
            assert is_right(output.outputs[0].text) and output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "wrong",
    [
        {"structured_outputs": "json"},
        {"structured_outputs": {"regex": "a", "json": "{}"}},
        {"structured_outputs": {"regex": "a"}, "guided_decoding": {"regex": "a"}},
        {"guided_decoding": {"choice": []}},
    ],
)
def test_grammars_that_make_no_sense(wrong):
    with pytest.raises(InputError):
        SamplingParams(**wrong)


def test_samples_seeds_and_stop_strings(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=10, ignore_eos=True)
    [first], [second] = (llm.generate("import os", params, use_tqdm=False) for _ in range(2))
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) == 3
    text = first.outputs[0].text
    stop = text[3:5]
    [cut] = llm.generate(
        "import os", SamplingParams(temperature=1, seed=7, max_tokens=10, ignore_eos=True, stop=stop), use_tqdm=False
    )
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert cut.outputs[0].finish_reason == "stop" and cut.outputs[0].stop_reason == stop


def test_calls_from_many_threads_share_the_engine(llm):
    with ThreadPoolExecutor(max_workers=8) as executor:
        futures = [executor.submit(llm.generate, "x = 1", GREEDY, None, False) for _ in range(24)]
        texts = {future.result()[0].outputs[0].text for future in futures}
    assert len(texts) == 1


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    [answer] = llm.chat(messages, GREEDY, use_tqdm=False)
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert answer.prompt_token_ids == llm.get_tokenizer().encode(expected)


def test_log_probabilities_in_vllms_shape(llm):
    for count in (0, 3):
        params = SamplingParams(temperature=0.9, seed=3, max_tokens=8, ignore_eos=True, logprobs=count)
        [answer] = llm.generate("def f(x):", params, use_tqdm=False)
        [output] = answer.outputs
        assert len(output.logprobs) == 8
        for token_id, entries in zip(output.token_ids, output.logprobs, strict=True):
            assert token_id in entries and count <= len(entries) <= count + 1
            assert [entry.rank for entry in entries.values()][:count] == list(range(1, count + 1))
        chosen = [entries[token].logprob for token, entries in zip(output.token_ids, output.logprobs, strict=True)]
        assert output.cumulative_logprob == pytest.approx(sum(chosen))
    [silent] = llm.generate("def f(x):", GREEDY, use_tqdm=False)
    assert silent.outputs[0].logprobs is silent.outputs[0].cumulative_logprob is None


def test_log_probabilities_of_prompts_in_vllms_shape(llm):
    plain, reported = (SamplingParams(n=2, max_tokens=4, seed=1, prompt_logprobs=count) for count in (None, 2))
    prompts = ["def f(x):", [5], "import os, sys"]
    silent = llm.generate(prompts, plain, use_tqdm=False)
    outputs = llm.generate(prompts, [reported] * 3, use_tqdm=False)
    for output, other in zip(outputs, silent, strict=True):
        assert other.prompt_logprobs is None and output.num_cached_tokens == 0
        assert [each.text for each in output.outputs] == [each.text for each in other.outputs]
        first, *others = output.prompt_logprobs
        assert first is None and len(others) == len(output.prompt_token_ids) - 1
        for token_id, entries in zip(output.prompt_token_ids[1:], others, strict=True):
            assert token_id in entries and 2 <= len(entries) <= 3
            assert [entry.rank for entry in entries.values()][:2] == [1, 2]
    again = llm.generate(prompts, SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False)
    for output, other in zip(again, outputs, strict=True):
        assert output.outputs[0].token_ids == [] and output.outputs[0].finish_reason == "length"
        for entries, token_id, more in zip(
            output.prompt_logprobs[1:], output.prompt_token_ids[1:], other.prompt_logprobs[1:], strict=False
        ):
            assert entries.keys() == {token_id}
            assert entries[token_id].logprob == pytest.approx(more[token_id].logprob, abs=0.2)  # other rounding


def test_the_best_of_some_samples_is_the_likeliest(llm):
    shared = {"temperature": 1.0, "seed": 7, "max_tokens": 10, "ignore_eos": True}
    [every] = llm.generate("import os", SamplingParams(n=6, logprobs=0, **shared), use_tqdm=False)
    ranked = sorted(every.outputs, key=lambda output: output.cumulative_logprob / 10, reverse=True)
    for logprobs in (None, 2):
        params = SamplingParams(n=2, best_of=6, logprobs=logprobs, **shared)
        [best] = llm.generate("import os", params, use_tqdm=False)
        assert [output.token_ids for output in best.outputs] == [output.token_ids for output in ranked[:2]]
        assert [output.index for output in best.outputs] == [0, 1]
        assert [output.logprobs is None for output in best.outputs] == [logprobs is None] * 2


def test_parameters_shape_the_draws(llm):
    def ids(**options):
        params = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | options)
        [answer] = llm.generate("def f(x):", params, use_tqdm=False)
        return answer.outputs[0].token_ids

    plain = ids()
    assert set(ids(allowed_token_ids=[40, 41])) <= {40, 41}
    assert plain[0] not in ids(logit_bias={plain[0]: False}) and plain[0] not in ids(logit_bias={plain[0]: -100})
    windowed = ids(presence_penalty=100, penalty_window=2)
    assert all(len(set(windowed[at : at + 3])) == 3 for at in range(10))
    assert ids(logit_bias={"50": 100}) == [50] * 12
    assert len(set(ids(presence_penalty=2, frequency_penalty=2, repetition_penalty=50))) == 12
    assert ids(min_p=1.0, temperature=3.0) == ids(typical_p=1.0, top_k=1, temperature=3.0) == plain
    encode, decode = llm.get_tokenizer().encode, llm.get_tokenizer().decode
    pair = next(decode(two) for two in pairwise(plain) if encode(decode(two)) == list(two) and decode(two).strip())
    assert pair in decode(plain) and pair not in decode(ids(bad_words=[pair]))
    assert pair[0] in decode(ids(bad_words=[pair])), "only the run is banned"
    stopped = ids(stop_token_ids=[plain[1]])
    assert stopped == plain[:2] and len(ids(stop_token_ids=[plain[1]], min_tokens=6)) > 6
    assert plain[1] not in ids(stop_token_ids=[plain[1]], min_tokens=6)[:6]
    [cut] = llm.generate("def f(x):", SamplingParams(max_tokens=1, truncate_prompt_tokens=3), use_tqdm=False)
    assert len(cut.prompt_token_ids) == 3


@pytest.mark.parametrize("given", [{"use_beam_search": True}, {"use_beam_search": True, "best_of": 4}])
def test_beams_are_refused(given):
    with pytest.raises(NotSupportedError, match=r"beam search is not supported.*n or best_of") as caught:
        SamplingParams(**given)
    assert caught.value.param == "use_beam_search"


@pytest.mark.parametrize("name", ["length_penalty", "early_stopping"])
def test_what_only_beams_use_is_refused(name):
    with pytest.raises(NotSupportedError, match=name):
        SamplingParams(**{name: 0.5})


def test_beam_search_of_vllm_is_refused_clearly(llm):
    with pytest.raises(NotSupportedError, match=r"beam search is not supported.*n or best_of"):
        llm.beam_search([{"prompt": "x"}], {"beam_width": 4, "max_tokens": 5})


def test_bad_input_says_what_is_allowed(llm):
    with pytest.raises(InputError, match="temperature is -1"):
        SamplingParams(temperature=-1)
    with pytest.raises(NotSupportedError, match="use_beam_search"):
        SamplingParams(use_beam_search=True)
    for wrong in (
        {"min_p": "x"},
        {"best_of": 0},
        {"logprobs": -1},
        {"prompt_logprobs": -1},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {1: None}},
        {"logit_bias": {1: True}},
        {"penalty_window": -1},
        {"allowed_token_ids": [-1]},
        {"bad_words": "x"},
        {"skip_special_tokens": 1},
        {"truncate_prompt_tokens": 0},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            SamplingParams(**wrong)
    for wrong in (
        {"prompt_logprobs": 21},
        {"repetition_penalty": 0},
        {"logprobs": 21},
        {"logit_bias": {10**6: 1}},
        {"bad_words": ["y" * 70]},
    ):
        with pytest.raises(InputError, match=next(iter(wrong)).replace("bad_words", "bad word")):
            llm.generate("x", SamplingParams(**wrong), use_tqdm=False)
    for wrong in ({"top_k": 2**70}, {"penalty_window": 2**31}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            llm.generate("x", SamplingParams(**wrong), use_tqdm=False)
    with pytest.raises(InputError, match="no parameter 'max_token'"):
        SamplingParams(max_token=3)
    with pytest.raises(InputError, match="2 prompts, but 3"):
        llm.generate(["a", "b"], [GREEDY] * 3)
    with pytest.raises(InputError, match="a prompt is"):
        llm.generate([3.5], GREEDY, use_tqdm=False)
    with pytest.raises(InputError, match="not valid Unicode"):
        llm.generate("x\udcff", GREEDY, use_tqdm=False)
    with pytest.raises(InputError, match="context"):
        llm.generate("x" * 300, GREEDY, use_tqdm=False)
    assert llm._client.core.num_requests == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seed", "x"), ("seed", 1.5), ("temperature", "hot"), ("temperature", None), ("temperature", math.nan)),
        *(("top_p", "x"), ("top_k", 1.5), ("n", "2"), ("n", True), ("max_tokens", 1.5), ("min_tokens", None)),
        *(("stop", 5), ("stop", [5]), ("stop_token_ids", [-5]), ("stop_token_ids", 5), ("stop_token_ids", "5")),
        *(("stop_token_ids", [1 << 32]), ("ignore_eos", "no")),
    ],
)
def test_parameters_of_a_wrong_type_name_themselves(name, value):
    with pytest.raises(InputError, match=f"^{name} is .*; it must be") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_prompts_come_from_any_iterable_and_nothing_else(llm):
    outputs = llm.generate((text for text in ("a", "b")), GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["a", "b"]
    assert llm.generate([], GREEDY, use_tqdm=False) == []
    for wrong in (5, 2.5, b"ab", object(), [None], [["a"]]):
        with pytest.raises(InputError, match="a prompt is"):
            llm.generate(wrong, GREEDY, use_tqdm=False)
    for wrong in (5, {"n": 2}, ["x"]):
        with pytest.raises(InputError, match="sampling_params must be"):
            llm.generate("a", wrong, use_tqdm=False)


def test_many_prompts_keep_the_batch_full_and_the_queue_short(tmp_path):
    """Counted in steps and open requests; benchmarks/offline_many.py measures memory, too."""
    llm = LLM(model=str(tiny_llama(tmp_path)), num_threads=1, max_num_seqs=8, max_model_len=64)
    core = llm._client.core
    step, opened = core.step, []

    def counting(pending, now):
        opened.append(core.num_requests)
        return step(pending, now)

    core.step = counting
    params = [SamplingParams(max_tokens=4 + n % 9, ignore_eos=True, seed=n) for n in range(1000)]
    outputs = llm.generate((f"x{n} = " for n in range(1000)), params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [each.max_tokens for each in params]
    stats = llm._client.stats
    assert max(opened) <= 2 * 8, "prompts wait outside of the engine"
    assert stats.num_generation_tokens / stats.num_steps > 0.75 * 8
    assert not core.num_requests and not llm._client._streams and not llm._service.answers
    llm.close()


def test_as_many_samples_as_a_benchmark_wants(llm):
    params = SamplingParams(n=200, max_tokens=1, seed=1, ignore_eos=True)
    [answer] = llm.generate("x", params, use_tqdm=False)
    assert [output.index for output in answer.outputs] == list(range(200))
    assert all(len(output.token_ids) == 1 for output in answer.outputs)


def test_chat_reads_messages_as_the_server_does(llm):
    def ids(content):
        return llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)[0].prompt_token_ids

    assert ids(None) == ids("")
    assert ids([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == ids("ab")
    user = {"role": "user", "content": "hi"}
    several = llm.chat([[user], [user, {"role": "assistant", "content": "x"}, user]], GREEDY, use_tqdm=False)
    assert len(several) == 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "length >= 1"),
        ([[]], "length >= 1"),
        ("hi", "expected `array`"),
        ({}, "expected `array`"),
        ([{"content": "x"}], "messages\\[0\\]: .*role"),
        ([{"role": "poet", "content": "x"}], "role must be one of"),
        ([{"role": "user", "content": 5}], "messages\\[0\\].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "not text"),
        ([{"role": "user", "content": "\udcff"}], "not valid Unicode"),
    ],
)
def test_conversations_that_are_none(llm, messages, message):
    with pytest.raises(InputError, match=message):
        llm.chat(messages, GREEDY, use_tqdm=False)


def test_unknown_options_and_several_devices_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_len"):
        LLM(model=str(tmp_path), max_len=3)
    with pytest.raises(NotSupportedError, match="tensor_parallel_size"):
        LLM(model=str(tmp_path), tensor_parallel_size=2)


def test_a_closed_llm_says_so(tmp_path, caplog):
    llm = LLM(model=str(tiny_llama(tmp_path)), trust_remote_code=True, num_threads=1)
    assert "never runs code" in caplog.text
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError):
        llm.generate("x", GREEDY)
    with pytest.raises(EngineDeadError):
        next(llm.stream("x", GREEDY))


def test_closing_gives_the_memory_and_the_garbage_collector_back(tmp_path):
    llm = LLM(model=str(tiny_llama(tmp_path)), num_threads=1)
    worker = llm._client.core.workers.worker
    held = [weakref.ref(each) for each in (worker, worker.model, worker.attention)]
    del worker
    assert gc.get_threshold()[0] == YOUNG_OBJECTS and gc.get_freeze_count()
    llm.close()
    assert [each() for each in held] == [None] * 3
    assert gc.get_threshold()[0] < YOUNG_OBJECTS and not gc.get_freeze_count()


def test_closing_gives_torch_its_threads_back(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    llm = LLM(model=str(tiny_llama(tmp_path)), num_threads=2)
    assert torch.get_num_threads() != 3
    llm.close()
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_an_llm_that_nobody_holds_ends(tmp_path):
    llm = LLM(model=str(tiny_llama(tmp_path)), num_threads=1)
    assert llm.generate("x", GREEDY, use_tqdm=False)
    threads, model = (llm._thread, llm._client._thread), weakref.ref(llm._client.core.workers.worker.model)
    del llm
    assert not any(thread.is_alive() for thread in threads) and model() is None


def test_closing_ends_the_calls_of_other_threads(tmp_path):
    llm = LLM(model=str(tiny_llama(tmp_path)), num_threads=1)
    endless = SamplingParams(max_tokens=400, ignore_eos=True)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(llm.generate, ["x"] * 200, endless, use_tqdm=False)
        while not llm._client.stats.num_running:
            time.sleep(0.01)
        llm.close()
        with pytest.raises(EngineDeadError):
            running.result(timeout=20)


THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{{ tools | length if tools else '' }}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n{% endif %}"
)


@pytest.fixture(scope="module", params=[False, True], ids=["tags", "control tokens"])
def thinker(request, tmp_path_factory):
    """A random model, whose template opens the reasoning."""
    folder = tiny.tiny_llama(tmp_path_factory.mktemp("thinker"), vocab_size=tiny.VOCAB_SIZE + 2)
    definition = byte_level_definition((*tiny.SPECIAL_TOKENS, "<think>", "</think>"))
    for token in definition["added_tokens"][-2:]:
        token["special"] = request.param
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    settings = {"eos_token": "<|im_end|>", "chat_template": THINKING_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with closing(LLM(str(folder), num_threads=1, max_model_len=256, num_kv_blocks=64)) as llm:
        yield llm


def test_chats_tell_thoughts_from_answers(thinker):
    def ask(params, **more):
        [answer] = thinker.chat([{"role": "user", "content": "hi"}], params, use_tqdm=False, **more)
        return answer.outputs[0]

    end = tiny.VOCAB_SIZE + 1
    cut = ask(SamplingParams(temperature=0, max_tokens=9, logit_bias={end: False}, ignore_eos=True))
    assert cut.reasoning == cut.text.lstrip("\n") and cut.text and cut.content == ""
    whole = ask(
        SamplingParams(temperature=0, max_tokens=9, logit_bias={end: 100}, structured_outputs={"choice": ["yes"]})
    )
    assert (whole.text.replace("\n", ""), whole.reasoning, whole.content) == ("</think>yes", "", "yes")
    off = ask(
        SamplingParams(temperature=0, max_tokens=9, structured_outputs={"choice": ["yes"]}),
        chat_template_kwargs={"enable_thinking": False},
    )
    assert (off.text, off.reasoning, off.content) == ("yes", None, None)
    with pytest.raises(NotSupportedError, match="nothing else reaches a template"):
        ask(None, chat_template_kwargs={"messages": []})


def test_chats_tell_templates_of_tools(thinker):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    [answer] = thinker.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False, tools=tools)
    tokenizer = thinker.get_tokenizer()
    assert answer.prompt_token_ids == tokenizer.encode("<|im_start|>hi<|im_end|>1<think>\n")
