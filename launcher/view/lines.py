"""Pure: how a run stands, and the width of the screen -> the lines of the display."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

from samestep.launcher.view.standing import Standing

_SHORT = {"data": "data", "forward": "fwd", "backward": "bwd", "sync": "sync", "optimizer": "opt"}
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # ECMA-48: a control sequence, such as a colour
_LEAST_BAR, _LONGEST_BAR = 8, 40


class Part(NamedTuple):
    """A fact of the display; the short form is taken where the long ones don't fit."""

    long: str
    short: str
    style: str = ""


def display(standing: Standing, width: int, *, running: bool = True, plain_bar: bool = False) -> list[Text]:
    """At most three lines of at most `width` cells; `plain_bar` is of ASCII alone."""
    if standing.step == 0 and standing.status == "starting" and running:
        return [_cut(Text("starting, no step yet", "dim"), width)]
    first = _progress(standing, running=running)
    bar_width = min(_LONGEST_BAR, width - sum(len(part.long) + 2 for part in first) - 1)
    if standing.total and bar_width < _LEAST_BAR:
        bar_width = min(_LONGEST_BAR, width - sum(len(part.short) + 2 for part in first) - 1)
    lines = [fit(first, width, _bar(standing, bar_width, plain=plain_bar) if standing.total else None)]
    costs = _costs(standing)
    if costs:
        lines.append(fit(costs, width))
    ending = _ending(standing, running=running)
    if ending is not None:
        lines.append(_cut(ending, width))
    return lines


def one_line(standing: Standing, *, running: bool = True) -> str:
    """All of it in one line, for a file or a pipe."""
    parts = [*_progress(standing, running=running), *_costs(standing)]
    ending = _ending(standing, running=running)
    words = [part.long for part in parts] if standing.step else ["starting, no step yet"] if running else []
    return ", ".join([*words, *([ending.plain] if ending is not None else [])])


def fit(parts: Sequence[Part], width: int, bar: Text | None = None) -> Text:
    """The parts in one line: in long words, else in short ones, else without the last ones."""
    begin = bar.cell_len + 2 if bar is not None and bar.cell_len else 0
    form = "long" if begin + sum(len(part.long) + 2 for part in parts) - 2 <= width else "short"
    line = Text(no_wrap=True)
    if bar is not None and bar.cell_len:
        line.append_text(bar)
    for part in parts:
        words = part.long if form == "long" else part.short
        gap = 2 if line.cell_len else 0
        if line.cell_len + gap + len(words) <= width:
            line.append(" " * gap).append(words, part.style)
    return line


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="crop")
    return line


def _bar(standing: Standing, width: int, *, plain: bool) -> Text:
    if width < _LEAST_BAR:
        return Text()
    done = min(1.0, standing.step / standing.total) if standing.total else 0.0
    full = math.floor(width * done)
    mark, rest = ("#", "-") if plain else ("━", "━")
    style = "red" if standing.status == "failed" else "green" if standing.status == "finished" else "cyan"
    return Text(mark * full, style).append(rest * (width - full), "bright_black")


def _progress(standing: Standing, *, running: bool) -> list[Part]:
    of_total = f"/{standing.total}" if standing.total else ""
    parts = [Part(f"step {standing.step}{of_total}", f"{standing.step}{of_total}", "bold")]
    if standing.epoch:
        of_epochs = f"/{standing.epochs}" if standing.epochs else ""
        parts.append(Part(f"epoch {standing.epoch}{of_epochs}", f"epoch {standing.epoch}{of_epochs}"))
    if standing.stepped:
        bad = standing.loss is None or not math.isfinite(standing.loss)
        words = "loss not finite" if bad else f"loss {standing.loss:.4g}"
        parts.append(Part(words, words, "bold red" if bad else ""))
    speed = standing.samples_per_s
    if speed is not None:
        parts.append(Part(f"{count(speed)} samples/s", f"{count(speed)}/s"))
    left = standing.remaining
    if left is not None and standing.status == "training" and running:
        parts.append(Part(f"ETA {clock(left)}", f"ETA {clock(left)}"))
    return parts


def _costs(standing: Standing) -> list[Part]:
    parts = []
    shares = standing.shares
    if shares:
        long, short = (
            " ".join(f"{names.get(phase, phase)} {100 * share:.0f}%" for phase, share in shares.items())
            for names in ({}, _SHORT)
        )
        parts.append(Part(long, short.replace("% ", " "), "dim"))
    if standing.slowest:
        rank, phase = standing.slowest
        parts.append(Part(f"slowest rank {rank} in {phase}", f"slowest {rank}"))
    if standing.memory:
        kind, held, rank = standing.memory
        name = "memory" if kind == "host" else "GPU memory"
        parts.append(Part(f"{name} {size(held)} (rank {rank})", size(held)))
    if standing.restarts:
        words = f"{standing.restarts} restart" + ("s" if standing.restarts > 1 else "")
        parts.append(Part(words, words, "yellow"))
    if standing.warnings:
        words = f"{standing.warnings} warning" + ("s" if standing.warnings > 1 else "")
        parts.append(Part(words, words, "yellow"))
    if standing.saved is not None:
        parts.append(Part(f"saved step {standing.saved}", f"saved {standing.saved}"))
    return parts


def _ending(standing: Standing, *, running: bool) -> Text | None:
    if standing.status == "finished":
        return Text("done, ").append(f"digest {standing.digest}", "green")
    if standing.status == "failed":
        return Text(_printable(standing.failure) + ("; starting again" if running else ""), "red")
    if not running:
        again = f"; started again it goes on from step {standing.saved}" if standing.saved else ""
        return Text(f"not running{again}", "yellow")
    return None


def _printable(text: str) -> str:
    """Without what would move the cursor, colour or clear the screen."""
    return "".join(sign if sign.isprintable() else " " for sign in _ESCAPE.sub("", text))


def clock(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    if whole >= 172_800:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    minutes, second = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}" if minutes >= 60 else f"{minutes}:{second:02}"


def size(held: int) -> str:
    """Bytes as `812 MiB` or `3.42 GiB`."""
    return f"{held / 2**30:.2f} GiB" if held >= 2**30 else f"{held / 2**20:.0f} MiB"


def count(value: float) -> str:
    """Three digits that mean something: `0.52`, `87.3`, `2787`."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
