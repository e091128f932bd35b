"""`tabstop bench …`, `tabstop cost`, `tabstop plan`: options in, reports out, exit codes.

0: done. 2: bad input, one line on stderr. 3: INVALID, the client was the bottleneck. 130: Ctrl-C, partial report kept.
"""

from __future__ import annotations

import datetime
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tabstop.bench.cli_money import cost, plan
from tabstop.bench.compare import CompareSpec, Comparison, check_blocks, compare
from tabstop.bench.cost import parse_price
from tabstop.bench.fingerprint import fingerprint
from tabstop.bench.gate import GateLimits
from tabstop.bench.options import Options, check_extras, make_endpoint, make_setup, parse_slo, with_options
from tabstop.bench.outputs import check_writable, output_folder, show, write_somewhere
from tabstop.bench.progress import LiveProgress
from tabstop.bench.records import Record
from tabstop.bench.report import (
    BenchReport,
    RunSection,
    comparison_section,
    make_section,
    now,
    redacted,
)
from tabstop.bench.run import RunSetup, execute, schedule, warm_up
from tabstop.bench.sanity import check, check_summary, model_facts, parse_gpu, read_claims
from tabstop.bench.selftest import SelfTestSpec, selftest
from tabstop.bench.servers import Fleet, Server
from tabstop.bench.sweep import Sweep, SweepSpec
from tabstop.bench.targets import Target, make_arm, make_target, names_of, same_maker, short_name
from tabstop.bench.tokens import LocalTokenizer
from tabstop.bench.workers import WorkerPool
from tabstop.bench.workloads import make_sessions
from tabstop.bench.workloads.prompts import LooseMaker
from tabstop.errors import ConfigError, InputError
from tabstop.exits import EXIT_INTERRUPTED, EXIT_INVALID, fails_in_one_line

__all__ = ["bench_app", "cost", "plan"]

bench_app = typer.Typer(no_args_is_help=True, help="Measure, compare and check inference servers.")


def _checked_setup(options: Options) -> RunSetup:
    """The setup, once all that would else fail after a server's start, or after the measurement, has been tried.

    Raises ConfigError or InputError.
    """
    setup = make_setup(options)
    few = msgspec.structs.replace(setup.workload, num_requests=min(2, setup.workload.num_requests))
    schedule(make_sessions(few, LooseMaker()), setup.load, few)
    for number in range(len(options.extra or [""])):
        make_endpoint(options, "http://localhost", number=number)
    if setup.tokens.tokenizer is not None:
        LocalTokenizer.load(setup.tokens.tokenizer)
    _check_sanity(options, [])
    _hourly(options)
    if options.out is not None:
        output_folder(options.out, "")
    else:
        check_writable(Path())
    return setup


def _hourly(options: Options) -> float | None:
    return parse_price(options.price, options.devices, datetime.date.today()).hourly if options.price else None


def _servers(urls: list[str], starts: list[str] | None, timeout: float) -> list[Server]:
    return [Server(url=url) for url in urls] + [Server(command=c, start_timeout=timeout) for c in starts or []]


def _one_server(options: Options, url: str | None, starts: list[str] | None, timeout: float) -> Server:
    servers = _servers([url] if url else [], starts, timeout)
    if len(servers) != 1:
        raise ConfigError("give one URL or one --start command")
    check_extras(options, 1)
    return servers[0]


def _report(kind: str, setup: RunSetup, runs: list[RunSection]) -> BenchReport:
    command = ["tabstop", *redacted(sys.argv[1:])]
    return BenchReport(
        kind=kind,  # type: ignore[arg-type]
        created=now(),
        command=command,
        environment=fingerprint(),
        setup=setup,
        runs=runs,
    )


def _check_sanity(options: Options, runs: list[RunSection]) -> None:
    hardware = parse_gpu(options.gpu) if options.gpu else None
    model = model_facts(options.model_config, options.weight_bytes) if options.model_config else None
    for run in runs:
        run.sanity = check_summary(run.summary, model, hardware)


def _finish(report: BenchReport, records: list[tuple[str, list[Record]]], options: Options, failure: str = "") -> None:
    """Writes and shows the report. Raises InputError for a failure that ended the measurement early, typer.Exit."""
    how = {"keep_text": options.keep_text, "price_per_hour": _hourly(options)}
    folder = write_somewhere(report, records, options.out, **how)
    show(report, folder, Console())
    if failure:
        raise InputError(f"the measurement ended early: {failure}")
    if any(run.is_interrupted for run in report.runs):
        raise typer.Exit(EXIT_INTERRUPTED)
    for run in report.runs:
        if run.summary.errors and not run.summary.outcomes.get("ok"):
            raise InputError(f"not one request to {run.label} succeeded: {next(iter(run.summary.errors))}")
        if run.summary.outcomes.get("ok") and not max(run.summary.output_lengths.values(), default=0):
            raise InputError(f"not one answer of {run.label} held a token: there is nothing to measure")
    if not report.is_valid:
        raise typer.Exit(EXIT_INVALID)


