"""A template that would run for ever or write without end costs its own request an answer, and nobody else anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tabstop.checkpoint import Checkpoint
from tabstop.engine.fake import FakeEngine
from tabstop.text.defaults import stop_sets
from tabstop.text.sandbox import RenderLimits
from tabstop.text.tokenizer import load_tokenizer
from tests.api.serving import Running, serving, text_checkpoint

TEMPLATE = """
{%- for m in messages %}
{%- if m.content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}
{%- if m.content == 'write' %}{{ 'x' * 10 ** 10 }}{% endif %}
{{- m.content }}
{%- endfor %}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("m")
    text_checkpoint(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint("tiny", folder=folder)
    with serving(checkpoint, FakeEngine(stop_sets=stop_sets(checkpoint, load_tokenizer(checkpoint)))) as running:
        template = running.service.models[0].text.template
        assert template is not None
        template.limits = RenderLimits(seconds=0.3)
        yield running


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/apply-template"])
@pytest.mark.parametrize(("content", "why"), [("loop", "takes too long"), ("write", "writes too much")])
def test_others_are_served_meanwhile(server: Running, path: str, content: str, why: str) -> None:
    def ask(said: str) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": said}], "max_tokens": 2}
        return httpx.post(server.url + path, json=body, timeout=60)

    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(ask, content)
        others = []
        while not endless.done():
            others.append((ask("hi").status_code, httpx.get(server.url + "/livez").status_code))
    refused = endless.result()
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages" and why in refused.json()["error"]["message"]
    assert set(others) <= {(200, 200)} and (content == "write" or others)
    server.assert_idle()
