"""What people see while the server starts."""

from __future__ import annotations

import io
import logging

import pytest
from msgspec.structs import replace
from rich.console import Console

from tabstop.startup import StartupView, describe, readable_bytes
from tabstop.types import EngineInfo, Progress

INFO = EngineInfo(
    model="tiny",
    architecture="LlamaForCausalLM",
    max_model_len=1000,
    vocab_size=256,
    block_size=16,
    num_blocks=200,
    max_num_seqs=8,
    weight_bytes=3 << 29,
    kv_bytes_per_token=1024,
    kernels={"quantization": "Q8_0", "attention": "reference"},
    load_seconds=1.25,
)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (1 << 41, "2.0 TiB")],
)
def test_readable_bytes(num_bytes: int, text: str) -> None:
    assert readable_bytes(num_bytes) == text


def test_the_table_says_what_fits() -> None:
    rows = describe(INFO)
    assert rows["weights"] == "1.5 GiB"
    assert rows["KV cache"] == "200 blocks of 16 tokens = 3,200 tokens, 3.1 MiB"
    assert rows["requests of that length that fit"] == "3 (at most 8 samples run at once)"
    assert rows["kernels"] == "attention: reference, quantization: Q8_0"


def test_the_table_says_where_the_time_went() -> None:
    assert describe(INFO)["loaded in"] == "1.2 s"
    assert describe(replace(INFO, load_stages={"weights": 0.51, "graphs": 0.7}))["loaded in"] == (
        "1.2 s (weights 0.5, graphs 0.7)"
    )


def test_the_table_says_where_a_cards_memory_is() -> None:
    assert "memory" not in describe(INFO)
    rows = describe(replace(INFO, memory={"weights": 3 << 29, "graphs": 1 << 20, "driver": 1537 << 20}))
    assert rows["memory"] == "weights 1.5 GiB, graphs 1.0 MiB, driver 1.5 GiB"


def test_a_terminal_gets_bars_and_a_table() -> None:
    out = io.StringIO()
    view = StartupView(Console(file=out, force_terminal=True, width=120))
    for done in (0, 50, 100):
        view.show_progress(Progress("weights", done, 100))
    view.show_table(INFO, "http://127.0.0.1:8000")
    view.close()
    assert "weights" in out.getvalue()
    assert "http://127.0.0.1:8000" in out.getvalue() and "LlamaForCausalLM" in out.getvalue()


def test_without_a_terminal_there_are_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    out = io.StringIO()
    view = StartupView(Console(file=out))
    with caplog.at_level(logging.INFO):
        for done in range(100):
            view.show_progress(Progress("weights", done, 100))
        view.show_progress(Progress("KV cache", 0, 0))
        view.show_table(INFO, "http://127.0.0.1:8000")
    assert out.getvalue() == ""
    assert [record.getMessage() for record in caplog.records[:2]] == ["loading: weights 0 %", "loading: KV cache 0 %"]
    assert "URL: http://127.0.0.1:8000" in caplog.records[2].getMessage()
