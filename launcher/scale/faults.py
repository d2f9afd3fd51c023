"""Pure: what failures cost a run, and how often to save.

Failures are taken as independent and equally likely at any time (a Poisson process), so W ranks that fail on average
after M hours each interrupt the run every M / W hours. Measured rates:

* Llama 3: 419 unexpected interruptions in 54 days on 16 384 GPUs: 50 677 GPU-hours each. Meta, "The Llama 3 herd of
  models", arXiv 2407.21783, section 3.3.4.
* Meta's research clusters: 7.9 h on 1 024 GPUs measured (8 090 GPU-hours each); 1.8 h projected for 16 384 (29 491).
  A. Kokolis et al., "Revisiting reliability in large-scale machine learning research clusters", HPCA 2025,
  arXiv 2410.21680.

The two figures of the second paper do not lie on one line: failures per GPU-hour are not the same at every size, and a
rate measured near the size that is planned for is worth more than either.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

LLAMA3_RANK_HOURS = 54 * 24 * 16_384 / 419
_LARGEST = math.log(sys.float_info.max) / 2


@dataclass(frozen=True, slots=True)
class Faults:
    """`mttf`: seconds to the next failure of the whole run; `save`: for which training stands still; `restart`."""

    mttf: float
    save: float
    restart: float


def run_mttf(rank_hours: float, ranks: int) -> float:
    """Seconds to the next failure of a run, whose every rank fails on average after `rank_hours` hours."""
    return 3600.0 * rank_hours / ranks


def young(faults: Faults) -> float:
    """Best time between saves, to first order: J. W. Young, Communications of the ACM 17 (9), 1974."""
    return math.sqrt(2 * faults.save * faults.mttf)


def daly(faults: Faults) -> float:
    """Best time between saves, to higher order: J. T. Daly, Future Gener. Comput. Syst. 22, 2006, equation 37."""
    if faults.save >= 2 * faults.mttf:
        return faults.mttf
    ratio = faults.save / (2 * faults.mttf)
    return young(faults) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - faults.save


def goodput(faults: Faults, interval: float) -> float:
    """Share of the time in which steps are made that last, between 0 and 1.

    Daly 2006, equation 20: interval / (M exp(R/M) (exp((interval + save) / M) - 1)), which holds however often it
    fails, also while it saves or starts again.
    """
    if math.isinf(faults.mttf):
        return 1.0 if math.isinf(interval) else interval / (interval + faults.save)
    exponent = (interval + faults.save) / faults.mttf
    if exponent + faults.restart / faults.mttf > _LARGEST:
        return 0.0
    return interval / (faults.mttf * math.exp(faults.restart / faults.mttf) * math.expm1(exponent))
