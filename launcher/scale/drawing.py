"""The plan as a picture: four small line charts in one SVG that needs nothing else, or the same inside a page.

Drawn by hand as XML: what plots on servers without a browser (matplotlib) is larger than the whole launcher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from samestep.launcher.contract import UsageError
from samestep.launcher.scale.predict import Prediction

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 460, 260, 62, 40, 16, 40
_PREFIX = {-1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T"}
_STYLE = """
svg { background: #fff; font: 12px system-ui, sans-serif; fill: #222 }
.grid { stroke: #ddd } .line { fill: none; stroke: #1864ab; stroke-width: 2 } .point { fill: #1864ab }
.title { font-weight: 600 } .quiet { fill: #666 }
@media (prefers-color-scheme: dark) {
  svg { background: #16181c; fill: #eee } .grid { stroke: #333 } .line { stroke: #74c0fc } .point { fill: #74c0fc }
  .quiet { fill: #aaa }
}
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: its `value` of every row, on a logarithmic axis or from 0 to 1."""

    title: str
    value: Callable[[Prediction], float]
    logarithmic: bool = False


PANELS = (
    Panel("Samples a second", lambda row: row.samples_per_s, logarithmic=True),
    Panel("Efficiency against one rank", lambda row: row.efficiency),
    Panel("Communication that nothing hides, share of a step", lambda row: row.exposed / row.step),
    Panel("Goodput with the best checkpoint interval", lambda row: row.goodput),
)


def write(path: Path, rows: Sequence[Prediction], title: str) -> None:
    """Make `path`, an .svg or .html.

    Raises:
        UsageError: the file can't be written.
    """
    svg = ET.tostring(drawing(rows, title), encoding="unicode")
    page = f'<!doctype html><meta charset="utf-8"><title>samestep plan</title>{svg}\n'
    try:
        path.write_text(page if path.suffix == ".html" else svg + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"--plot is expected to be writable, but {path}: {error.strerror}",
            f"name a file where you may write: --plot plan{path.suffix}",
        ) from None


def drawing(rows: Sequence[Prediction], title: str) -> ET.Element:
    """The whole picture."""
    width, height = 2 * _WIDTH, 2 * _HEIGHT + 30
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}", "role": "img"}
    root = ET.Element("svg", attributes)
    ET.SubElement(root, "style").text = _STYLE
    _text(root, 12, 20, title, "quiet")
    for number, panel in enumerate(PANELS):
        place = f"translate({number % 2 * _WIDTH} {30 + number // 2 * _HEIGHT})"
        _draw(ET.SubElement(root, "g", {"transform": place}), panel, rows)
    return root


def _draw(group: ET.Element, panel: Panel, rows: Sequence[Prediction]) -> None:
    values = [panel.value(row) for row in rows]
    low, high = (0.0, 1.0) if not panel.logarithmic else _decades(values)
    first, last = math.log2(rows[0].ranks), math.log2(rows[-1].ranks)

    def x(ranks: int) -> float:
        share = (math.log2(ranks) - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        place = math.log10(value) if panel.logarithmic else min(value, 1.0)
        return _HEIGHT - _BOTTOM - (place - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    _text(group, 12, 22, panel.title, "title")
    for mark, label in _marks(low, high, logarithmic=panel.logarithmic):
        height = _HEIGHT - _BOTTOM - (mark - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        ends = {"x1": f"{_LEFT}", "x2": f"{_WIDTH - _RIGHT}", "y1": f"{height:.1f}", "y2": f"{height:.1f}"}
        ET.SubElement(group, "line", ends | {"class": "grid"})
        _text(group, _LEFT - 6, height + 4, label, "quiet", "end")
    every = max(1, math.ceil(len(rows) / 6))
    for row in rows[::every]:
        _text(group, x(row.ranks), _HEIGHT - _BOTTOM + 16, f"{row.ranks}", "quiet", "middle")
    _text(group, _WIDTH / 2, _HEIGHT - 8, "ranks", "quiet", "middle")
    points = [(x(row.ranks), y(value)) for row, value in zip(rows, values, strict=True)]
    line = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
    ET.SubElement(group, "polyline", {"points": line, "class": "line"})
    for (left, top), row, value in zip(points, rows, values, strict=True):
        point = ET.SubElement(group, "circle", {"cx": f"{left:.1f}", "cy": f"{top:.1f}", "r": "3", "class": "point"})
        ET.SubElement(point, "title").text = f"{row.ranks} ranks: {value:.4g}"


def _decades(values: Sequence[float]) -> tuple[float, float]:
    low = math.floor(math.log10(min(values)))
    return low, max(low + 1, math.ceil(math.log10(max(values))))


def _marks(low: float, high: float, *, logarithmic: bool) -> list[tuple[float, str]]:
    """Where the grid's lines are, and what stands at them: quarters, or powers of ten with a prefix of the SI."""
    if not logarithmic:
        return [(step / 4, f"{step / 4:.0%}") for step in range(5)]
    powers = range(int(low), int(high) + 1, max(1, math.ceil((high - low) / 5)))
    return [(power, f"{10 ** (power % 3)} {_PREFIX.get(power // 3, f'e{power // 3 * 3}')}".strip()) for power in powers]


def _text(parent: ET.Element, x: float, y: float, text: str, kind: str, anchor: str = "start") -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": kind, "text-anchor": anchor}
    ET.SubElement(parent, "text", place).text = text
