"""Exact lengths, seeds, and prompts that never repeat by accident."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tabstop.bench.arrivals import coefficient_of_variation, dispersion
from tabstop.bench.golden import count_words
from tabstop.bench.records import Session
from tabstop.bench.workloads import NAMES, WorkloadSpec, make_sessions, num_repeated
from tabstop.bench.workloads.code import load_humaneval
from tabstop.bench.workloads.prompts import IdMaker, LooseMaker, PromptMaker, TextMaker
from tabstop.bench.workloads.trace import read_trace
from tabstop.errors import ConfigError, InputError

ROOT = Path(__file__).parents[2]


def spec(name: str, **changes: object) -> WorkloadSpec:
    values = {"name": name, "num_requests": 20, "folder": ROOT / "tests", "prefix_tokens": 64, "num_turns": 3}
    return WorkloadSpec(**values | changes)  # type: ignore[arg-type]


def maker_of(name: str) -> PromptMaker:
    return LooseMaker() if name == "chat" else IdMaker()


def contents(sessions: list[Session]) -> list[object]:
    return [(t.ids, t.text, t.suffix, t.messages) for s in sessions for t in s.turns]


def shape(sessions: list[Session]) -> list[object]:
    return [(s.start, [(t.max_tokens, t.num_prompt_tokens, t.delay, t.kind) for t in s.turns]) for s in sessions]


@pytest.mark.parametrize("name", NAMES)
def test_seeds_decide_everything_and_salts_only_the_content(name: str) -> None:
    first = make_sessions(spec(name), maker_of(name))
    assert len(first) == 20 and [s.index for s in first] == list(range(20))
    assert make_sessions(spec(name), maker_of(name)) == first
    salted = make_sessions(spec(name, salt=1), maker_of(name))
    assert shape(salted) == shape(first) and not set(map(repr, contents(salted))) & set(map(repr, contents(first)))
    for changes in ({"seed": 1}, {"block": 1}):
        other = make_sessions(spec(name, **changes), maker_of(name))
        assert not set(map(repr, contents(other))) & set(map(repr, contents(first)))


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_repeats(name: str) -> None:
    sessions = make_sessions(spec(name, num_requests=200), maker_of(name))
    assert num_repeated(turn for session in sessions for turn in session.turns) == 0


def test_prompts_too_short_to_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="too short to differ"):
        make_sessions(spec("random", input_tokens="1", num_requests=2000), IdMaker(num_ids=100))


def test_the_articles_mix_is_exact() -> None:
    sessions = make_sessions(spec("article", num_requests=1000), IdMaker())
    lengths = [len(s.turns[0].ids) for s in sessions]
    assert lengths.count(128) == lengths.count(512) == 500
    assert all(s.turns[0].max_tokens == 256 and s.turns[0].ignore_end for s in sessions)


def test_text_prompts_are_exact_in_any_counters_tokens() -> None:
    def sixes(text: str) -> int:
        return sum(-(-len(word) // 6) for word in text.split(" "))

    for counter in (count_words, sixes, len):
        maker = TextMaker(counter, num_added=2)
        sessions = make_sessions(spec("random", input_tokens="50:300"), maker)
        assert all(counter(s.turns[0].text) + 2 == s.turns[0].num_prompt_tokens for s in sessions)


@pytest.mark.parametrize(
    ("written", "low", "high"), [("7", 7, 7), ("3:9", 3, 9), ("128,512", 128, 512), ("lognormal:100:0.5", 10, 1000)]
)
def test_written_lengths(written: str, low: int, high: int) -> None:
    sessions = make_sessions(spec("random", input_tokens=written, num_requests=200), IdMaker())
    lengths = [s.turns[0].num_prompt_tokens or 0 for s in sessions]
    assert low <= min(lengths) <= max(lengths) <= high


@pytest.mark.parametrize("written", ["many", "0", "9:3", "lognormal:1"])
def test_unreadable_lengths_are_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the length"):
        make_sessions(spec("random", input_tokens=written), IdMaker())


def test_chat_prompts_grow_and_are_scripted() -> None:
    (session, *_) = make_sessions(spec("chat"), LooseMaker())
    assert [len(t.messages) for t in session.turns] == [2, 4, 6]
    assert session.turns[1].messages[:2] == session.turns[0].messages
    (live, *_) = make_sessions(spec("chat", live_answers=True), LooseMaker())
    assert [t.carries_answer for t in live.turns] == [False, True, True]
    assert [len(t.messages) for t in live.turns] == [2, 1, 1]


def test_agent_prompts_share_starts() -> None:
    sessions = make_sessions(spec("agent", prefix_tokens=320), IdMaker())
    firsts = [s.turns[0].ids for s in sessions]
    assert all(ids[:320] == firsts[0][:320] for ids in firsts)
    assert sessions[0].turns[1].ids[: len(firsts[0])] == firsts[0]


def test_shared_prefixes_are_skewed() -> None:
    sessions = make_sessions(spec("shared-prefix", num_requests=400), IdMaker())
    starts = [tuple(s.turns[0].ids[:64]) for s in sessions]
    counts = sorted((starts.count(start) for start in set(starts)), reverse=True)
    assert len(counts) == 4 and counts[0] > 1.5 * counts[1]


def test_typing_supersedes_and_holes_are_inside_a_file() -> None:
    (session, *_) = make_sessions(spec("typing"), LooseMaker())
    assert all(turn.supersedes for turn in session.turns)
    assert session.turns[1].text.startswith(session.turns[0].text)
    (hole, *_) = make_sessions(spec("fim", verbatim=True), LooseMaker())
    texts = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    assert any(hole.turns[0].text in text and (hole.turns[0].suffix or "") in text for text in texts)
    (templated, *_) = make_sessions(spec("fim", fim_template="<PRE>{prefix}<SUF>{suffix}<MID>"), LooseMaker())
    assert templated.turns[0].text.startswith("<PRE># ") and templated.turns[0].suffix is None


def test_humaneval_is_whole() -> None:
    assert len(load_humaneval()) == 164


def test_cancellations_are_a_share_of_all() -> None:
    sessions = make_sessions(spec("random", num_requests=500, cancel_rate=0.3), IdMaker())
    share = sum(s.turns[0].cancel_after is not None for s in sessions) / 500
    assert 0.24 < share < 0.36


def test_the_built_in_trace_is_the_published_one() -> None:
    trace = read_trace("azure-code")
    assert (len(trace.times), int(np.median(trace.inputs)), int(np.median(trace.outputs))) == (8819, 1469, 13)
    assert coefficient_of_variation(trace.times) == pytest.approx(13.2, abs=0.1)
    assert dispersion(trace.times, 1.0) > 10


def test_trace_replay_keeps_times_and_lengths() -> None:
    sessions = make_sessions(spec("trace", trace_skip=100, trace_speed=2.0, max_input_tokens=200), IdMaker())
    part = read_trace("azure-code").part(100, 20)
    assert [s.start for s in sessions] == [t / 2 for t in part.times]
    assert [len(s.turns[0].ids) for s in sessions] == [min(200, n) for n in part.inputs]
    assert [s.turns[0].max_tokens for s in sessions] == list(part.outputs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("when,ContextTokens,GeneratedTokens\n0,1,2\n", "no time column: it has when"),
        ("TIMESTAMP,GeneratedTokens\n0,1\n", "no input column"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n0,1,many\n", "line 2 is not a time and two numbers"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no rows"),
        ("", "it has none"),
        ("time,input,output\nnan,1,2\n", "line 2"),
        ("time,input,output\n0,inf,2\n", "line 2"),
        ("time,input,output\n0,1,1e300\n", "line 2"),
        ("time,input,output\n0,1,2\n1,-5,2\n", "line 3"),
        ("time,input,output\n0,1,2\n1e12,1,2\n", "more than a year"),
        (f'time,input,output\n"0,1,2\n{"x" * 200_000}', "is no CSV file: field larger"),
        ("time,input,output\n\udcff,1,2\n", "is no CSV file: 'utf-8'"),
    ],
)
def test_a_bad_trace_is_one_clear_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_trace(str(path))


def test_a_spreadsheets_byte_order_mark_is_no_column(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("\ufefftime,input,output\n5,1,2\n")
    assert read_trace(str(tmp_path / "trace.csv")).times.tolist() == [0]


def test_other_column_names_and_orders_are_read(tmp_path: Path) -> None:
    rows = [f"{i * 0.5},{i},{random.Random(i).randint(1, 9)}" for i in reversed(range(1, 5))]
    path = tmp_path / "trace.csv"
    path.write_text("Timestamp,Request tokens,Response tokens\n" + "\n".join(rows))
    trace = read_trace(str(path))
    assert trace.times.tolist() == [0, 0.5, 1.0, 1.5] and trace.inputs.tolist() == [1, 2, 3, 4]


def test_missing_files_are_one_clear_error() -> None:
    with pytest.raises(InputError, match="no trace 'nowhere"):
        read_trace("nowhere.csv")
    for name in ("fim", "typing"):
        with pytest.raises(InputError, match="no folder"):
            make_sessions(msgspec.structs.replace(spec(name), folder=Path("nowhere")), LooseMaker())
    with pytest.raises(ConfigError, match="unknown workload"):
        make_sessions(spec("poetry"), IdMaker())