Start = Annotated[list[str] | None, typer.Option("--start", help="command that starts a server; {port} is replaced")]
StartTimeout = Annotated[float, typer.Option(help="seconds that a started server may take to answer")]


@bench_app.command("run")
@fails_in_one_line
@with_options(Options)
def run_command(
    options: Options,
    url: Annotated[str | None, typer.Argument(help="endpoint to measure")] = None,
    start: Start = None,
    start_timeout: StartTimeout = 600.0,
) -> None:
    """Measure one endpoint."""
    setup = _checked_setup(options)
    servers = [_one_server(options, url, start, start_timeout)]
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(servers))
        target = make_target(options, setup, fleet, 0, short_name(0, servers[0])[2:])
        pool = stack.enter_context(WorkerPool(options.workers))
        live = stack.enter_context(LiveProgress(Console(stderr=True)))
        warm_up(pool, target.endpoint, setup, target.maker)
        outcome = execute(pool, target.endpoint, setup, target.maker, live.task("run", setup.workload.num_requests))
        death = "" if servers[0].is_running else fleet.death(0)
    section = make_section(outcome, target.described)
    _check_sanity(options, [section])
    _finish(_report("run", setup, [section]), [(section.label, outcome.records)], options, death)


@bench_app.command("compare")
@fails_in_one_line
@with_options(Options)
def compare_command(
    options: Options,
    urls: Annotated[list[str] | None, typer.Argument(help="endpoints; the first is the baseline")] = None,
    start: Start = None,
    start_timeout: StartTimeout = 600.0,
    one_at_a_time: Annotated[
        bool, typer.Option(help="only the measured server runs (slower, fairer on one card)")
    ] = False,
    label: Annotated[list[str] | None, typer.Option(help="names of the endpoints, in order")] = None,
    blocks: Annotated[int, typer.Option(help="ABBA blocks; each endpoint runs twice in each")] = 10,
    aa_blocks: Annotated[int, typer.Option(min=0, help="blocks of the baseline against itself; 0: none")] = 5,
    minimum_effect: Annotated[
        float, typer.Option(min=0, help="smaller differences are no difference (0.01 = 1 %)")
    ] = 0.01,
    max_output_difference: Annotated[
        float, typer.Option(min=0, help="gate: output tokens may differ by so much")
    ] = 0.02,
    max_unequal_answers: Annotated[
        float | None, typer.Option(help="gate: share of greedy answers that may differ; default: not looked at")
    ] = None,
) -> None:
    """Compare endpoints: same work, alternating blocks, an A/A run, a verdict for each metric."""
    setup = _checked_setup(options)
    servers = _servers(urls or [], start, start_timeout)
    if len(servers) < 2:
        raise ConfigError("give at least two endpoints: URLs, or --start commands")
    check_extras(options, len(servers))
    check_blocks(blocks)
    names = names_of(servers, label or [])
    limits = GateLimits(output_tokens=max_output_difference, unequal_greedy_answers=max_unequal_answers)
    spec = CompareSpec(
        num_blocks=blocks,
        num_aa_blocks=aa_blocks,
        minimum_effect=minimum_effect,
        limits=limits,
        seed=setup.workload.seed,
    )
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(servers, one_at_a_time=one_at_a_time))
        pool = stack.enter_context(WorkerPool(options.workers))
        targets = [make_target(options, setup, fleet, i, name) for i, name in enumerate(names)]
        same_maker(targets, one_at_a_time=one_at_a_time)
        live = stack.enter_context(LiveProgress(Console(stderr=True)))
        arms = [make_arm(fleet, i, targets, pool, setup) for i in range(len(targets))]
        for number, target in enumerate(targets):
            if not one_at_a_time:
                warm_up(pool, arms[number].enter(), setup, target.maker)
        result = compare(
            pool,
            arms,
            setup,
            spec,
            lambda name, done, total: live.task(f"{done + 1}/{total} {name}", setup.workload.num_requests),
        )
    report, records = _compare_report(options, setup, targets, result)
    _finish(report, records, options, result.failure)


def _compare_report(
    options: Options, setup: RunSetup, targets: list[Target], result: Comparison
) -> tuple[BenchReport, list[tuple[str, list[Record]]]]:
    described = {target.described.label: target.described for target in targets}
    sections = [make_section(o, described[name]) for name, o in zip(result.labels, result.outcomes, strict=True)]
    for section in sections:
        section.is_interrupted = result.is_interrupted
    _check_sanity(options, sections)
    report = _report("compare", setup, sections)
    report.comparison = comparison_section(result)
    records = [(s.label, o.records) for s, o in zip(sections, result.outcomes, strict=True)]
    return report, records


