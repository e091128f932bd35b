"""Where prompts are cut, at any byte of any text; and whole answers of a real engine that begin within a token."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabstop.answer import Answer
from tabstop.call import Call, Prompt, TextPrompt
from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig, ServerConfig
from tabstop.engine.build import build_core
from tabstop.engine.inproc import InprocClient
from tabstop.grammar import NO_IDS, Vocabulary
from tabstop.grammar.healing import compile_healing
from tabstop.grammar.specs import json_schema_constraint
from tabstop.service import Service, make_service
from tabstop.text import TextOptions
from tabstop.text.fim import Hole
from tabstop.text.healing import MAX_DEPTH, Healer
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tabstop.types import unpack_ids
from tests import tiny
from tests.text.fim_vocabularies import BIGCODE, QWEN, any_family, byte_level_definition


def healed(tokenizer: Tokenizer, text: str) -> tuple[list[int], bytes]:
    cut = Healer(tokenizer.token_bytes).cut(tokenizer.encode(text, control=False))
    return cut.ids, cut.removed


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="def retun\n  ()é_", max_size=30))
def test_cuts_lose_no_byte_and_are_needed(tiny_tokenizer: Tokenizer, text: str) -> None:
    ids, removed = healed(tiny_tokenizer, text)
    assert tiny_tokenizer.bytes_of(ids) + removed == text.encode()
    tokens = [token for token in tiny_tokenizer.token_bytes if token]
    if removed:
        assert any(token.startswith(removed) and token != removed for token in tokens)
    else:
        last = tiny_tokenizer.encode(text, control=False)[-1:]
        spelled = tiny_tokenizer.bytes_of(last)
        assert not last or not any(token.startswith(spelled) and token != spelled for token in tokens)


class Known(NamedTuple):
    tokenizer: Tokenizer
    healer: Healer
    vocabulary: Vocabulary


VOCABULARIES = ("tiny", "qwen", "codellama", "default")
FILES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=24),
    st.text("def retun\t\n  ()é_x=☺1", max_size=40),
)


@pytest.fixture(scope="module", params=VOCABULARIES)
def any_vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Known:
    if request.param in ("tiny", "default"):
        tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    else:
        tokenizer = load_tokenizer(any_family(tmp_path_factory.mktemp(request.param), request.param))
    vocabulary = Vocabulary(len(tokenizer.token_bytes), lambda: tokenizer.token_bytes)
    return Known(tokenizer, Healer(tokenizer.token_bytes), vocabulary)


@settings(max_examples=120, deadline=None)
@given(file=FILES, data=st.data())
def test_any_cursor_in_any_file(any_vocabulary: Known, file: str, data: st.DataObject) -> None:
    """Bytes match; no token of the whole file that begins where one of the prompt's does goes on over the cursor; and
    where the whole has a border at the cut, its tokens are a way that the constraint allows, until it lets go.

    The whole need not have one: merges go by rank, so `0bm` ends in the token `bm`, but `0bma` in `b` and `ma`.
    """
    tokenizer, healer, vocabulary = any_vocabulary
    at = data.draw(st.integers(0, len(file)))
    prompt = tokenizer.encode(file[:at], control=False)
    cut = healer.cut(prompt)
    kept = tokenizer.bytes_of(cut.ids)
    assert kept + cut.removed == tokenizer.bytes_of(prompt)
    if all(bytes([byte]) in tokenizer.token_bytes for byte in file.encode()):  # SmolLM2 lacks some
        assert (kept + cut.removed).endswith(file[:at].encode())
    whole = tokenizer.encode(file, control=False)
    ends = borders(tokenizer, whole)
    reached = set(borders(tokenizer, prompt)[-MAX_DEPTH - 1 :])
    over = [start for start, end in itertools.pairwise(ends) if end > len(kept + cut.removed) and start in reached]
    assert not over or min(over) >= len(kept)
    if len(kept) not in ends:
        return
    constraint = compile_healing(cut.removed.hex(), vocabulary)
    for token_id in whole[ends.index(len(kept)) :]:
        if constraint.released:
            break
        mask = np.full(-(-vocabulary.size // 32), -1, dtype=np.int32)
        constraint.fill(mask, NO_IDS)
        assert mask[token_id // 32] >> (token_id % 32) & 1, (token_id, cut.removed)
        constraint.accept(token_id)
    assert constraint.released


def borders(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Where each token begins and the last one ends, in bytes."""
    return list(itertools.accumulate((len(tokenizer.bytes_of([token_id])) for token_id in ids), initial=0))


@settings(max_examples=120, deadline=None)
@given(file=FILES, data=st.data())
def test_any_byte_of_any_file(any_vocabulary: Known, file: str, data: st.DataObject) -> None:
    """Prompts of ids may end within a character; and then, too, no token goes over the cursor from further left."""
    tokenizer, healer, vocabulary = any_vocabulary
    ids = tokenizer.encode(file, control=False)
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    cut = healer.cut(ids)
    assert tokenizer.bytes_of(cut.ids) + cut.removed == tokenizer.bytes_of(ids)
    assert cut.ids == ids[: len(cut.ids)] and cut.num_removed == len(ids) - len(cut.ids)
    for depth in range(cut.num_removed + 1, min(MAX_DEPTH, len(ids)) + 1):
        assert not vocabulary.trie.is_extended(tokenizer.bytes_of(ids[-depth:]))


