"""Charts are well-formed, show their values, and suit light and dark pages."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from sharded_milter.sizing.svg import HEIGHT, LINE_HEIGHT, WIDTH, Chart, Line

SVG = "{http://www.w3.org/2000/svg}"
CHART = Chart(
    "Messages < a second",
    "a note",
    "workers",
    ["1", "2", "4"],
    [Line("ours & best", [100, 200, 400]), Line("flat", [120] * 3, flat=True)],
)


def parsed(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(chart.svg())


def points(chart: Chart) -> dict[str, list[tuple[float, float]]]:
    """By the line's classes."""
    return {
        line.attrib["class"]: [
            (float(x), float(y))
            for x, y in (point.split(",") for point in line.attrib["points"].split())
        ]
        for line in parsed(chart).iter(f"{SVG}polyline")
    }


def test_texts_are_there_and_escaped() -> None:
    texts = ["".join(text.itertext()) for text in parsed(CHART).iter(f"{SVG}text")]
    for text in ("Messages < a second", "a note", "workers", "4", "ours & best 400", "flat 120"):
        assert text in texts


@pytest.mark.parametrize("log", [False, True])
def test_higher_values_stand_higher_and_all_stand_inside(log: bool) -> None:
    lines = points(replace(CHART, log=log))
    ours = lines["line c0 ours"]
    assert [y for _, y in ours] == sorted((y for _, y in ours), reverse=True)
    assert [x for x, _ in ours] == sorted(x for x, _ in ours)
    for line in lines.values():
        assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in line)


def test_a_logarithmic_axis_gives_equal_ratios_equal_steps() -> None:
    (_, one), (_, two), (_, three) = points(replace(CHART, log=True))["line c0 ours"]
    assert one - two == pytest.approx(two - three, abs=0.2)


def test_flat_lines_are_dashed_and_have_no_points() -> None:
    assert "line c1 flat" in points(CHART)
    assert len(list(parsed(CHART).iter(f"{SVG}circle"))) == 3


def test_names_do_not_run_into_each_other() -> None:
    chart = replace(CHART, lines=[Line(f"n{n}", [1.0, 1.0, 1.0 + n / 1000]) for n in range(6)])
    names = [text for text in parsed(chart).iter(f"{SVG}text") if "name" in text.get("class", "")]
    heights = sorted(float(name.attrib["y"]) for name in names)
    assert all(below - above >= LINE_HEIGHT - 0.1 for above, below in pairwise(heights))


def test_colours_follow_the_readers_preference() -> None:
    style = parsed(CHART).find(f"{SVG}style")
    assert style is not None
    light, query, dark = str(style.text).partition("@media (prefers-color-scheme: dark)")
    assert query
    for name in (".page", ".title", ".c0", ".f5"):
        assert name in light
        assert name in dark
