"""LaunchConfig: what the person at the keyboard asked of the launcher. It judges itself and knows no host and no argv.

torchrun's names lead, accelerate's names are second spellings of the same options. An option that a launcher on one
node has no use for is accepted with a help text that says so; one that would change the run and can't be honoured is
refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from samestep.launcher.command_line.options import Option
from samestep.launcher.contract import DEFAULT_GRACE_SECONDS, UsageError

DEFAULT_MAX_RESTARTS = 3  # of a recipe, which resumes; a script that may not is started once

MOST_RANKS = 4096  # of one machine: beyond it is a slip of the finger
COUNT_WORDS = ("auto", "gpu", "cpu")
_STREAMS = {"0": frozenset[str](), "1": frozenset({"stdout"}), "2": frozenset({"stderr"})}
_STREAMS["3"] = _STREAMS["1"] | _STREAMS["2"]


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Options of `samestep run`; flag, then `PET_<NAME>` in the environment, then default."""

    nproc_per_node: Annotated[
        str,
        Option(
            "Processes to start on this machine: a number, auto (GPUs, else CPUs), gpu or cpu",
            "ranks",
            name=("--nproc-per-node", "--num-processes"),
        ),
    ] = "1"
    module: Annotated[bool, Option("The recipe is a module, as in python -m", name=("--module", "-m"), negative="")] = (
        False
    )
    no_python: Annotated[bool, Option("The recipe is a program of its own, not a Python file", negative="")] = False
    max_restarts: Annotated[
        int | None,
        Option(
            f"Restarts without a new checkpoint in between before the run is given up; default: {DEFAULT_MAX_RESTARTS} "
            "for recipes, 0 for other scripts",
            "times",
        ),
    ] = None
    join_timeout: Annotated[
        float, Option("Time ranks wait for each other at a start before all of them start again", "seconds")
    ] = 120.0
    min_ranks: Annotated[
        int | None,
        Option("Go on without a rank whose device is gone, down to so many; same bits, since the shards stay", "ranks"),
    ] = None
    no_warm: Annotated[
        bool, Option("Start each rank as a program of its own, not as a fork that has torch imported", negative="")
    ] = False
    hang_timeout: Annotated[
        str,
        Option(
            "How long a rank of a recipe may stand still: auto (10 times the longest before, but 5 s in steps, 30 s in "
            "evaluations and saves, 10 min in what has not happened before), off, or a number to replace those floors",
            "seconds",
        ),
    ] = "auto"
    pdb: Annotated[
        int | None,
        Option(
            "This rank gets the terminal: breakpoint() works there, and what it raises enters pdb; the others wait, "
            "with --hang-timeout off and --max-restarts 0",
            "rank",
        ),
    ] = None
    log_dir: Annotated[str | None, Option("Folder for rank-N.log files instead of RUN_DIR/logs", "path")] = None
    redirects: Annotated[
        str,
        Option(
            "Streams kept off the console: 0 none, 1 stdout, 2 stderr, 3 both, or 0:1,1:2", name=("--redirects", "-r")
        ),
    ] = "0"
    tee: Annotated[
        str,
        Option("Streams shown on the console with a rank prefix: 0, 1, 2, 3 as --redirects", name=("--tee", "-t")),
    ] = "0"
    local_ranks_filter: Annotated[str, Option("Only these local ranks reach the console, such as 0,2", "ranks")] = ""
    master_addr: Annotated[
        str | None,
        Option(
            "MASTER_ADDR given to the ranks, loopback if not set; of several machines, the address of node 0",
            "host",
            name=("--master-addr", "--main-process-ip"),
        ),
    ] = None
    master_port: Annotated[
        int | None,
        Option(
            "MASTER_PORT given to the ranks, a free one if not set; of several machines, where node 0 listens",
            name=("--master-port", "--main-process-port"),
        ),
    ] = None
    shutdown_timeout: Annotated[float | None, Option("torchrun's name for --grace-seconds", "seconds")] = None
    grace_seconds: Annotated[
        float | None,
        Option(
            "Time from the first SIGTERM, SIGUSR1, SIGHUP or Ctrl-C to the end by force; recipes finish the step and "
            f"save in it; default: --shutdown-timeout, else {DEFAULT_GRACE_SECONDS:g} for recipes, 5 for other scripts",
            "seconds",
        ),
    ] = None
    role: Annotated[str, Option("ROLE_NAME given to the ranks")] = "default"
    rdzv_id: Annotated[str | None, Option("TORCHELASTIC_RUN_ID given to the ranks, random if not set")] = None
    virtual_local_rank: Annotated[
        bool, Option("Each rank sees its own GPU alone, as device 0 and LOCAL_RANK 0", negative="")
    ] = False
    cpu: Annotated[
        bool, Option("Keep accelerate on the CPU: sets ACCELERATE_USE_CPU=true for the ranks", negative="")
    ] = False

    nnodes: Annotated[
        str | None,
        Option(
            "Machines of the run, a number or MIN:MAX; default: as Slurm started us once a node, else 1",
            "machines",
            name=("--nnodes", "--num-machines"),
        ),
    ] = None
    node_rank: Annotated[
        int | None,
        Option("Rank of this machine; Slurm and an Indexed Job tell it", name=("--node-rank", "--machine-rank")),
    ] = None
    numa_binding: Annotated[str | None, Option("Refused: ranks are not bound to NUMA nodes")] = None

    standalone: Annotated[
        bool, Option("Accepted, without effect: a free loopback port is the default", negative="")
    ] = False
    multi_gpu: Annotated[bool, Option("Accepted, without effect: --nproc-per-node alone decides", negative="")] = False
    rdzv_backend: Annotated[str, Option("Accepted, without effect: machines find each other through the first one")] = (
        ""
    )
    rdzv_endpoint: Annotated[
        str,
        Option(
            "Instead of --node-rank: the first machine's address; the others are numbered as they come", "host:port"
        ),
    ] = ""
    rdzv_conf: Annotated[
        str,
        Option(
            "join_timeout=600,last_call_timeout=30,keep_alive_interval=5,keep_alive_max_attempt=3", "key=seconds,..."
        ),
    ] = ""
    local_addr: Annotated[str | None, Option("Own address from which the first machine is called", "host")] = None
    start_method: Annotated[str, Option("Accepted, without effect: --no-warm alone decides")] = "spawn"
    monitor_interval: Annotated[
        float, Option("Accepted, without effect: the death of a rank is an event, nothing polls", "seconds")
    ] = 0.1
    event_log_handler: Annotated[str, Option("Accepted, without effect: events go to RUN_DIR/events.jsonl")] = "null"

    dry_run: Annotated[
        bool, Option("Print the commands and their environment, start and create nothing", negative="")
    ] = False
    no_report: Annotated[bool, Option("Do not write RUN_DIR/report.html at the end", negative="")] = False
    quiet: Annotated[bool, Option("Show errors only", negative="")] = False
    json: Annotated[bool, Option("End with one line of JSON on stdout", negative="")] = False

    def __post_init__(self) -> None:
        """Refuse what is wrong by itself, without a look at the host.

        Raises:
            UsageError: with setting, expectation, value and a hint.
        """
        _check_count(self.nproc_per_node)
        _check_binding(self)
        if self.module and self.no_python:
            raise UsageError(
                "--module and --no-python are expected one at a time, but both are set", "drop one of them"
            )
        if self.max_restarts is not None and self.max_restarts < 0:
            raise refused("--max-restarts", "at least 0", self.max_restarts, "0 means that the first failure is final")
        if not 0 < self.join_timeout < float("inf"):
            raise refused("--join-timeout", "above 0 seconds", self.join_timeout, "leave it out for 120 seconds")
        if self.pdb is not None and self.pdb < 0:
            raise refused("--pdb", "a rank, from 0", self.pdb, "--pdb 0")
        if self.min_ranks is not None and self.min_ranks < 1:
            raise refused("--min-ranks", "at least 1", self.min_ranks, "leave it out to keep all ranks")
        if self.master_port is not None and not 0 <= self.master_port <= 65535:
            raise refused("--master-port", "between 0 and 65535", self.master_port, "leave it out for a free port")
        for name, value in (("--shutdown-timeout", self.shutdown_timeout), ("--grace-seconds", self.grace_seconds)):
            if value is not None and not 0 <= value < float("inf"):
                raise refused(name, "at least 0 seconds", value, "leave it out for the default")
        _check_hang_timeout(self.hang_timeout)
        streams("--redirects", self.redirects, 0)
        streams("--tee", self.tee, 0)
        shown_ranks(self.local_ranks_filter)


