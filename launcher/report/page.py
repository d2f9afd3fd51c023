"""Pure: histories of runs -> one HTML page that needs nothing else, no network and no other file.

The page may run its own script and nothing else: its content security policy forbids every request. All that comes
from a run is escaped by jinja2, as text or as JSON inside a script.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from samestep.launcher.report import tables
from samestep.launcher.report.chart import AXES, time_unit
from samestep.launcher.report.figures import charts, colour
from samestep.launcher.report.history import History

_HERE = Path(__file__).parent


def render(histories: Sequence[History], plotly_js: str) -> Iterator[str]:
    """The page in pieces; `plotly_js` is the text of plotly.min.js."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    drawn = charts(histories)
    unit = time_unit(histories)
    labels = ("optimizer step", "samples", f"{unit.name} since the start")
    data = {
        "charts": [asdict(chart) for chart in drawn],
        "axes": dict(zip(AXES, labels, strict=True)),
        "timeUnit": unit.seconds,
        "timeLabel": labels[2],
    }
    return environment.get_template("page.html").generate(
        title=" · ".join(history.name for history in histories),
        runs=[_run(history, position) for position, history in enumerate(histories)],
        charts=drawn,
        verdicts=tables.verdicts(histories),
        settings=tables.settings(histories),
        data=_as_script(data),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704 (our own file)
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),  # noqa: S704 (our own file)
        plotly=Markup(plotly_js),  # noqa: S704 (the installed package's own file)
    )


def _run(history: History, position: int) -> dict[str, Any]:
    return {
        "name": history.name,
        "colour": colour(position),
        "facts": tables.facts(history),
        "digest": tables.digest(history),
        "status": history.status,
        "happened": tables.happened(history),
    }


def _as_script(data: Any) -> Markup:
    """JSON in which nothing can end a script element or begin a comment; NaN must not get this far."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&'":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 (every sign that HTML knows is escaped above)
