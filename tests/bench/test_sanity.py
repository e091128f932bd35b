"""The article's own table, row by row; the laws at their edges; bad facts as one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tabstop.bench.sanity import Claim, ModelFacts, check, floor_per_token, model_facts, parse_gpu, read_claims
from tabstop.errors import InputError

ARTICLE = Path(__file__).parents[2] / "benchmarks" / "article_claims.json"
IMPOSSIBLE = (
    "p50 latency, 13B",
    "p99 latency, 13B",
    "p99 latency, 1B",
    "1000 concurrent requests",
    "1000 requests in a 60 second test",
    "mean (1 / requests per second",
    "VRAM, 13B at 1000 concurrent requests",
    "cost per 1M tokens",
    "bill of 10M tokens a day",
    "case study, 34B INT4",
    "34B FP16 on one A100 80GB in 27.4 GB",
    "advice: 1000+ requests/s",
    "VRAM waste 23 %",
    "VRAM waste 27 %",
    "70B VRAM waste",
    "12 % waste with pages",
    "pages of 16 KB",
)
CODELLAMA = {
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "intermediate_size": 13824,
    "vocab_size": 32016,
}


@pytest.mark.parametrize("claim", read_claims(ARTICLE), ids=lambda claim: claim.name)
def test_every_impossible_row_of_the_article_is_flagged_and_no_possible_one(claim: Claim) -> None:
    assert bool(check(claim)) is claim.name.startswith(IMPOSSIBLE), check(claim)


def test_each_pattern_of_impossible_rows_is_used() -> None:
    names = [claim.name for claim in read_claims(ARTICLE)]
    assert all(any(name.startswith(pattern) for name in names) for pattern in IMPOSSIBLE)


def test_the_bandwidth_floor_is_the_known_one() -> None:
    model = ModelFacts(active_parameters=13.016e9, total_parameters=13.016e9)
    assert floor_per_token(model, parse_gpu("a100-80gb")) == pytest.approx(12.77e-3, rel=0.001)
    assert floor_per_token(model, parse_gpu("2xa100-80gb")) == pytest.approx(6.38e-3, rel=0.001)


def test_speculation_lowers_the_floor() -> None:
    model = ModelFacts(active_parameters=13e9, total_parameters=13e9)
    hardware = parse_gpu("h100-80gb")
    claim = Claim(name="x", model=model, hardware=hardware, latency=0.5, output_tokens=100)
    drafted = Claim(name="x", model=model, hardware=hardware, latency=0.5, output_tokens=100, tokens_per_pass=3)
    assert check(claim) and not check(drafted)


def test_model_facts_from_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CODELLAMA))
    facts = model_facts(tmp_path)
    assert facts.active_parameters == pytest.approx(12.85e9, rel=0.01)  # all matrices but the embedding
    assert facts.kv_bytes_per_token == 819_200
    experts = CODELLAMA | {"num_local_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(experts))
    mixture = model_facts(tmp_path)
    assert facts.active_parameters < mixture.active_parameters < mixture.total_parameters / 3


def test_bad_facts_are_one_clear_error(tmp_path: Path) -> None:
    for written in ("rtx-9999", "mine:1:2", "mine:fast:2:3"):
        with pytest.raises(InputError, match=r"GPU|gpu"):
            parse_gpu(written)
    assert parse_gpu("2xmine:100:10:16").num_devices == 2
    with pytest.raises(InputError, match="no decoder's config"):
        model_facts(tmp_path)
    (tmp_path / "claims.json").write_text('[{"latency": 1}]')
    with pytest.raises(InputError, match="not a JSON list of claims"):
        read_claims(tmp_path / "claims.json")
