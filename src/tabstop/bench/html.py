"""placeholder"""

from __future__ import annotations

from tabstop.bench.report import BenchReport


def to_html(report: BenchReport) -> str:
    return ""
