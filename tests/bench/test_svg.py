"""Axes have readable ticks for any data, and marks stay inside the plot."""

from __future__ import annotations

import re

import pytest

from tabstop.bench import svg
from tabstop.bench.svg import Axis, Series


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.1, 0.11), (17.0, 43.0), (0.4, 25_000.0), (1.0, 1.01), (3e-4, 2e-3), (0.0, 2_345.0)]
)
def test_ticks_are_few_and_ascending(low: float, high: float) -> None:
    for ticks in (svg.linear_ticks(low, high), svg.log_ticks(low or 1e-3, high)):
        assert 1 <= len(ticks) <= 14
        assert ticks == sorted(set(ticks))


@pytest.mark.parametrize("log", [False, True])
def test_marks_stay_inside(log: bool) -> None:
    points = [(1.0, 5.0), (2.0, None), (10.0, 70.0), (400.0, 0.5)]
    drawn = svg.line_chart("t", [Series("a<b", points, dots=True)], Axis("x", log=log), Axis("y", log=log))
    xs = [float(x) for x in re.findall(r'cx="([\d.]+)"', drawn)]
    ys = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    assert len(xs) == 3 and "a&lt;b" in drawn
    assert all(svg.LEFT - 1 <= x <= svg.WIDTH for x in xs) and all(0 <= y <= svg.HEIGHT for y in ys)


def test_one_value_or_none_still_draws() -> None:
    assert "<svg" in svg.line_chart("t", [Series("a", [(1.0, 1.0)])], Axis("x"), Axis("y", log=True))
    assert "<svg" in svg.line_chart("t", [], Axis("x"), Axis("y"))


def test_ratios_share_one_scale() -> None:
    small, large = svg.Ratio(1.01, 1.0, 1.02, 0.03, "no difference"), svg.Ratio(0.5, 0.4, 0.6, None, "slower")
    reach = svg.reach_of([small, large])
    centres = [float(re.findall(r'cx="([\d.]+)"', svg.ratio_bar(one, reach))[0]) for one in (small, large)]
    assert 100 < centres[0] < 105 and 5 <= centres[1] < 40


def test_a_comparison_without_ratios_still_has_a_scale() -> None:
    assert svg.reach_of([]) > 0
