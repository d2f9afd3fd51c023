"""Pure: histories of runs -> the charts of a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from samestep.launcher.report.chart import Chart, chunks, extremes, plain, short, thin, time_unit
from samestep.launcher.report.history import BESIDE, BETWEEN, PHASES, STEP_COLUMNS, History
from samestep.launcher.report.thinning import Bucket, Position

RUN_COLOURS = ("#3b7dd8", "#e0762c", "#2a9d6f", "#c2498f", "#8a63d2", "#b8890b", "#1798a8", "#d14b4b")
BESIDE_COLOURS = {"between steps": "#9aa3ad", "evaluation": "#46b3c4", "checkpoint": "#8d6e53"}
PHASE_COLOURS = dict(zip(PHASES, ("#e0a526", "#3b7dd8", "#6a5acd", "#d95f6a", "#2a9d6f"), strict=True))
FAILURE = "#d8373e"
_SMOOTH, _AREA = 120, 200  # points of a smooth line, of a stacked area


def charts(histories: Sequence[History]) -> list[Chart]:
    """All charts that have something to show, in the order of the page."""
    found = [_loss(histories)]
    found += [_points(histories, group, name) for group, name in _scalars(histories)]
    found += [_timeline(histories), _throughput(histories)]
    found += [_memory(histories, kind) for kind in ("host memory", "device memory")]
    for history in histories:
        found += [_phases(history, many=len(histories) > 1), _ranks(history, many=len(histories) > 1)]
    return [chart for chart in found if chart.data]


def colour(position: int) -> str:
    """Of the run at a position of the command line."""
    return RUN_COLOURS[position % len(RUN_COLOURS)]


def _column(name: str) -> int:
    return STEP_COLUMNS.index(name)


def _lines(chart: Chart, history: History, position: int, column: int, mean: Callable[[Bucket], float]) -> None:
    """Every step faintly, and above it a smooth line that the legend shows."""
    buckets = history.steps.buckets()
    if not any(bucket.columns[column].finite for bucket in buckets):
        return
    line = {"color": colour(position), "width": 1}
    shared = {"type": "scatter", "mode": "lines", "legendgroup": str(position), "connectgaps": False}
    places, values = extremes(buckets, column)
    smooth = chunks(buckets, _SMOOTH)
    steps = smooth[0].columns[column].finite + smooth[0].columns[column].broken
    if steps == 1:
        chart.add(shared | {"name": history.name, "y": values, "line": line | {"width": 2}}, places)
        return
    hidden = {"showlegend": False, "opacity": 0.35, "hoverinfo": "skip"}
    chart.add(shared | hidden | {"name": f"{history.name}, every step", "y": values, "line": line}, places)
    means = [short(mean(bucket)) for bucket in smooth]
    about = {"hovertemplate": f"%{{y}}<extra>%{{fullData.name}}, mean of {steps} steps</extra>"}
    named = {"name": history.name, "y": means, "line": line | {"width": 2.2}}
    chart.add(shared | named | about, [bucket.last for bucket in smooth])


def _loss(histories: Sequence[History]) -> Chart:
    note = "Faint: every step; of many steps the lowest and highest. Bold: mean. A cross: a loss that was not finite."
    chart = Chart("loss", "Loss", "", note, wide=True, logarithmic=True)
    for position, history in enumerate(histories):
        _lines(chart, history, position, _column("loss"), lambda bucket: bucket.columns[0].mean)
        group = {"legendgroup": str(position), "type": "scatter"}
        evaluated = history.series.get(("eval", "loss"))
        if evaluated is not None:
            places, values = extremes(evaluated.buckets(), 0)
            style = {"mode": "lines+markers", "line": {"color": colour(position), "dash": "dot", "width": 1.5}}
            chart.add(group | style | {"name": f"{history.name}, evaluation", "y": values}, places)
        if history.broken:
            cross = {"symbol": "x", "size": 9, "color": FAILURE}
            chart.add(
                group
                | {"mode": "markers", "marker": cross, "name": f"{history.name}, not finite", "hoverinfo": "x+name"}
                | {"y": [_before(history, place) for place in history.broken]},
                history.broken,
            )
    return chart


def _before(history: History, place: Position) -> float:
    """The mean loss around a step, for a mark that has no value of its own."""
    known = [b.columns[0].mean for b in history.steps.buckets() if b.first.step <= place.step and b.columns[0].finite]
    return float(short(known[-1])) if known else 0.0


def _scalars(histories: Sequence[History]) -> list[tuple[str, str]]:
    keys = {key: None for history in histories for key in history.series if key[0] in ("eval", "extra")}
    return [key for key in keys if key != ("eval", "loss")]


def _points(histories: Sequence[History], group: str, name: str) -> Chart:
    note = "From evaluations." if group == "eval" else "From training steps."
    chart = Chart(f"{group}-{name}", name, "", note, logarithmic=True)
    for position, history in enumerate(histories):
        series = history.series.get((group, name))
        if series is not None:
            places, values = extremes(series.buckets(), 0)
            mode = "lines+markers" if len(values) <= 100 else "lines"
            line = {"color": colour(position), "width": 2}
            chart.add({"type": "scatter", "mode": mode, "name": history.name, "y": values, "line": line}, places)
    return chart


def _throughput(histories: Sequence[History]) -> Chart:
    chart = Chart("throughput", "Throughput", "samples/s", "Samples of a step over the time of its slowest rank.")
    samples, seconds = _column("samples"), _column("seconds")

    def rate(bucket: Bucket) -> float:
        time = bucket.columns[seconds].total
        return bucket.columns[samples].total / time if time else math.nan

    for position, history in enumerate(histories):
        _lines(chart, history, position, _column("rate"), rate)
    chart.layout = {"yaxis": {"rangemode": "tozero"}}
    return chart


def _timeline(histories: Sequence[History]) -> Chart:
    note = (
        "Flat where no step was finished. ● start, ◆ restart, ✕ failure, ▲ warning, ■ stop, ★ end; ticks: checkpoints."
    )
    chart = Chart("timeline", "What happened when", "step", note)
    unit = time_unit(histories)
    for position, history in enumerate(histories):
        ink = colour(position)
        group = {"legendgroup": str(position), "type": "scatter"}
        places = [Position(0, 0, 0.0), *(bucket.last for bucket in history.steps.buckets())]

        def over_time(places: Sequence[Position]) -> dict[str, Any]:
            return {"x": [short(p.seconds / unit.seconds) for p in places], "y": [p.step for p in places]}

        line = {"mode": "lines", "line": {"color": ink, "width": 2, "shape": "hv"}, "name": history.name}
        chart.add(group | line | over_time(places))
        ticks = thin(history.checkpoints)
        if ticks:
            mark = {"symbol": "line-ns-open", "size": 11, "color": ink, "line": {"width": 1.5}}
            text = [f"checkpoint of step {step}" for _, step in ticks]
            few = "checkpoints" if len(ticks) == len(history.checkpoints) else f"{len(ticks)} of its checkpoints"
            chart.add(group | _marks(f"{history.name}, {few}", mark, text) | over_time([place for place, _ in ticks]))
        for kind, moments in groupby(sorted(history.moments, key=lambda m: m.kind), key=lambda m: m.kind):
            if kind in SYMBOLS:
                word, symbol, tint = SYMBOLS[kind]
                these = list(moments)
                mark = {"symbol": symbol, "size": 11, "color": tint or ink}
                text = [f"{word}: {plain(moment.text)}" for moment in these]
                marks = group | _marks(f"{history.name}, {word}", mark, text)
                chart.add(marks | over_time([moment.at for moment in these]))
    return chart


SYMBOLS = {
    "run_started": ("start", "circle", ""),
    "restarted": ("restart", "diamond", "#e0a526"),
    "worker_failed": ("failure", "x", FAILURE),
    "preempted": ("stop", "square", ""),
    "run_finished": ("end", "star", ""),
    "warning": ("warning", "triangle-up", "#e0a526"),
}


def _marks(name: str, mark: dict[str, Any], text: list[str]) -> dict[str, Any]:
    hover = {"text": text, "hovertemplate": "%{text}<extra></extra>"}
    return {"mode": "markers", "marker": mark, "name": name, "showlegend": False} | hover


def _phases(history: History, *, many: bool) -> Chart:
    title = "Step time by phase" + (f": {history.name}" if many else "")
    note = "Mean of the ranks. Dotted: if every phase took as long as on its slowest rank."
    chart = Chart(f"phases-{history.name}", title, "ms a step", note)
    areas = chunks(history.steps.buckets(), _AREA)
    if not areas:
        return chart
    places = [bucket.last for bucket in areas]
    for phase in PHASES:
        means = [short(1000 * bucket.columns[_column(f"{phase} mean")].mean) for bucket in areas]
        style = {"stackgroup": "mean", "mode": "lines", "line": {"width": 0.5, "color": PHASE_COLOURS[phase]}}
        look = {"fillcolor": PHASE_COLOURS[phase] + "b0", "hovertemplate": "%{y:.3g} ms<extra>%{fullData.name}</extra>"}
        chart.add({"type": "scatter", "name": phase, "y": means} | style | look, places)
    columns = [_column(f"{phase} max") for phase in PHASES]
    highest = [short(1000 * sum(bucket.columns[column].mean for column in columns)) for bucket in areas]
    line = {"dash": "dot", "width": 1.3, "color": FAILURE}
    chart.add({"type": "scatter", "mode": "lines", "name": "longest of each phase", "y": highest, "line": line}, places)
    return chart


def _ranks(history: History, *, many: bool) -> Chart:
    ranks = history.ranks
    title = "Step time by rank" + (f": {history.name}" if many else "")
    note = f"Mean since step {ranks.since_step}, {ranks.world_size} ranks. Hover: how often a rank took longest"
    note += "; in sync, it waits for others. Evaluations (own work) and checkpoints are spread over all steps."
    chart = Chart(f"ranks-{history.name}", title, "ms a step", note, layout={"barmode": "stack"})
    chart.layout["xaxis"] = {"type": "category"}
    all_steps = sum(ranks.slowest[PHASES[0], rank] for rank in range(ranks.world_size))
    names = [f"rank {number}" for number in range(ranks.world_size)]
    for phase in PHASES if ranks.steps and all_steps else ():
        sums = ranks.seconds[phase]
        often = [f"{100 * ranks.slowest[phase, rank] / all_steps:.0f}%" for rank in range(len(sums))]
        hover = "%{y:.3g} ms, longest in %{customdata} of the steps<extra>" + phase + "</extra>"
        bar = {"type": "bar", "name": phase, "marker": {"color": PHASE_COLOURS[phase]}, "hovertemplate": hover}
        chart.add(bar | {"x": names, "y": _milliseconds(sums, ranks.steps), "customdata": often})
    for (name, ink), key in zip(BESIDE_COLOURS.items(), (BETWEEN, *BESIDE), strict=True):
        if ranks.steps and any(ranks.seconds.get(key, ())):
            hover = "%{y:.3g} ms<extra>" + name + "</extra>"
            bar = {"type": "bar", "name": name, "marker": {"color": ink}, "hovertemplate": hover}
            chart.add(bar | {"x": names, "y": _milliseconds(ranks.seconds[key], ranks.steps)})
    return chart


def _milliseconds(sums: Sequence[float], steps: int) -> list[Any]:
    return [short(1000 * total / steps) for total in sums]


def _memory(histories: Sequence[History], kind: str) -> Chart:
    chart = Chart(kind.replace(" ", "-"), f"Peak {kind}", "GiB", "The most that a rank has held since its start.")
    chart.layout = {"yaxis": {"rangemode": "tozero"}}
    for position, history in enumerate(histories):
        names = [name for group, name in history.series if group == kind]
        for number, name in enumerate(names):
            places, values = extremes(history.series[kind, name].buckets(), 0)
            ink = colour(position) if len(histories) > 1 else colour(number)
            line = {"color": ink, "width": 2, "shape": "hv", "dash": ("solid", "dash", "dot", "dashdot")[number % 4]}
            label = f"{history.name}, {name}" if len(histories) > 1 else name
            held = [None if value is None else short(value / 2**30) for value in values]
            chart.add({"type": "scatter", "mode": "lines", "name": label, "y": held, "line": line}, places)
    return chart
