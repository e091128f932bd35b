"""Plots as inline SVG: lines with axes and tooltips, intervals as a forest plot. Colours are the page's.

Knows numbers and labels only. Every mark has a <title>, so that a pointer shows its value without any script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import msgspec

WIDTH, HEIGHT = 480, 264
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 14, 40


class Series(msgspec.Struct, frozen=True):
    """A line: points in ascending x. A None breaks it."""

    label: str
    points: list[tuple[float, float | None]]
    dots: bool = False
    style: int | None = None  # palette index; default: its position


class Axis(msgspec.Struct, frozen=True):
    """A scale with its title. `low` and `high` default to the data."""

    title: str
    log: bool = False
    low: float | None = None
    high: float | None = None


class _Scale:
    """Data → pixels, with readable ticks."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        usable = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)] or [1.0]
        low = axis.low if axis.low is not None else min(usable)
        high = axis.high if axis.high is not None else max(usable)
        if high <= low:
            high = low * 1.1 + (1e-9 if low else 1.0)
        self.log, self.start, self.end = axis.log, start, end
        self.ticks = log_ticks(low, high) if axis.log else linear_ticks(low, high)
        self.low = min(low, self.ticks[0]) if axis.low is None else low
        self.high = max(high, self.ticks[-1]) if axis.high is None else high

    def __call__(self, value: float) -> float:
        if self.log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def linear_ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` round values that enclose the range."""
    step = 10 ** math.floor(math.log10((high - low) / num))
    step = next((step * m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= num), step * 10)
    first = math.floor(low / step) * step
    return [round(first + i * step, 10) for i in range(math.ceil((high - first) / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values inside the range: whole decades in a wide one, more of each decade the narrower it is."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) >= 4:
            return ticks
    return [t for t in linear_ticks(low, high) if low <= t <= high] or [low]


def tick_label(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}" if abs(value) >= 0.001 else f"{value:.0e}"


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """One plot as an <svg> element."""
    xs = [px for one in series for px, py in one.points if py is not None]
    ys = [py for one in series for _, py in one.points if py is not None]
    sx = _Scale(x, xs, LEFT, WIDTH - RIGHT)
    sy = _Scale(y, ys, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" class="plot">',
        *_grid(sx, sy, x, y),
    ]
    for number, one in enumerate(series):
        parts += _line(one, one.style if one.style is not None else number, sx, sy)
    return "".join([*parts, "</svg>"])


def _grid(sx: _Scale, sy: _Scale, x: Axis, y: Axis) -> list[str]:
    parts = []
    for tick in sy.ticks:
        at = sy(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{tick_label(tick)}</text>')
    for tick in sx.ticks:
        at = sx(tick)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{at}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick_label(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.title)}</text>')
    at = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'x="12" y="{at}" text-anchor="middle" transform="rotate(-90 12 {at})"'
    parts.append(f'<text class="axis" {turned}>{escape(y.title)}</text>')
    return parts


def _line(series: Series, style: int, sx: _Scale, sy: _Scale) -> list[str]:
    runs: list[list[tuple[float, float]]] = [[]]
    for px, py in series.points:
        if py is None:
            runs.append([])
        else:
            runs[-1].append((px, py))
    parts = []
    for run in runs:
        if len(run) > 1:
            path = " ".join(f"{sx(px)},{sy(py)}" for px, py in run)
            parts.append(
                f'<polyline class="line s{style % 6}" points="{path}"><title>{escape(series.label)}</title></polyline>'
            )
    for run in runs:
        for px, py in run if series.dots or len(run) == 1 else []:
            told = f"{series.label}: {tick_label(round(px, 4))}, {py:.4g}"
            place = f'cx="{sx(px)}" cy="{sy(py)}" r="3.5"'
            parts.append(f'<circle class="dot s{style % 6}" {place}><title>{escape(told)}</title></circle>')
    return parts


def legend(labels: Sequence[str]) -> str:
    """The series' names with their colours, as HTML above a plot."""
    items = "".join(
        f'<span class="key"><i class="swatch s{i % 6}"></i>{escape(label)}</span>' for i, label in enumerate(labels)
    )
    return f'<div class="legend">{items}</div>'


class Ratio(msgspec.Struct, frozen=True):
    """A ratio with its interval, and how far the baseline moves by itself."""

    value: float
    low: float
    high: float
    floor: float | None
    verdict: str


def reach_of(ratios: Sequence[Ratio]) -> float:
    """The half-width, in logarithms, of a scale that holds all ratios and floors."""
    ends = [abs(math.log(v)) for r in ratios for v in (r.value, r.low, r.high) if v > 0]
    return 1.1 * max([0.05, *ends, *(math.log1p(r.floor) for r in ratios if r.floor)])


def ratio_bar(shown: Ratio, reach: float) -> str:
    """One line of a forest plot: the ratio's interval on a log scale around 1, the noise floor as a band."""
    ratio, low, high, floor, verdict = msgspec.structs.astuple(shown)

    def at(value: float) -> float:
        return round(100 + 95 * max(-1.0, min(1.0, math.log(value) / reach)), 1)

    band = ""
    if floor:
        left, right = at(1 / (1 + floor)), at(1 + floor)
        size = f'x="{left}" y="3" width="{round(right - left, 1)}" height="18"'
        band = f'<rect class="floor" {size}><title>noise floor</title></rect>'
    kind = verdict.replace(" ", "-")
    told = f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
    return (
        f'<svg viewBox="0 0 200 24" class="ratio" role="img" aria-label="{told}">{band}'
        '<line class="one" x1="100" x2="100" y1="1" y2="23"/>'
        f'<line class="span v-{kind}" x1="{at(low)}" x2="{at(high)}" y1="12" y2="12"/>'
        f'<circle class="mark v-{kind}" cx="{at(ratio)}" cy="12" r="4.5"><title>{told}</title></circle></svg>'
    )