def _check_count(text: str) -> None:
    if text in COUNT_WORDS:
        return
    if text.isascii() and text.isdecimal() and (len(text) > 9 or int(text) > MOST_RANKS):
        raise UsageError(
            f"--nproc-per-node is expected to be at most {MOST_RANKS} on one machine, but is {text}",
            "more ranks than that go on several machines: --nnodes",
        )
    if text.isascii() and text.isdecimal() and int(text) >= 1:
        return
    raise UsageError(
        f"--nproc-per-node is expected to be at least 1, or auto, gpu or cpu, but is {text!r}",
        "samestep run --nproc-per-node 2 recipe.py",
    )


def _check_hang_timeout(text: str) -> None:
    if text in ("auto", "off"):
        return
    try:
        if 0 < float(text) < float("inf"):
            return
    except ValueError:
        pass
    raise refused("--hang-timeout", "auto, off or more than 0 seconds", repr(text), "leave it out for auto")


def _check_binding(config: LaunchConfig) -> None:
    if config.numa_binding is not None:
        raise UsageError(
            f"--numa-binding is expected to be left out, but is {config.numa_binding!r}: binding is not supported yet",
            "bind the whole run: numactl samestep run ...",
        )


def refused(setting: str, expected: str, actual: object, hint: str) -> UsageError:
    """The error, to be raised, of an option whose value is not as expected; `hint` says what to type instead."""
    return UsageError(f"{setting} is expected to be {expected}, but is {actual}", hint)


