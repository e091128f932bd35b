"""Commands that start nothing, and servers that answer with garbage or are hidden behind a proxy."""

from __future__ import annotations

import asyncio
import urllib.request

import pytest

from tabstop.bench.servers import answers, command_words
from tabstop.bench.tokens import RemoteCounter
from tabstop.errors import InputError
from tests.bench.test_hostile import serving, status


def test_a_command_that_starts_nothing_is_refused() -> None:
    for command, message in (("", "--start is empty"), ('"x', "No closing quotation")):
        with pytest.raises(InputError, match=message):
            command_words(command)


def test_no_proxy_stands_before_the_measured_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(urllib.request, "_opener", None)

    async def run() -> bool:
        async with serving([], get=status("200 OK")) as url:
            return await asyncio.to_thread(answers, url)

    assert asyncio.run(run())


def test_garbage_is_no_answer_and_no_tokenizer() -> None:
    async def run() -> None:
        async with serving([b"garbage\r\n\r\n"], get=b"garbage\r\n\r\n") as url:
            assert not await asyncio.to_thread(answers, url)
            with pytest.raises(InputError, match="no /tokenize"):
                await asyncio.to_thread(RemoteCounter, url)

    asyncio.run(run())
