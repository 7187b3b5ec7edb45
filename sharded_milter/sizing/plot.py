"""A scaling curve for a terminal. PURE."""

from __future__ import annotations

from collections.abc import Mapping

# Eighths of a character cell.
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_FULL, _IDEAL = _EIGHTHS[-1], "┊"


def curve(rates: Mapping[int, float], *, width: int, marked: int, ascii_only: bool) -> list[str]:
    """Return a line for each number of workers: a bar in proportion to its rate, and the rate.

    Lines have at most `width` columns. A mark shows the rate with linear scaling from the first
    number, if it fits. An arrow points to the number `marked`.
    """
    counts = [str(workers) for workers in rates]
    figures = [f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates.values()]
    label, figure = max(map(len, counts)), max(map(len, figures))
    arrow = " <-" if ascii_only else " ◀"
    room = max(1, width - label - figure - 2 - len(arrow))
    best = max(rates.values()) or 1.0
    first = next(iter(rates))
    lines = []
    for workers, count, text in zip(rates, counts, figures, strict=True):
        ideal = rates[first] * workers / first
        bar = _bar(rates[workers] / best, ideal / best, room, ascii_only)
        lines.append(f"{count:>{label}} {bar} {text:>{figure}}{arrow * (workers == marked)}")
    return lines


def _bar(share: float, ideal: float, room: int, ascii_only: bool) -> str:
    full, mark = ("#", "|") if ascii_only else (_FULL, _IDEAL)
    eighths = round(8 * share * room)
    bar = full * (eighths // 8)
    if eighths % 8 and not ascii_only:
        bar += _EIGHTHS[eighths % 8]
    at = round(ideal * room)
    if len(bar) < at <= room:
        bar = bar.ljust(at - 1) + mark
    return bar.ljust(room)
