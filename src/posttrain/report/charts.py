"""Small SVG charts as strings. Colours and fonts are the page's CSS classes, so they follow dark mode and print.

Every chart is an `img` to assistive technology, with a title and a description that says what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from markupsafe import Markup, escape

from posttrain.report.text import number, plain, visible

Point = tuple[float, float]


class Mark(NamedTuple):
    """A stage's place in `by_stage`; `value` is None where nothing was measured."""

    label: str
    value: float | None
    interval: tuple[float, float] | None = None
    parent: int | None = None
    """Index of the mark it started from."""


def _svg(width: int, height: int, title: str, description: str, parts: Sequence[str]) -> Markup:
    head = f"<title>{escape(visible(title))}</title><desc>{escape(visible(description))}</desc>"
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img">{head}{"".join(parts)}</svg>')


def _text(x: float, y: float, content: str, css: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{escape(visible(content))}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _path(points: Sequence[Point], css: str) -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{css}"/>'


def ticks(low: float, high: float, count: int = 3) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) that reach over low..high."""
    if not high > low:
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def noisy(values: Sequence[float]) -> bool:
    """Whether a line through the values goes up and down more than it goes anywhere."""
    travelled = sum(abs(b - a) for a, b in pairwise(values))
    return len(values) >= 12 and travelled > 3 * (max(values) - min(values)) > 0


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving mean over about a tenth of the series; the window shrinks at the ends."""
    reach = max(2, len(values) // 20)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def thinned(points: Sequence[Point], keep: int = 400) -> list[Point]:
    """At most about `keep` points, lowest and highest of each bin, so that no spike is lost."""
    if len(points) <= keep:
        return list(points)
    size = math.ceil(2 * len(points) / keep)
    bins = (points[i : i + size] for i in range(0, len(points), size))
    return [p for chunk in bins for p in sorted({min(chunk, key=lambda q: q[1]), max(chunk, key=lambda q: q[1])})]


def curve(title: str, series: Mapping[str, Sequence[Point]]) -> Markup:
    """One panel of a stage's progress: a line for each series of (step, value); NaN and infinity break the line.

    Noisy series are drawn light, with their moving mean over them.
    """
    width, height, left, right, top, bottom = 300, 132, 46, 292, 8, 112
    finite = [p for points in series.values() for p in points if math.isfinite(p[1])]
    if not finite:
        return _svg(width, height, title, "no finite value", [_text(150, 66, "no finite value", "mid")])
    first, last = min(p[0] for p in finite), max(p[0] for p in finite)
    marks = ticks(min(p[1] for p in finite), max(p[1] for p in finite))

    def place(point: Point) -> Point:
        x = left + (right - left) * ((point[0] - first) / (last - first) if last > first else 0.5)
        return x, bottom - (bottom - top) * (point[1] - marks[0]) / (marks[-1] - marks[0])

    parts, said = [], []
    for mark in marks:
        y = place((first, mark))[1]
        parts += [_line(left, y, right, y, "grid"), _text(left - 6, y + 3.5, plain(mark), "end")]
    parts += [_text(left, height - 4, f"step {plain(first)}", "start"), _text(right, height - 4, plain(last), "end")]
    for index, (name, points) in enumerate(series.items()):
        whole = [p for p in points if math.isfinite(p[1])]
        if not whole:
            continue
        rough = noisy([v for _, v in whole])
        for good, run in groupby(points, key=lambda p: math.isfinite(p[1])):
            chunk = thinned(list(run)) if good else []
            if len(chunk) == 1:
                x, y = place(chunk[0])
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" class="dot s{index}"/>')
            elif chunk:
                parts.append(_path([place(p) for p in chunk], f"line s{index}{' raw' if rough else ''}"))
        if rough:
            means = smoothed([v for _, v in whole])
            trend = [(step, mean) for (step, _), mean in zip(whole, means, strict=True)]
            parts.append(_path([place(p) for p in thinned(trend)], f"line s{index}"))
        values = [v for _, v in whole]
        said.append(
            f"{name}: first {number(values[0])}, last {number(values[-1])}, "
            f"lowest {number(min(values))}, highest {number(max(values))}"
            + (f", {len(points) - len(whole)} steps not finite" if len(whole) < len(points) else "")
        )
    return _svg(width, height, title, "; ".join(said), parts)


def by_stage(title: str, marks: Sequence[Mark], scale: Sequence[float], write: Callable[[float], str]) -> Markup:
    """Value and interval at the base and after each stage, joined to where each stage started.

    `scale` is the axis: its ticks, from bottom to top.
    """
    width, height, left, top, bottom = max(320, 66 * len(marks) + 60), 208, 48, 20, 172
    slot = (width - left - 8) / len(marks)
    x = [left + slot * (i + 0.5) for i in range(len(marks))]

    def y(value: float) -> float:
        share = (value - scale[0]) / (scale[-1] - scale[0])
        return bottom - (bottom - top) * min(1.0, max(0.0, share))

    parts, said = [], []
    for tick in scale:
        parts += [_line(left, y(tick), width - 8, y(tick), "grid"), _text(left - 7, y(tick) + 4, plain(tick), "end")]
    for i, mark in enumerate(marks):
        parent = marks[mark.parent] if mark.parent is not None else None
        if mark.value is not None and parent is not None and parent.value is not None:
            parts.append(_line(x[mark.parent or 0], y(parent.value), x[i], y(mark.value), "line s0 link"))
    for i, mark in enumerate(marks):
        label = mark.label if len(mark.label) <= 10 else mark.label[:9] + "…"
        parts.append(_text(x[i], height - 14, label, "mid name"))
        if mark.value is None:
            parts.append(_text(x[i], bottom - 6, "not measured", "mid"))
            said.append(f"{mark.label}: not measured")
            continue
        low, high = mark.interval or (mark.value, mark.value)
        parts += [_line(x[i], y(low), x[i], y(high), "whisker s0")]
        parts += [_line(x[i] - 4, y(end), x[i] + 4, y(end), "whisker s0") for end in (low, high)]
        parts.append(f'<circle cx="{x[i]:.1f}" cy="{y(mark.value):.1f}" r="4.5" class="dot s0"/>')
        above = y(high) - 7
        parts.append(_text(x[i], above if above > 12 else y(low) + 15, write(mark.value), "mid value"))
        said.append(
            f"{mark.label}: {write(mark.value)}"
            + (f" (95 % interval {write(low)} to {write(high)})" if mark.interval else ", without an interval")
        )
    return _svg(width, height, title, "; ".join(said), parts)


def difference(title: str, diff: float, interval: tuple[float, float], limit: float, css: str) -> Markup:
    """A difference and its interval about zero, on the scale -limit..limit."""
    width, height = 132, 18

    def x(value: float) -> float:
        return width / 2 + (width / 2 - 6) * max(-1.0, min(1.0, value / limit if limit else 0.0))

    parts = [
        _line(width / 2, 0, width / 2, height, "zero"),
        _line(x(interval[0]), 9, x(interval[1]), 9, f"whisker {css}"),
        f'<circle cx="{x(diff):.1f}" cy="9" r="4" class="dot {css}"/>',
    ]
    return _svg(width, height, title, "dot: difference; line: its 95 % interval; upright line: no difference", parts)


def bars(title: str, values: Mapping[str, float], write: Callable[[float], str]) -> Markup:
    """A bar for each named value, from a common zero."""
    row, left, right = 14, 92, 244
    low, high = min(0.0, *values.values()), max(0.0, *values.values())

    def x(value: float) -> float:
        return left + (right - left) * ((value - low) / (high - low) if high > low else 0.0)

    parts = []
    for i, (name, value) in enumerate(values.items()):
        start, stop, y = min(x(0), x(value)), max(x(0), x(value)), 4 + row * i
        parts += [
            _text(left - 6, y + 9, name, "end"),
            f'<rect x="{start:.1f}" y="{y}" width="{stop - start:.1f}" height="9" class="fill"/>',
            _text(max(stop, left) + 5, y + 9, write(value), "start"),
        ]
    said = "; ".join(f"{name}: {write(value)}" for name, value in values.items())
    return _svg(300, 8 + row * len(values), title, said, parts)


def bar(title: str, share: float) -> Markup:
    """A share of a whole, as a bar."""
    parts = [
        '<rect x="0" y="3" width="100" height="6" rx="3" class="rail"/>',
        f'<rect x="0" y="3" width="{100 * min(1.0, max(0.0, share)):.1f}" height="6" rx="3" class="fill"/>',
    ]
    return _svg(100, 12, title, "share of the whole", parts)
