"""Line charts as SVG, readable on light and dark pages, without a plotting library.

The name of a line is written at its end, so that a reader need not match colours with a legend.
Colours are CSS classes, with lighter shades for readers who prefer dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 176, 76, 56

# Pixels: the least distance of two names.
LINE_HEIGHT = 17

# Hues that colour-blind readers can tell apart, as (light page, dark page). The first is ours.
COLOURS = (
    ("#2a78d6", "#5598e7"),
    ("#d9541e", "#f0803f"),
    ("#178f6a", "#2fbf93"),
    ("#8a5cd1", "#a98bea"),
    ("#b07a00", "#e0a82e"),
    ("#c2417f", "#ec7fae"),
)

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #3d3d3a; }
.title { font-size: 17px; font-weight: 600; fill: #141413; }
.note { fill: #6b6a64; }
.page { fill: #ffffff; }
.grid { stroke: #e4e3dd; }
.axis { stroke: #9a9992; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.ours { stroke-width: 3.5; }
.flat { stroke-dasharray: 5 4; }
.name { font-weight: 600; }
"""
_DARK = """
text { fill: #c9c8c0; }
.title { fill: #f5f4ee; }
.note { fill: #a09f97; }
.page { fill: #1c1c1a; }
.grid { stroke: #34332f; }
.axis { stroke: #77766f; }
"""


@dataclass(frozen=True)
class Line:
    """A name and a value for each step of the x axis. `flat` draws it dashed, without points."""

    name: str
    values: Sequence[float]
    flat: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart whose x axis has equal steps. `log` makes the y axis logarithmic."""

    title: str
    note: str
    x_title: str
    steps: Sequence[str]
    lines: Sequence[Line]
    log: bool = False

    def svg(self) -> str:
        """Return the SVG file."""
        scale = _scale([value for line in self.lines for value in line.values], self.log)
        parts = [*self._frame(), *self._axes(scale), *self._lines(scale), "</svg>", ""]
        return "\n".join(parts)

    def _frame(self) -> list[str]:
        summary = f"{self.title}. {self.note}"
        return [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
            f' aria-label="{escape(summary)}">',
            f"<style>{_STYLE}{_shades(0)}",
            f"@media (prefers-color-scheme: dark) {{{_DARK}{_shades(1)}}}</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
            f'<text class="title" x="20" y="32">{escape(self.title)}</text>',
            f'<text class="note" x="20" y="53">{escape(self.note)}</text>',
        ]

    def _x(self, step: int) -> float:
        room = WIDTH - LEFT - RIGHT
        return LEFT + room * step / max(1, len(self.steps) - 1)

    def _axes(self, scale: _Scale) -> list[str]:
        end, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for tick in scale.ticks:
            y = scale.y(tick)
            parts += [
                f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>',
                f'<text class="note" text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}">'
                f"{_number(tick)}</text>",
            ]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{end}" y1="{bottom}" y2="{bottom}"/>')
        parts += [
            f'<text class="note" text-anchor="middle" x="{self._x(at):.1f}" y="{bottom + 20}">'
            f"{escape(step)}</text>"
            for at, step in enumerate(self.steps)
        ]
        middle = (LEFT + end) / 2
        parts.append(
            f'<text text-anchor="middle" x="{middle:.0f}" y="{bottom + 42}">'
            f"{escape(self.x_title)}</text>"
        )
        return parts

    def _lines(self, scale: _Scale) -> list[str]:
        names = _spread([scale.y(line.values[-1]) for line in self.lines])
        parts = []
        # The first is drawn last, on top of the others.
        for index, line in reversed(list(enumerate(self.lines))):
            points = [(self._x(at), scale.y(value)) for at, value in enumerate(line.values)]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            colour = f"c{index % len(COLOURS)}"
            kind = ("" if index else " ours") + (" flat" if line.flat else "")
            parts.append(f'<polyline class="line {colour}{kind}" points="{path}"/>')
            if not line.flat:
                parts += [
                    f'<circle class="f{index % len(COLOURS)}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
                    f"<title>{escape(line.name)}, {escape(step)}: {_number(value)}</title></circle>"
                    for (x, y), step, value in zip(points, self.steps, line.values, strict=True)
                ]
            label = f"{escape(line.name)} {_number(line.values[-1])}"
            parts.append(
                f'<text class="name f{index % len(COLOURS)}" x="{WIDTH - RIGHT + 12}"'
                f' y="{names[index] + 4:.1f}">{label}</text>'
            )
        return parts


@dataclass(frozen=True)
class _Scale:
    """Converts values to y coordinates."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool

    def y(self, value: float) -> float:
        place = math.log if self.log else float
        low, high = place(self.low), place(self.high)
        share = (place(max(value, self.low)) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _scale(values: Sequence[float], log: bool) -> _Scale:
    if not log:
        step = _step(max(values) or 1.0)
        count = math.ceil((max(values) or 1.0) / step)
        return _Scale(0, count * step, [step * n for n in range(count + 1)], log)
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    every = [10.0**decade * digit for decade in decades for digit in (1, 2, 5)]
    low = max((tick for tick in every if tick <= min(values)), default=every[0])
    high = min(tick for tick in [*every, 10 * every[-1]] if tick > max(values))
    return _Scale(low, high, [tick for tick in every if low <= tick <= high], log)


def _step(highest: float) -> float:
    """Return a round number that divides the axis into about five parts."""
    rough = highest / 5
    decade: float = 10.0 ** math.floor(math.log10(rough))
    return next(decade * digit for digit in (1, 2, 2.5, 5, 10) if decade * digit >= rough)


def _spread(heights: Sequence[float]) -> list[float]:
    """Return the y coordinates of the names: near their lines, at least LINE_HEIGHT apart."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=lambda index: placed[index])
    for above, below in pairwise(order):
        placed[below] = max(placed[below], placed[above] + LINE_HEIGHT)
    lowest = float(HEIGHT - BOTTOM)
    for below in reversed(order):
        placed[below] = min(placed[below], lowest)
        lowest = placed[below] - LINE_HEIGHT
    return placed


def _shades(mode: int) -> str:
    return "".join(
        f".c{index} {{ stroke: {shades[mode]}; }} .f{index} {{ fill: {shades[mode]}; }}\n"
        for index, shades in enumerate(COLOURS)
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
