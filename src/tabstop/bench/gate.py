"""The equal-work gate: two endpoints may be compared only if they did the same work.

Knows records, not times: it looks at what was produced, never at how fast. Limits follow MLPerf's token rule (there
90-110 %), tightened, because here both sides get the same requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from tabstop.bench.metrics import TokenAccount, account, is_failure
from tabstop.bench.records import Record


class GateLimits(msgspec.Struct, frozen=True):
    """The largest differences under which work counts as equal. All are shares (0.02 = 2 %)."""

    output_tokens: float = 0.02
    prompt_tokens: float = 0.01
    finish_reasons: float = 0.02  # total variation distance of the two distributions
    errors: float = 0.001
    cache_hits: float = 0.02  # difference of cached / prompt tokens
    unequal_greedy_answers: float | None = None  # share of different texts; None: do not look


class GateCheck(msgspec.Struct, frozen=True):
    """One line of the gate: what was compared and whether it is equal enough."""

    name: str
    passed: bool
    detail: str


def relative_difference(first: float, second: float) -> float:
    return abs(first - second) / max(first, second) if max(first, second) > 0 else 0.0


def equal_work(
    baseline: Sequence[Record], candidate: Sequence[Record], limits: GateLimits | None = None
) -> list[GateCheck]:
    """Every check, passed or not. The comparison is refused if one did not pass."""
    limits = limits or GateLimits()
    first, second = account(baseline), account(candidate)
    checks = [
        _errors("baseline", baseline, limits),
        _errors("candidate", candidate, limits),
        _totals("output tokens", _outputs(first), _outputs(second), limits.output_tokens),
        _totals("prompt tokens", first.prompt, second.prompt, limits.prompt_tokens),
        _finish_reasons(baseline, candidate, limits),
        _cache_hits(first, second, limits),
        _token_limit(first, second),
    ]
    if limits.unequal_greedy_answers is not None:
        checks.append(_answers(baseline, candidate, limits.unequal_greedy_answers))
    return checks


def _outputs(tokens: TokenAccount) -> int:
    return tokens.output_by_server if tokens.output_by_server is not None else tokens.output_counted


def _totals(name: str, first: int, second: int, limit: float) -> GateCheck:
    difference = relative_difference(first, second)
    detail = f"{first} and {second}: {100 * difference:.2f} % apart, limit {100 * limit:g} %"
    return GateCheck(name, difference <= limit, detail)


def _errors(side: str, records: Sequence[Record], limits: GateLimits) -> GateCheck:
    num_errors = sum(is_failure(record) for record in records)
    share = num_errors / len(records) if records else 1.0
    detail = f"{num_errors} of {len(records)}, limit {100 * limits.errors:g} %"
    return GateCheck(f"errors of the {side}", share <= limits.errors, detail)


def _canonical(reason: str | None) -> str:
    """The dialects' words for the same end."""
    return {"eos_token": "stop", "stop_sequence": "stop", "eos": "stop", "word": "stop", "limit": "length"}.get(
        str(reason), str(reason)
    )


def _finish_reasons(baseline: Sequence[Record], candidate: Sequence[Record], limits: GateLimits) -> GateCheck:
    counts = [Counter(_canonical(r.finish_reason) for r in side if r.outcome == "ok") for side in (baseline, candidate)]
    totals = [max(1, sum(count.values())) for count in counts]
    names = sorted(set(counts[0]) | set(counts[1]))
    distance = sum(abs(counts[0][n] / totals[0] - counts[1][n] / totals[1]) for n in names) / 2
    told = [", ".join(f"{count[name]} {name}" for name in names if count[name]) or "none" for count in counts]
    detail = f"{told[0]} and {told[1]}: {100 * distance:.1f} % differ"
    return GateCheck("finish reasons", distance <= limits.finish_reasons, detail)


def _cache_hits(first: TokenAccount, second: TokenAccount, limits: GateLimits) -> GateCheck:
    if first.cached is None or second.cached is None:
        silent = [side for side, t in (("baseline", first), ("candidate", second)) if t.cached is None]
        return GateCheck(
            "cache hits", True, f"not checked: the {' and the '.join(silent)} does not report cached tokens"
        )
    shares = [tokens.cached / tokens.prompt if tokens.prompt and tokens.cached else 0.0 for tokens in (first, second)]
    detail = f"{100 * shares[0]:.1f} % and {100 * shares[1]:.1f} % of prompt tokens were cached"
    return GateCheck("cache hits", abs(shares[0] - shares[1]) <= limits.cache_hits, detail)


def _token_limit(first: TokenAccount, second: TokenAccount) -> GateCheck:
    detail = f"{first.num_unlimited} and {second.num_unlimited} answers longer than max_tokens"
    return GateCheck("max_tokens kept", first.num_unlimited == second.num_unlimited == 0, detail)


def _answers(baseline: Sequence[Record], candidate: Sequence[Record], limit: float) -> GateCheck:
    first = {(r.session, r.turn): r.digest for r in baseline if r.outcome == "ok"}
    second = {(r.session, r.turn): r.digest for r in candidate if r.outcome == "ok"}
    common = sorted(set(first) & set(second))
    num_unequal = sum(first[key] != second[key] for key in common)
    share = num_unequal / len(common) if common else 1.0
    return GateCheck("greedy answers", share <= limit, f"{num_unequal} of {len(common)} texts differ")
