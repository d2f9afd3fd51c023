"""Where a rank is: told to its launcher while it trains, and written down where it fails."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from samestep.launcher.contract import RunDir, WorkerEnv
from samestep.launcher.heartbeat import NoPulse, Pulse
from samestep.train import leave
from samestep.train.micro_batches import MicroBatches
from samestep.train.observe.phases import PhaseClock
from samestep.train.parallel.agent_store import JoinTimeoutError


@dataclass(slots=True)
class Progress:
    """Told of each step and of what goes on between steps."""

    step: int = 0
    phase: str = "joining"
    clock: PhaseClock | None = None  # knows the phase inside a step
    micro_batches: MicroBatches | None = None  # know what to do about a lack of memory in a step
    pulse: Pulse = field(default_factory=NoPulse)

    def __call__(self, step: int, phase: str) -> None:
        """`phase` begins, after `step` steps."""
        self.step, self.phase = step, phase
        self.pulse.at(step, phase)

    @property
    def exact_phase(self) -> str:
        """Inside a step the phase that its clock is in."""
        return self.clock.current if self.phase == "step" and self.clock is not None else self.phase

    def device(self) -> tuple[int, str] | None:
        """Steps that the device is behind, and its phase; None where it is done, or not known yet."""
        return None if self.clock is None else self.clock.behind()

    def failed(self, reason: BaseException, env: WorkerEnv, run_dir: RunDir, generation: int) -> None:
        """Write down what ended this rank, with what the next start does about it."""
        accused = reason.missing[0] if isinstance(reason, JoinTimeoutError) else None
        record = leave.error_record(reason, env.rank, generation, self.step, self.exact_phase, accused)
        if self.micro_batches is not None:
            record = self.micro_batches.after(reason, record)
        leave.write_record(record, run_dir)
        if record.remedied and env.started_by != "samestep run":  # which says so itself
            print(f"rank {env.rank} ran out of memory: {record.hint}", file=sys.stderr, flush=True)
