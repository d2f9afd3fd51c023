"""Signals are noted while training runs, and do what they did before at any other time."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from samestep.launcher.contract import ENV_GRACE, ENV_LAUNCHED, ExitCode
from samestep.train.preemption import verdict
from samestep.train.signals import STOPPING, StopSignals

LAUNCHED = {ENV_LAUNCHED: "1"}


@pytest.mark.parametrize("signum", STOPPING)
def test_a_signal_is_noted_and_what_was_before_comes_back(signum: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in STOPPING]
    moments = iter([100.0, 104.0, 190.0])
    with StopSignals(LAUNCHED | {ENV_GRACE: "20"}, lambda: next(moments)) as signals:
        assert (signals.signum, signals.seconds_left()) == (0, None)
        signal.raise_signal(signum)
        assert signals.signum == signum
        assert signals.seconds_left() == 14.0  # a tenth of the grace time is for leaving
        assert signals.seconds_left() == 0.0
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_the_first_signal_counts_and_repetitions_change_nothing() -> None:
    with StopSignals(LAUNCHED) as signals:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.signum == signal.SIGTERM


def test_after_one_ctrl_c_the_next_is_the_systems() -> None:
    with StopSignals(LAUNCHED):
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


@pytest.mark.parametrize(("environ", "words"), [({}, b"finishing the step"), ({"RANK": "1"}, b""), (LAUNCHED, b"")])
def test_the_person_is_told_once_and_by_one_process(
    environ: dict[str, str], words: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopSignals(environ):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err.count(words.decode() or "samestep") == int(bool(words))


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopSignals(LAUNCHED) as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.signum == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_in_another_thread_or_a_notebook_nothing_is_taken_over() -> None:
    seen: list[object] = []

    def look() -> None:
        with StopSignals(LAUNCHED):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    with StopSignals(LAUNCHED, active=False):
        seen.append(signal.getsignal(signal.SIGINT))
    assert seen == [signal.getsignal(signal.SIGINT)] * 2


@pytest.mark.parametrize(
    ("step", "newest", "signum", "code"),
    [
        (7, 7, signal.SIGTERM, ExitCode.PREEMPTED_SAVED),
        (7, 7, signal.SIGINT, ExitCode.PREEMPTED_SAVED),
        (7, 4, signal.SIGTERM, ExitCode.PREEMPTED_KEPT),
        (7, None, signal.SIGINT, ExitCode.INTERRUPTED),
        (7, None, signal.SIGUSR1, ExitCode.TERMINATED),
    ],
)
def test_what_is_on_disk_decides_the_exit_status(step: int, newest: int | None, signum: int, code: int) -> None:
    assert verdict(step, newest, signum) == code
