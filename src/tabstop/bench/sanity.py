"""Physical sanity: results that cannot be true, with the arithmetic. Knows claims and hardware facts, no measuring.

The laws: a token of one sequence needs all active weights read once (bandwidth floor); a token needs two flops a
weight; requests in flight = rate × time in the system (Little); weights and KV must fit where they are said to be; a
price is an hour's price over an hour's tokens. A claim is flagged only if a law forbids it with a margin (SLACK), so
that rounding or a card slightly faster than its data sheet never flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tabstop.bench.metrics import Summary
from tabstop.bench.report import SanityFlag
from tabstop.errors import InputError

SLACK = 1.15  # a claim must beat the law by this factor to be called impossible
PRICE_SLACK = 1.02
GPUS: dict[str, tuple[float, float, float]] = {  # name → bandwidth GB/s, dense bf16 TFLOP/s, memory GB (data sheets)
    "a10g": (600, 70, 24),
    "l4": (300, 121, 24),
    "a100-40gb": (1555, 312, 40),
    "a100-80gb": (2039, 312, 80),
    "h100-80gb": (3352, 989, 80),
    "h200": (4800, 989, 141),
    "b200": (8000, 2250, 192),
    "mi300x": (5300, 1307, 192),
}


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """The accelerator(s) that one model replica uses. unit: GB/s, TFLOP/s, GB, each of one device"""

    name: str
    bandwidth: float
    flops: float
    memory: float
    num_devices: int = 1


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a token costs at least."""

    name: str = "model"
    active_parameters: float  # of one token
    total_parameters: float
    bytes_per_parameter: float = 2.0
    kv_bytes_per_token: float = 0.0


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row of a published table. Absent fields are not checked. unit: seconds, tokens, requests/s, tokens/s"""

    name: str
    model: ModelFacts | None = None
    hardware: Hardware | None = None
    latency: float | None = None  # whole answer of output_tokens
    ttft: float | None = None
    output_tokens: float | None = None
    prompt_tokens: float | None = None
    tokens_per_s: float | None = None
    requests_per_s: float | None = None
    concurrency: float | None = None  # requests said to be in flight
    num_requests: float | None = None
    duration: float | None = None
    price_per_hour: float | None = None  # of the devices that the claim's throughput came from
    price_per_million: float | None = None  # output tokens
    tokens_per_day: float | None = None
    price_per_month: float | None = None
    memory_used: float | None = None  # GB
    kv_tokens_resident: float | None = None  # tokens that must be held at once
    tokens_per_pass: float = 1.0  # over 1 with speculative decoding
    mean_latency: float | None = None
    p99_latency: float | None = None
    before: float | None = None  # "from `before` to `after` is `change`" (−0.17 = 17 % less)
    after: float | None = None
    change: float | None = None
    block_size: float | None = None  # tokens of a KV page
    page_bytes: float | None = None
    waste: float | None = None  # share of KV memory lost to unfinished pages


def parse_gpu(written: str) -> Hardware:
    """`h100-80gb`, `2xa100-80gb`, or `name:BANDWIDTH_GB_S:TFLOPS:MEMORY_GB`. Raises InputError for anything else."""
    num, mark, rest = written.partition("x")
    num_devices, name = (int(num), rest) if mark and num.isdigit() else (1, written)
    name, *facts = name.split(":")
    if facts:
        try:
            bandwidth, flops, memory = (float(fact) for fact in facts)
        except ValueError:
            raise InputError(f"cannot read --gpu {written!r}: write name:BANDWIDTH_GB_S:TFLOPS:MEMORY_GB") from None
    elif name.lower() in GPUS:
        bandwidth, flops, memory = GPUS[name.lower()]
    else:
        raise InputError(f"unknown GPU {name!r}: give {', '.join(GPUS)}, or name:BANDWIDTH_GB_S:TFLOPS:MEMORY_GB")
    return Hardware(name=name, bandwidth=bandwidth, flops=flops, memory=memory, num_devices=num_devices)


def model_facts(path: Path, bytes_per_parameter: float = 2.0) -> ModelFacts:
    """From a checkpoint's config.json (dense decoders; experts if it names them). Raises InputError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config: dict[str, Any] = msgspec.json.decode(file.read_bytes())
        hidden, num_layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        num_heads, vocabulary = int(config["num_attention_heads"]), int(config["vocab_size"])
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no decoder's config.json: {error}") from None
    head = int(config.get("head_dim") or hidden // num_heads)
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    inner = int(config.get("intermediate_size") or 4 * hidden)
    num_experts = int(config.get("num_experts") or config.get("num_local_experts") or 1)
    num_active = int(config.get("num_experts_per_tok") or 1) if num_experts > 1 else 1
    inner = int(config.get("moe_intermediate_size") or inner) if num_experts > 1 else inner
    is_gated = config.get("hidden_act", "silu") in ("silu", "swiglu") or num_experts > 1
    mlp = (3 if is_gated else 2) * hidden * inner
    attention = hidden * head * (2 * num_heads + 2 * num_kv_heads)
    head_parameters = vocabulary * hidden
    return ModelFacts(
        name=str(config.get("model_type", "model")),
        active_parameters=num_layers * (attention + num_active * mlp) + head_parameters,
        total_parameters=num_layers * (attention + num_experts * mlp) + head_parameters,
        bytes_per_parameter=bytes_per_parameter,
        kv_bytes_per_token=num_layers * 2 * num_kv_heads * head * 2,
    )


def floor_per_token(model: ModelFacts, hardware: Hardware) -> float:
    """Seconds to read the active weights once from all devices' memory."""
    return model.active_parameters * model.bytes_per_parameter / (hardware.bandwidth * 1e9 * hardware.num_devices)


def check(claim: Claim) -> list[SanityFlag]:
    """Every law that the claim breaks."""
    found = (
        *_bandwidth(claim),
        *_compute(claim),
        *_little(claim),
        *_duration(claim),
        *_price(claim),
        *_month(claim),
        *_memory(claim),
        *_mean(claim),
        *_change(claim),
        *_pages(claim),
    )
    return list(found)


def _bandwidth(claim: Claim) -> list[SanityFlag]:
    if claim.model is None or claim.hardware is None or claim.latency is None or not claim.output_tokens:
        return []
    per_token = floor_per_token(claim.model, claim.hardware) / max(1.0, claim.tokens_per_pass)
    floor = per_token * claim.output_tokens
    if claim.latency * SLACK >= floor:
        return []
    why = (
        f"{claim.model.active_parameters * claim.model.bytes_per_parameter / 1e9:.3g} GB of weights at "
        f"{claim.hardware.bandwidth * claim.hardware.num_devices:g} GB/s is {1e3 * per_token:.3g} ms a token"
    )
    claimed = f"{1e3 * claim.latency:.4g} ms for {claim.output_tokens:g} tokens"
    return [SanityFlag(f"bandwidth floor: {claim.name}", claimed, f"at least {1e3 * floor:.4g} ms", why)]


def _compute(claim: Claim) -> list[SanityFlag]:
    if claim.model is None or claim.hardware is None:
        return []
    peak = claim.hardware.flops * 1e12 * claim.hardware.num_devices
    flags = []
    rate = claim.tokens_per_s
    if rate is None and claim.requests_per_s is not None and claim.output_tokens:
        rate = claim.requests_per_s * claim.output_tokens
    if rate is not None:
        prompt_share = (claim.prompt_tokens or 0.0) / claim.output_tokens if claim.output_tokens else 0.0
        needed = 2 * claim.model.active_parameters * rate * (1 + prompt_share)
        if needed > peak * SLACK:
            limit = f"at most {rate * peak / needed:.4g} tokens/s"
            why = f"{needed / 1e12:.4g} TFLOP/s needed, {peak / 1e12:g} there"
            flags.append(SanityFlag(f"compute: {claim.name}", f"{rate:g} tokens/s", limit, why))
    if claim.ttft is not None and claim.prompt_tokens:
        floor = 2 * claim.model.active_parameters * claim.prompt_tokens / peak
        if claim.ttft * SLACK < floor:
            why = f"{claim.prompt_tokens:g} uncached prompt tokens at {peak / 1e12:g} TFLOP/s"
            claimed = f"first token after {1e3 * claim.ttft:.4g} ms"
            flags.append(SanityFlag(f"prefill: {claim.name}", claimed, f"at least {1e3 * floor:.4g} ms", why))
    return flags


def _little(claim: Claim) -> list[SanityFlag]:
    """In flight = rate × time in the system, and a closed loop is never far below its number of users."""
    if claim.requests_per_s is None or claim.latency is None or claim.concurrency is None:
        return []
    implied = claim.requests_per_s * claim.latency
    if 1 / 1.5 <= implied / claim.concurrency <= 1.5:  # percentiles stand in for means: be generous
        return []
    claimed = f"{claim.concurrency:g} in flight, {claim.requests_per_s:g} requests/s, {1e3 * claim.latency:g} ms each"
    why = f"{claim.requests_per_s:g} requests/s of {1e3 * claim.latency:g} ms are {implied:.3g} requests in flight"
    return [SanityFlag(f"Little's law: {claim.name}", claimed, f"{implied:.3g} in flight", why)]


def _duration(claim: Claim) -> list[SanityFlag]:
    if claim.duration is None or not claim.num_requests:
        return []
    rate = claim.requests_per_s
    if rate is None and claim.tokens_per_s is not None and claim.output_tokens:
        rate = claim.tokens_per_s / claim.output_tokens
    if not rate or claim.num_requests <= rate * claim.duration * SLACK:
        return []
    claimed = f"{claim.num_requests:g} requests in {claim.duration:g} s"
    why = f"at {rate:.3g} requests/s they take {claim.num_requests / rate:.3g} s"
    return [SanityFlag(f"duration: {claim.name}", claimed, f"{rate * claim.duration:.4g} requests", why)]


def _price(claim: Claim) -> list[SanityFlag]:
    if claim.price_per_hour is None or claim.price_per_million is None or not claim.tokens_per_s:
        return []
    least = 1e6 * claim.price_per_hour / (3600 * claim.tokens_per_s)
    if claim.price_per_million * PRICE_SLACK >= least:
        return []
    claimed = f"${claim.price_per_million:g} a million tokens"
    why = f"${claim.price_per_hour:g} an hour at {claim.tokens_per_s:g} tokens/s, never idle"
    return [SanityFlag(f"price: {claim.name}", claimed, f"at least ${least:.3g}", why)]


def _month(claim: Claim) -> list[SanityFlag]:
    if claim.tokens_per_day is None or claim.price_per_month is None or claim.price_per_million is None:
        return []
    product = claim.tokens_per_day * 30 / 1e6 * claim.price_per_million
    if 1 / SLACK <= claim.price_per_month / product <= SLACK:
        return []
    claimed = f"${claim.price_per_month:,.0f} a month"
    why = f"{claim.tokens_per_day * 30 / 1e6:g} million tokens at ${claim.price_per_million:g}"
    return [SanityFlag(f"monthly bill: {claim.name}", claimed, f"${product:,.0f}", why)]


def _memory(claim: Claim) -> list[SanityFlag]:
    if claim.memory_used is None or claim.model is None:
        return []
    weights = claim.model.total_parameters * claim.model.bytes_per_parameter / 1e9
    needed = weights + claim.model.kv_bytes_per_token * (claim.kv_tokens_resident or 0.0) / 1e9
    if claim.memory_used * SLACK >= needed:
        return []
    claimed = f"{claim.memory_used:g} GB used"
    why = (
        f"{weights:.3g} GB of weights and {needed - weights:.3g} GB of KV for {claim.kv_tokens_resident or 0:g} tokens"
    )
    return [SanityFlag(f"memory: {claim.name}", claimed, f"at least {needed:.3g} GB", why)]


def _mean(claim: Claim) -> list[SanityFlag]:
    if claim.mean_latency is None or claim.p99_latency is None or claim.mean_latency <= claim.p99_latency * SLACK:
        return []
    top = (claim.mean_latency - 0.99 * claim.p99_latency) / 0.01
    claimed = f"mean {1e3 * claim.mean_latency:g} ms, p99 {1e3 * claim.p99_latency:g} ms"
    why = "the mean lies over the p99 only if the slowest hundredth is that slow"
    return [SanityFlag(f"mean over p99: {claim.name}", claimed, f"the slowest 1 % average {top:.3g} s", why)]


def _change(claim: Claim) -> list[SanityFlag]:
    """Percentages to the whole percent, on either base (21 % less may be said of either number)."""
    if not claim.before or not claim.after or claim.change is None:
        return []
    bases = (claim.after / claim.before - 1, 1 - claim.before / claim.after)
    if any(abs(abs(change) - abs(claim.change)) <= 0.011 for change in bases):
        return []
    claimed = f"{claim.before:g} to {claim.after:g} is {100 * claim.change:+g} %"
    return [SanityFlag(f"percentage: {claim.name}", claimed, f"{100 * bases[0]:+.1f} %", "division")]


def _pages(claim: Claim) -> list[SanityFlag]:
    if claim.block_size is None:
        return []
    flags = []
    if claim.page_bytes is not None and claim.model is not None:
        true = claim.model.kv_bytes_per_token * claim.block_size
        if not 1 / SLACK <= claim.page_bytes / true <= SLACK:
            why = f"{claim.block_size:g} tokens of {claim.model.kv_bytes_per_token:g} bytes"
            flags.append(SanityFlag(f"page size: {claim.name}", f"{claim.page_bytes:g} bytes", f"{true:g} bytes", why))
    if claim.waste is not None and claim.prompt_tokens is not None:
        lost = (claim.block_size - 1) / 2
        true = lost / (lost + claim.prompt_tokens + (claim.output_tokens or 0.0) / 2)
        if claim.waste > 2 * true:
            why = f"half a page of {claim.block_size:g} tokens in sequences of {claim.prompt_tokens:g} tokens and more"
            limit = f"about {100 * true:.2g} %"
            flags.append(SanityFlag(f"waste: {claim.name}", f"{100 * claim.waste:g} %", limit, why))
    return flags


def check_summary(
    summary: Summary, model: ModelFacts | None, hardware: Hardware | None, tokens_per_pass: float = 1.0
) -> list[SanityFlag]:
    """A measured run against the same laws: mostly a check of the measuring (caches, early ends, wrong facts)."""
    tpot, ttft = summary.latencies.get("tpot"), summary.latencies.get("ttft")
    e2e = summary.service_latencies.get("e2e")
    per_token = tpot.percentiles["p50"].value if tpot else None
    uncached = summary.tokens.prompt - (summary.tokens.cached or 0)
    num_done = max(1, summary.outcomes.get("ok", 0))
    flags = check(
        Claim(
            name="measured time per output token",
            model=model,
            hardware=hardware,
            latency=per_token,
            output_tokens=1 if per_token is not None else None,
            tokens_per_s=summary.output_tokens_per_s.value,
            ttft=ttft.percentiles["p50"].value if ttft else None,
            prompt_tokens=uncached / num_done,
            tokens_per_pass=tokens_per_pass,
        )
    )
    is_complete = set(summary.outcomes) == {"ok"}  # a request that was given up is in flight but not finished
    if is_complete and e2e is not None and e2e.mean.value is not None and not summary.window.note:
        flags += check(
            Claim(
                name="measured concurrency",
                latency=e2e.mean.value,
                requests_per_s=summary.requests_per_s.value,
                concurrency=summary.concurrency,
            )
        )
    return flags


def read_claims(path: Path) -> list[Claim]:
    """A JSON list of claims. Raises InputError, naming what is wrong."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Claim])
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(f"{path} is not a JSON list of claims: {error}") from None
