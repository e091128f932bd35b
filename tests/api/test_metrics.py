from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.serving import Running

COUNTED = ("requests_running", "requests_waiting", "samples_running")

PROGRAM = """
import sys
from pathlib import Path
from tabstop.api.metrics import Metrics
from tabstop.call import Summary, Usage
from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine
from tabstop.service import make_service

service = make_service(Checkpoint("tiny", folder=Path(sys.argv[1])), [FakeEngine()], ServerConfig())
metrics = Metrics(service)
for _ in range(int(sys.argv[2])):
    metrics.on_end(Summary("tiny", "", Usage(5, 4, 3), outcome="ok", seconds=0.0015))
    metrics.on_first_token("tiny", 0.0015)
metrics.on_text_states(int(sys.argv[2]))
sys.stdout.write(metrics.page().decode())
"""


def samples(text: str) -> dict[str, float]:
    """name{labels} → value. Fails for text that Prometheus could not read."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            assert f"{sample.name}{{{labels}}}" not in found
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_a_request_shows(server: Running) -> None:
    before = samples(httpx.get(server.url + "/metrics").text)
    httpx.post(server.url + "/v1/completions", json={"prompt": "x" * 40, "max_tokens": 100})
    httpx.post(server.url + "/v1/completions", json={"prompt": "x" * 40, "max_tokens": 100})
    httpx.get(server.url + "/made-up/by/a/client")
    server.assert_idle()
    after = samples(httpx.get(server.url + "/metrics").text)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("tabstop_requests_total{model=tiny,outcome=ok}") == 2
    assert grown("tabstop_samples_finished_total{model=tiny,reason=stop}") == 2
    assert grown("tabstop_answer_prompt_tokens_total{model=tiny}") == 80
    assert grown("tabstop_answer_cached_tokens_total{model=tiny}") >= 32
    assert grown("tabstop_time_to_first_token_seconds_count{model=tiny}") == 2
    assert grown("tabstop_e2e_request_latency_seconds_count{model=tiny}") == 2
    assert grown("tabstop_inter_token_latency_seconds_count{model=tiny}") >= 2
    assert grown("tabstop_http_responses_total{route=/v1/completions,status=200}") == 2
    assert grown("tabstop_http_responses_total{route=none,status=404}") == 1
    assert grown("tabstop_generation_tokens_total{engine=0,model=tiny}") > 0
    assert after["tabstop_text_states{}"] == 0
    assert after["tabstop_num_requests_running{engine=0,model=tiny}"] == 0
    assert after["tabstop_engine_up{engine=0,model=tiny}"] == 1
    assert "tabstop_time_to_first_token_seconds_bucket{le=0.001,model=tiny}" in after
    states = {"used", "waste", "reserved", "cached", "free"}
    assert all(f"tabstop_kv_cache_slots{{engine=0,model=tiny,state={state}}}" in after for state in states)
    assert not any("made-up" in name for name in after)


def test_requests_and_their_samples(endless: Running) -> None:
    body = {"prompt": ["x", "y"], "n": 3, "max_tokens": 2000, "stream": True}
    with httpx.stream("POST", endless.url + "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        running = samples(httpx.get(endless.url + "/metrics").text)
    endless.assert_idle()
    counts = {name: running[f"tabstop_num_{name}{{engine=0,model=tiny}}"] for name in COUNTED}
    assert counts == {"requests_running": 2, "requests_waiting": 0, "samples_running": 6}


def test_any_front_end_shows_the_sum_over_all(checkpoint, tmp_path: Path) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def front_end(num_requests: int) -> dict[str, float]:
        arguments = [sys.executable, "-c", PROGRAM, str(checkpoint.folder), str(num_requests)]
        return samples(subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout)

    assert front_end(2)["tabstop_requests_total{model=tiny,outcome=ok}"] == 2
    both = front_end(3)
    assert both["tabstop_requests_total{model=tiny,outcome=ok}"] == 5
    assert both["tabstop_time_to_first_token_seconds_bucket{le=0.002,model=tiny}"] == 5
    assert both["tabstop_time_to_first_token_seconds_bucket{le=0.001,model=tiny}"] == 0
    assert both["tabstop_text_states{}"] == 5  # until the supervisor marks the first one dead
    assert both["tabstop_engine_up{engine=0,model=tiny}"] == 1


def test_one_log_line_for_each_request_and_no_text(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="tabstop"):
        body = {"prompt": "secret-prompt", "max_tokens": 100}
        httpx.post(server.url + "/v1/completions", json=body, headers={"x-request-id": "r-1"})
        server.assert_idle()
    (record,) = [record for record in caplog.records if record.name == "tabstop.api.metrics"]
    assert "request_id=r-1" in record.getMessage() and "outcome=ok" in record.getMessage()
    assert record.fields["completion_tokens"] > 0
    assert "secret" not in json.dumps(record.fields) and "return" not in record.getMessage()