def test_several_tokens_deep(tiny_tokenizer: Tokenizer) -> None:
    assert healed(tiny_tokenizer, "x\n    retur")[1] == b"retur"  # ret · u · r: three tokens, because of `return`
    assert healed(tiny_tokenizer, "x = f(")[1] == b"("
    assert healed(tiny_tokenizer, "return")[1] == b""
    assert healed(tiny_tokenizer, "x<|im_end|>")[0] != []


# ---- with a model


@pytest.fixture(scope="module", params=["qwen", "starcoder"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp(request.param)
    special = QWEN if request.param == "qwen" else BIGCODE
    size = 256 + len(tiny.MERGES) + len(special)
    tiny.tiny_llama(folder, vocab_size=size, eos_token_id=size - 1, bos_token_id=None)
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_definition(special)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}), encoding="utf-8")
    fim = request.param
    config = EngineConfig(model=str(folder), num_threads=1, num_kv_blocks=256, block_size=4, max_model_len=256, fim=fim)
    client = InprocClient(build_core(config))
    yield make_service(
        open_checkpoint(str(folder)), [client], ServerConfig(token_healing="on"), options=TextOptions(fim)
    )
    client.close()


async def texts(service: Service, call: Call) -> tuple[list[str], Answer]:
    answer = await service.start(call)
    found = [""] * (call.num_samples * len(call.prompts))
    while deltas := await answer.next_deltas():
        for delta in deltas:
            found[delta.index] += delta.text
    await answer.close()
    return found, answer


SOURCE = "def f(x):\n    return self.prin\n    é = 10"


@pytest.mark.parametrize("at", range(1, len(SOURCE) + 1, 4))
def test_any_cursor_in_any_layout(service: Service, at: int) -> None:
    """What the client sent and what it got are what the model read and wrote, byte for byte."""
    text = service.models[0].text
    prompts: list[Prompt] = [TextPrompt(SOURCE[:at]), Hole(SOURCE[:at], SOURCE[at:])]
    if "spm" in text.fill.family.orders:
        prompts.append(Hole(SOURCE[:at], SOURCE[at:], order="spm"))
    for prompt in prompts:
        call = Call(prompts=(prompt,), max_tokens=6, seed=at, num_samples=2, ignore_eos=True)
        found, answer = asyncio.run(texts(service, call))
        (submit,) = answer.submits
        ids = unpack_ids(submit.prompt_ids)
        shown = text.tokenizer.bytes_of(ids)
        removed = bytes.fromhex(submit.constraints[0].value) if submit.constraints else b""
        if isinstance(prompt, TextPrompt):
            assert shown + removed == SOURCE[:at].encode()
        else:
            assert (SOURCE[:at].encode()[: len(SOURCE[:at].encode()) - len(removed)]) in shown
        assert answer.usage.num_completion_tokens == 12
        assert all(map(len, found))


def test_the_engines_tokens_begin_with_what_was_removed(service: Service) -> None:
    """Read at the waist: the tokens spell the removed bytes, and the text is what follows them."""
    model = service.models[0]
    seen: list[int] = []
    engine = model.engines[0]
    original = engine.submit

    def submit(request):
        stream = original(request)

        async def watched():
            async for delta in stream:
                seen.extend(delta.token_ids)
                yield delta

        return watched()

    engine.submit = submit
    try:
        call = Call(prompts=(Hole("    retu", "\n"),), max_tokens=8, temperature=0.0, ignore_eos=True)
        (found,), answer = asyncio.run(texts(service, call))
    finally:
        del engine.submit
    spelled = model.text.tokenizer.bytes_of(seen)
    assert spelled.startswith(b"retu") and answer.summary.num_healed_tokens >= 1
    assert (
        spelled[len(b"    retu".removeprefix(b"    ")) :].decode("utf-8", "replace").startswith(found.rstrip("\ufffd"))
    )


def test_a_schema_begins_at_the_cursor(service: Service) -> None:
    """In both orders and in each sample: the healed bytes come first and are not in the text, which is all JSON."""
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    fill = service.models[0].text.fill
    assert fill.family is not None
    holes = tuple(Hole("    retu", "\n", order=order) for order in fill.family.orders)
    fields: dict[str, Any] = {"max_tokens": 160, "seed": 3, "constraints": (json_schema_constraint(schema),)}
    found, answer = asyncio.run(texts(service, Call(prompts=holes, num_samples=3, **fields)))
    assert all(json.loads(text)["n"] in (1, 22) for text in found), found
    assert answer.summary.num_healed_tokens >= len(holes)
    healed_bytes = [bytes.fromhex(submit.constraints[0].value) for submit in answer.submits]
    assert all(removed.endswith(b"retu") for removed in healed_bytes)
    for hole, together in zip(holes, found[::3], strict=True):
        assert asyncio.run(texts(service, Call(prompts=(hole,), **fields)))[0] == [together]
