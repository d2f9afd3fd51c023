"""What is told, and written down for the launcher, where a call of ours ends in an exception."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from samestep.launcher.contract import RunDir, UsageError, WorkerEnv
from samestep.train import elastic_error, leave, post_mortem
from samestep.train.data.shield import kill_the_rest
from samestep.train.progress import Progress


@dataclass(slots=True)
class Whereabouts:
    """What is known of a rank when something fails, and gets known while it joins."""

    run_dir: RunDir
    generation: int = 0
    env: WorkerEnv = field(default_factory=WorkerEnv)
    progress: Progress = field(default_factory=Progress)

    @contextmanager
    def failures_told(self) -> Iterator[None]:
        """Print a mistake once, without a traceback; leave a record of whatever else ends this rank.

        Raises:
            SystemExit: in place of a mistake in usage, an interrupt before training, or the consequence of another
                rank's end.
            BaseException: whatever user code raised, after it was recorded.
        """
        try:
            yield
        except UsageError as error:
            record = leave.error_record(error, self.env.rank, self.generation, *self._place)
            if leave.is_to_tell(record, self.env, self.run_dir):
                print(leave.prefix(self.env.rank) + str(error), file=sys.stderr, flush=True)
            raise SystemExit(int(error.exit_code)) from None
        except SystemExit as leaving:
            early = leave.early_exit(leaving, self.env.rank, self.generation, *self._place)
            if early is not None:
                leave.write_record(early, self.run_dir)
            if early is not None and not leaving.code and self.env.rank == 0:  # else the status says that all is done
                print(f"warning: {early.message}, after step {early.step}: {early.hint}", file=sys.stderr, flush=True)
            raise
        except (KeyboardInterrupt, GeneratorExit) as asked:
            leave.if_it_never_began(asked, self.progress.exact_phase, self.env.rank)
            raise
        except BaseException as seen:  # libraries have some that are no Exception, such as asyncio's CancelledError
            reason = self._recorded(seen)
            if leave.is_consequence(reason):
                print(leave.prefix(self.env.rank) + elastic_error.FOLLOWED, file=sys.stderr, flush=True)
                raise SystemExit(1) from reason
            if reason is not seen:
                raise reason from seen
            raise
        finally:
            self.progress.pulse.at(self.progress.step, "")

    @property
    def _place(self) -> tuple[int, str]:
        return self.progress.step, self.progress.exact_phase

    def _recorded(self, seen: BaseException) -> BaseException:
        """What `seen` comes from, written down for the launcher."""
        with leave.deaths_of_children_unheard():
            reason = post_mortem.look(leave.loader_death(seen), os.environ, self.env.rank)
            self.progress.failed(reason, self.env, self.run_dir, self.generation)
            kill_the_rest()
        return reason
