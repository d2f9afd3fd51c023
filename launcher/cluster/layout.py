"""Pure: what options and environment say about the machines of a run.

Names and defaults of the timeouts are those of torch's rendezvous (torch/distributed/elastic/rendezvous/
dynamic_rendezvous.py), so that `--rdzv-conf` of a torchrun command line means the same here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from samestep.launcher import who_started
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import UsageError

DEFAULT_PORT = 29500  # torchrun's, where the address is given; else the run directory tells the port too


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds, but for `keep_alive_max_attempt`: signs of life that may be missing in a row."""

    join_timeout: float = 600.0  # until enough machines are there
    last_call_timeout: float = 30.0  # for further ones, once there are enough
    keep_alive_interval: float = 5.0
    keep_alive_max_attempt: float = 3.0

    @property
    def silence(self) -> float:
        """After so long without a sign of life a machine counts as gone."""
        return self.keep_alive_interval * self.keep_alive_max_attempt


@dataclass(frozen=True, slots=True)
class Layout:
    """Where this launcher stands among those of the other machines.

    Attributes:
        fewest: machines below which nothing is trained.
        most: machines that may take part.
        node_rank: of this machine, None where the order of arrival decides.
        address: of the head, empty where the run directory tells.
        port: on which the head listens.
        source: own address from which the head is called, empty for the system's choice.
        by: who said which node this is.
    """

    fewest: int
    most: int
    node_rank: int | None
    address: str
    port: int
    timeouts: Timeouts = Timeouts()
    source: str = ""
    by: str = "--node-rank"


def layout(config: LaunchConfig, environ: Mapping[str, str]) -> Layout | None:
    """None for a run on this machine alone.

    Raises:
        UsageError: an option has no such form, or something is missing.
    """
    engine = who_started.node_rank(environ)
    fewest, most = _span(config.nnodes or str(engine[1] if engine and engine[1] else 1))
    if most == 1:
        if config.node_rank:
            raise UsageError(
                f"--node-rank is expected to be 0 with one machine, but is {config.node_rank}",
                "--nnodes says how many machines there are",
            )
        return None
    waits = timeouts(config.rdzv_conf)
    if config.rdzv_endpoint:
        address, port = _endpoint(config.rdzv_endpoint)
        return Layout(fewest, most, None, address, port, waits, config.local_addr or "", "--rdzv-endpoint")
    node_rank, by = _node_rank(config, engine)
    if not 0 <= node_rank < most:
        raise UsageError(
            f"{by} is expected to be at least 0 and below --nnodes {most}, but is {node_rank}",
            "node ranks count from 0",
        )
    port = config.master_port or (DEFAULT_PORT if config.master_addr else 0)
    return Layout(fewest, most, node_rank, config.master_addr or "", port, waits, config.local_addr or "", by)


def _node_rank(config: LaunchConfig, engine: tuple[int, int, str] | None) -> tuple[int, str]:
    if config.node_rank is not None:
        if engine is not None and engine[0] != config.node_rank:
            raise UsageError(
                f"--node-rank and {engine[2]} are expected to agree, but --node-rank is {config.node_rank} "
                f"and the other is {engine[0]}",
                "leave --node-rank out",
            )
        return config.node_rank, "--node-rank"
    if engine is None:
        raise UsageError(
            f"--node-rank is expected to be given with --nnodes {config.nnodes}, but is not",
            "--node-rank 0 on the first machine, or --rdzv-endpoint HOST:PORT on all of them",
        )
    return engine[0], engine[2]


def _span(text: str) -> tuple[int, int]:
    fewest, colon, most = text.partition(":")
    parts = [fewest, most if colon else fewest]
    if all(part.isascii() and part.isdecimal() and int(part) >= 1 for part in parts) and int(parts[0]) <= int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise UsageError(
        f"--nnodes is expected to be a number of machines or MIN:MAX, but is {text!r}", "--nnodes 2, or --nnodes 1:4"
    )


def _endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(
            f"--rdzv-endpoint is expected to be HOST:PORT, but is {text!r}", "--rdzv-endpoint node0.example:29500"
        )
    return host, int(port)


def timeouts(text: str) -> Timeouts:
    """How long machines wait for each other, from `--rdzv-conf`, such as `join_timeout=60,last_call_timeout=5`.

    Keys that torchrun knows and that concern its own rendezvous alone are passed over.

    Raises:
        UsageError: a part is not KEY=VALUE, or the value of a key that counts is no number of seconds above 0.
    """
    found = Timeouts()
    names = {field.name for field in fields(Timeouts)}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"--rdzv-conf is expected to be KEY=VALUE,..., but has {part!r}", "join_timeout=600")
        if name.strip() not in names:
            continue
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 < number < float("inf"):
            raise UsageError(f"{name} in --rdzv-conf is expected to be above 0, but is {value!r}", "join_timeout=600")
        found = replace(found, **{name.strip(): number})
    return found