def streams(setting: str, text: str, local_rank: int) -> frozenset[str]:
    """Streams that `text` (`3`, or `0:1,1:2` by local rank) names for one rank.

    Raises:
        UsageError: `text` has neither form.
    """
    if text in _STREAMS:
        return _STREAMS[text]
    found: frozenset[str] = frozenset()
    for part in text.split(","):
        rank, colon, value = part.partition(":")
        if not (colon and rank.isdecimal() and value in _STREAMS):
            raise refused(
                setting, "0, 1, 2, 3 or a list such as 0:1,1:2", repr(text), f"{setting} 3 means both streams"
            )
        if int(rank) == local_rank:
            found = _STREAMS[value]
    return found


def shown_ranks(text: str) -> frozenset[int] | None:
    """Local ranks of `--local-ranks-filter`, None if nothing is filtered.

    Raises:
        UsageError: `text` is not a list of whole numbers.
    """
    if not text:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise refused("--local-ranks-filter", "a list of local ranks", repr(text), "--local-ranks-filter 0,1")
    return frozenset(int(part) for part in parts)


def ranks_named(config: LaunchConfig) -> dict[str, frozenset[int]]:
    """Local ranks in the options that name some, by flag."""
    pairs = {"--redirects": config.redirects, "--tee": config.tee}
    found = {flag: frozenset(int(rank) for rank in re.findall(r"(\d+):", text)) for flag, text in pairs.items()}
    return {"--local-ranks-filter": shown_ranks(config.local_ranks_filter) or frozenset(), **found}