@bench_app.command("sweep")
@fails_in_one_line
@with_options(Options)
def sweep_command(
    options: Options,
    url: Annotated[str | None, typer.Argument(help="endpoint to measure")] = None,
    start: Start = None,
    start_timeout: StartTimeout = 600.0,
    percentile: Annotated[float, typer.Option(help="share of requests that must keep the --slo")] = 0.99,
    max_requests: Annotated[
        int, typer.Option(min=1, help="requests per rate of the search, if not decided before")
    ] = 2000,
    min_duration: Annotated[float, typer.Option(min=0, help="seconds a rate must last before it can pass")] = 10.0,
    saturating_concurrency: Annotated[
        int, typer.Option(min=1, help="requests in flight that saturate the server")
    ] = 64,
) -> None:
    """Latency against throughput, the saturation point, and the largest rate that meets the SLO."""
    setup = _checked_setup(options)
    _, level = parse_slo(options.slo)
    if not 0 < percentile < 1:
        raise ConfigError(f"--percentile is {percentile:g}; it is a share over 0 and under 1, e.g. 0.99")
    servers = [_one_server(options, url, start, start_timeout)]
    spec = SweepSpec(
        percentile=level or percentile,
        max_requests=max_requests,
        min_duration=min_duration,
        curve_requests=options.num_requests,
        saturating_concurrency=saturating_concurrency,
    )
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(servers))
        target = make_target(options, setup, fleet, 0, short_name(0, servers[0])[2:])
        pool = stack.enter_context(WorkerPool(options.workers))
        live = stack.enter_context(LiveProgress(Console(stderr=True)))
        warm_up(pool, target.endpoint, setup, target.maker)
        sweep = Sweep(pool, target.endpoint, setup, spec, target.maker)
        sweep.report = lambda title: live.task(title, None)
        result, outcome = sweep.run(), sweep.first
    assert outcome is not None
    section = make_section(outcome, target.described)
    section.is_interrupted = result.is_interrupted
    section.invalid = [f"at {p.rate:.3g}/s: {fault}" for p in result.points for fault in p.invalid]
    _check_sanity(options, [section])
    report = _report("sweep", setup, [section])
    report.sweep = result
    _finish(report, [(section.label, outcome.records)], options)


@bench_app.command("sanity")
@fails_in_one_line
def sanity_command(
    claims: Annotated[Path, typer.Argument(help="JSON list of claims; docs/benchmarking.md has the fields")],
) -> None:
    """Check a published table against physics: every claim that cannot be true, with the arithmetic."""
    console = Console()
    num_flagged = 0
    for claim in read_claims(claims):
        flags = check(claim)
        num_flagged += bool(flags)
        verdict = "[red]impossible[/red]" if flags else "[green]possible[/green]  "
        console.print(f"{verdict} {escape(claim.name)}", highlight=False)
        for flag in flags:
            told = escape(f"{flag.what.split(':')[0]}: {flag.claim}; {flag.limit} ({flag.why})")
            console.print(f"    {told}", highlight=False)
    console.print(f"{num_flagged} impossible claims")


@bench_app.command("selftest")
@fails_in_one_line
def selftest_command(
    streams: Annotated[int, typer.Option(min=1, help="streams of 4 tokens a second for the clock check")] = 500,
    seconds: Annotated[float, typer.Option(min=1, help="length of the clock check")] = 20.0,
    repeats: Annotated[int, typer.Option(min=20, help="A/A comparisons in all; a fifth of them through sockets")] = 200,
    workers: Annotated[int, typer.Option(min=1, help="client processes")] = 2,
    out: Annotated[Path | None, typer.Option(help="write the checks and the recorded noise here (JSON)")] = None,
) -> None:
    """Measure the measuring: clocks, token accounts, false verdicts and power, against a golden server."""
    if out is not None:
        check_writable(out.parent)
    spec = SelfTestSpec(
        num_streams=streams,
        seconds=seconds,
        socket_repeats=repeats // 5,
        noise_repeats=repeats - repeats // 5,
        socket_power_repeats=repeats // 10,
        noise_power_repeats=repeats - repeats // 10,
    )
    progress = Console(stderr=True)
    result = selftest(spec, workers, lambda text: progress.print(text, highlight=False))
    console = Console()
    table = Table("check", "measured", "limit", "")
    for check_line in result.checks:
        shown = "[green]holds[/green]" if check_line.passed else "[red]FAILS[/red]"
        table.add_row(check_line.name, check_line.measured, check_line.limit, shown)
    console.print(table, highlight=False)
    console.print(f"{result.seconds:.0f} s")
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    if not result.passed:
        raise typer.Exit(1)


def main() -> None:
    """python -m tabstop.bench"""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
    app.add_typer(bench_app, name="bench")
    app.command("cost")(cost)
    app.command("plan")(plan)
    app()
