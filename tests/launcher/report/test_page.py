"""The page holds what was asked for, and what comes from a run can't do anything in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from samestep.launcher.contract import UsageError
from samestep.launcher.report import command, write

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028'\"&"


def evil_run(made, path):
    events = made.events(60, crash_after=30)
    for event in events:
        if event["event"] == "eval":
            event["metrics"] = {EVIL: 0.5}
        if event["event"] == "step":
            event["extra"] = {EVIL: 1.0}
        if event["event"] == "worker_failed":
            event["cause"] = event["phase"] = EVIL
        if event["event"] == "run_finished":
            event["digest"] = EVIL
    events.append({"event": "warning", "time": 2000.0, "text": EVIL})
    return made.run(path, events, {EVIL: EVIL, "weights": EVIL})


def test_words_of_a_run_are_harmless_in_the_page(made, tmp_path):
    evil_run(made, tmp_path / "run")
    page = command.command([str(tmp_path / "run")]).read_text()
    ours = page.replace(write.plotly_script(), "")
    assert len(re.findall(r"<script", ours)) == 3
    assert len(re.findall(r"</script", ours)) == 3
    assert "<img" not in ours
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', ours, re.DOTALL)
    assert [chart["title"] for chart in json.loads(data)["charts"]].count(EVIL) == 2


def test_page_asks_for_nothing_from_anywhere(made, tmp_path):
    page = command.command([str(made.run(tmp_path / "run", made.events(20)))]).read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none';")
    assert "http" not in policy[1]
    assert not re.search(r"""(src|href)=["'](?!data:)""", page.replace(write.plotly_script(), ""))


def test_page_of_one_run_lies_in_its_directory_for_its_owner_alone(made, tmp_path):
    run = made.run(tmp_path / "run", made.events(20))
    assert command.command([str(run)]) == run / "report.html"
    assert stat.S_IMODE((run / "report.html").stat().st_mode) == 0o600
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "events.jsonl", "report.html"]


def test_settings_that_differ_come_first_and_are_marked(made, tmp_path):
    runs = [made.run(tmp_path / f"r{seed}", made.events(20), {"seed": seed}) for seed in (7, 8)]
    output = tmp_path / "both.html"
    assert command.command([*map(str, runs), "--output", str(output)]) == output
    rows = re.findall(
        r'<tr( class="differs")?><th>([^<]+)</th><td>([^<]*)</td><td>([^<]*)</td></tr>', output.read_text()
    )
    marked = [(name, left, right) for differs, name, left, right in rows if differs]
    assert marked == [("--seed", "7", "8")]
    assert rows[[name for _, name, *_ in rows].index("--seed")] == rows[len(rows) - 4]
    assert "The same bits at the end: r7 = r8" in output.read_text()


def test_runs_whose_bits_differ_are_told_apart_with_the_first_step(made, tmp_path):
    events = made.events(40)
    made.run(tmp_path / "a" / "run", events)
    events[17] |= {"loss_hex": (0.123).hex()}
    events[-1] |= {"digest": "cd" * 32}
    made.run(tmp_path / "b" / "run", events)
    output = command.command([str(tmp_path / "a/run"), str(tmp_path / "b/run"), "--output", str(tmp_path / "x.html")])
    page = output.read_text()
    assert f"The weights at the end differ: {tmp_path}/a/run ≠ {tmp_path}/b/run" in page
    assert "have other bits from step 17 on" in page


def test_mistakes_are_sentences(made, samestep):
    made.run(samestep.cwd / "run", made.events(20))
    for words, said in [
        ((), "report is expected to be followed by run directories"),
        (("nowhere",), "nowhere is expected to be a run directory with events.jsonl"),
        (("run", "--outptu", "x"), "did you mean --output?"),
        (("run", "--output", "missing/x.html"), "expected to be written to missing/x.html"),
    ]:
        ended = samestep("report", *words)
        assert (ended.code, ended.stdout) == (2, "")
        assert said in ended.stderr
        assert "Traceback" not in ended.stderr
    ended = samestep("report", "run")
    assert (ended.code, ended.stdout, ended.stderr) == (0, "run/report.html\n", "")


