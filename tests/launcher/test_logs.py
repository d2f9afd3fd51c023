"""Bytes of ranks: files get all of them, the console whole lines, evidence the last ones."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from samestep.launcher.config import LaunchConfig
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.logs import RankLog, Route, routes

HIDDEN, VERBATIM, PREFIXED = Route.HIDDEN, Route.VERBATIM, Route.PREFIXED


@pytest.mark.parametrize(
    ("options", "zero", "one"),
    [
        ({}, (VERBATIM, VERBATIM), (HIDDEN, PREFIXED)),
        ({"tee": "3"}, (PREFIXED, PREFIXED), (PREFIXED, PREFIXED)),
        ({"tee": "1:1"}, (VERBATIM, VERBATIM), (PREFIXED, PREFIXED)),
        ({"redirects": "3"}, (HIDDEN, HIDDEN), (HIDDEN, HIDDEN)),
        ({"redirects": "3", "tee": "0:1"}, (PREFIXED, HIDDEN), (HIDDEN, HIDDEN)),
        ({"local_ranks_filter": "1"}, (HIDDEN, HIDDEN), (PREFIXED, PREFIXED)),
        ({"local_ranks_filter": "0"}, (VERBATIM, VERBATIM), (HIDDEN, HIDDEN)),
        ({"quiet": True}, (HIDDEN, VERBATIM), (HIDDEN, PREFIXED)),
    ],
)
def test_console_routes(options, zero, one):
    config = LaunchConfig(**options)
    assert tuple(routes(config, 0).values()) == zero
    assert tuple(routes(config, 1).values()) == one


@pytest.fixture
def console():
    reader, writer = os.pipe()

    def printed() -> bytes:
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            return file.read()

    shown = Console(stdout=writer, stderr=writer)
    shown.printed = printed  # type: ignore[attr-defined]  # for the tests below
    return shown


def test_prefixed_lines_are_whole_however_they_arrive(tmp_path, console):
    log = RankLog(3, tmp_path / "log", {"stdout": HIDDEN, "stderr": PREFIXED}, console)
    log.open(0, 1)
    for data in (b"on", b"e\ntw", b"", b"o\n\xff", b"\n 10%\r 20%\r", b" 30%\rlast"):
        log.feed("stderr", data)
    log.feed("stdout", b"unseen\n")
    log.close()
    assert log.tail("stderr") == ("one", "two", "\ufffd", " 10%\r 20%\r 30%\rlast")
    assert console.printed() == b"[rank 3] one\n[rank 3] two\n[rank 3] \xff\n[rank 3] last\n"
    assert (tmp_path / "log").read_bytes().split(b"---\n")[1] == b"one\ntwo\n\xff\n 10%\r 20%\r 30%\rlastunseen\n"


def test_endless_line_is_cut_and_memory_stays_small(tmp_path, console):
    log = RankLog(0, tmp_path / "log", {"stdout": HIDDEN, "stderr": HIDDEN}, console)
    log.open(0, 1)
    for _ in range(100):
        log.feed("stderr", b"x" * 10_000)
    log.close()
    assert sum(map(len, log.tail("stderr"))) <= 200 * 2000
    assert (tmp_path / "log").stat().st_size > 1_000_000


def test_full_disk_is_said_once_and_ends_nothing(console):
    log = RankLog(0, Path("/dev/full"), {"stdout": VERBATIM, "stderr": VERBATIM}, console)
    log.open(0, 1)
    log.feed("stdout", b"goes on\n")
    log.feed("stdout", b"and on\n")
    log.close()
    text = console.printed()
    assert text.count(b"is not written any more") == 1
    assert b"goes on\nand on\n" in text


def test_line_that_another_rank_interrupted_is_not_ended_twice(console):
    console.write("stdout", b"from rank 0")  # an unbuffered rank writes the end of its line by itself
    console.write_line("stdout", b"[rank 1] from rank 1")
    for late in (b"\n", b"next\n", b"\n"):
        console.write("stdout", late)
    assert console.printed() == b"from rank 0\n[rank 1] from rank 1\nnext\n\n"


def test_a_slow_reader_gets_every_byte_and_one_who_never_reads_holds_nobody_who_is_to_stop():
    reader, writer = os.pipe()
    asked = threading.Event()
    console = Console(stdout=writer, stderr=writer, asked=asked.is_set)
    heard = bytearray()

    def read() -> None:
        while len(heard) < 1 << 20:
            heard.extend(os.read(reader, 4096))

    slow = threading.Thread(target=read)
    slow.start()
    console.write("stdout", bytes(1 << 20))
    slow.join(30)
    assert heard == bytes(1 << 20)
    asked.set()
    for stream in ("stdout", "stderr"):
        console.write(stream, bytes(1 << 20))
    os.close(reader)
    os.close(writer)
