# SPDX-License-Identifier: Apache-2.0
"""What osaccel is compared with, a method or a package a file.

Each offers a way to attach itself, entered around one generation whose transformer belongs to it alone, so nothing has
to be put back; and `at(calibration, work)`, its arm at a given network work.
"""

from typing import Dict, List, Sequence, Tuple

from benchmarks.competitors import (
    cache_dit,
    cfg_gate,
    fewer_steps,
    first_block_cache,
    mag_cache,
    sea_cache,
    taylor_seer,
    tea_cache,
)
from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration, Competitor

CACHES: Tuple[Competitor, ...] = (
    *cache_dit.COMPETITORS,
    first_block_cache.COMPETITOR,
    mag_cache.COMPETITOR,
    sea_cache.COMPETITOR,
    taylor_seer.COMPETITOR,
    tea_cache.COMPETITOR,
)
ALL: Tuple[Competitor, ...] = (fewer_steps.COMPETITOR, cfg_gate.COMPETITOR, *CACHES)


def arms_at(
    calibration: Calibration, work: float, absent: Dict[str, str], competitors: Sequence[Competitor] = ALL
) -> Tuple[List[Arm], Dict[str, str]]:
    """The competitors' arms at this work, and why others have none.

    absent: package -> why it is missing, as `packages.missing()` says; what needs it is left out.
    """
    arms, left_out = [], {}
    for competitor in competitors:
        if competitor.package in absent:
            continue
        try:
            arms.append(competitor.at(calibration, work))
        except ValueError as error:
            left_out[competitor.name] = str(error)
    return arms, left_out