def test_a_page_is_whole_or_not_there(made, tmp_path, monkeypatch):
    run = made.run(tmp_path / "run", made.events(20))
    (run / "report.html").write_text("old")

    def broken(*_words):
        yield "half"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "render", broken)
    with pytest.raises(Exception, match="No space left"):
        command.command([str(run)])
    assert (run / "report.html").read_text() == "old"
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "events.jsonl", "report.html"]


def test_what_is_no_file_of_its_own_is_written_to_and_not_replaced(made, tmp_path):
    run = made.run(tmp_path / "run", made.events(20))
    pipe, link, target = tmp_path / "pipe", tmp_path / "link.html", tmp_path / "target.html"
    os.mkfifo(pipe)
    target.write_text("old")
    link.symlink_to(target)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        command.command([str(run), "--output", str(pipe)])
        assert read.result(timeout=30).endswith("</html>")
    command.command([str(run), "--output", str(link)])
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert link.is_symlink()
    assert target.read_text().endswith("</html>")


RECIPE = """
import json, os
from pathlib import Path
from samestep.train import train  # noqa: F401  (never called: it only looks like a recipe)
run_dir = Path(os.environ["SAMESTEP_RUN_DIR"])
with (run_dir / "events.jsonl").open("a") as events:
    for step in range(1, 4):
        events.write(json.dumps({"event": "eval", "time": 1.0, "step": step, "metrics": {"loss": 0.5}}) + "\\n")
raise SystemExit(int(os.environ.get("CODE", "0")))
"""


@pytest.mark.parametrize(
    ("options", "environ", "made_it"),
    [((), {}, True), (("--no-report",), {}, False), (("--max-restarts", "0"), {"CODE": "9"}, False)],
)
def test_a_run_that_is_done_leaves_its_page(options, environ, made_it, samestep):
    text = RECIPE.replace("from samestep.train", "if False:\n    from samestep.train")
    (samestep.cwd / "recipe.py").write_text(text)
    ended = samestep("run", "--no-warm", *options, "recipe.py", env=environ)
    assert ended.code == (1 if environ else 0)
    assert (samestep.cwd / "runs/recipe/report.html").exists() is made_it
    assert "report" not in ended.stderr


def test_a_page_on_a_file_system_that_can_only_be_read_is_a_sentence(made, tmp_path, monkeypatch):
    run = made.run(tmp_path / "run", made.events(20))

    def refused(*_words, **_more):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(UsageError, match="Read-only file system"):
        command.command([str(run)])


def test_a_page_that_can_not_be_written_changes_nothing_else(samestep):
    text = RECIPE.replace("from samestep.train", "if False:\n    from samestep.train")
    (samestep.cwd / "recipe.py").write_text(text + "\n")
    (samestep.cwd / "runs/recipe/report.html").mkdir(parents=True)
    ended = samestep("run", "--no-warm", "recipe.py")
    assert ended.code == 0
    assert "samestep: no report: the report is expected to be written to" in ended.stderr


PIPE = """
import os
from pathlib import Path
from samestep.train import train  # noqa: F401
os.mkfifo(Path(os.environ["SAMESTEP_RUN_DIR"]) / "events.jsonl")
"""


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_asked_to_stop_while_it_makes_its_page_a_run_is_done_all_the_same(signum, samestep):
    (samestep.cwd / "recipe.py").write_text(PIPE)
    process = samestep.start("run", "--no-warm", "recipe.py")
    events, opened, end = samestep.cwd / "runs/recipe/events.jsonl", -1, time.monotonic() + 30
    while opened < 0:  # until the report reads the events
        assert time.monotonic() < end
        with contextlib.suppress(OSError):
            opened = os.open(events, os.O_WRONLY | os.O_NONBLOCK)
    process.send_signal(signum)
    ended = samestep.finish(process, 0.0)
    os.close(opened)
    assert ended.code == 0
    assert ended.stderr == "samestep: no report: interrupted; samestep report runs/recipe makes it\n"
    assert sorted(path.name for path in events.parent.iterdir()) == ["errors", "events.jsonl", "lock", "logs"]
    assert json.loads((events.parent / "lock").read_text())["pid"] == 0
