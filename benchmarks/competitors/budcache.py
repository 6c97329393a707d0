# SPDX-License-Identifier: Apache-2.0
"""A mask search in the manner of BudCache: at which steps the network runs, annealed on the final latents' error.

Mask and reuse only: at a skipped step what the newest computed one gave stands in, either the network's output or the
denoised prediction (the better of the two at even masks). The budget is its own, ten times that of osaccel's search: 60
plain generations of the calibration calls for every work, plain runs included.
"""

import contextlib
import math
from typing import Any, ContextManager, Dict, Iterator, List, Sequence, Tuple

import numpy as np

from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration, Competitor
from benchmarks.lib.own import with_plan
from benchmarks.lib.patterns import mean_square
from osaccel.plan import Plan

NAME = "mask search (BudCache-like)"
BUDGET = 60.0
OUTPUT, DENOISED = "output", "denoised"
# A mask worse by this share is accepted with probability 1/e at the start; falls to zero.
TEMPERATURE = 0.1

Mask = Tuple[bool, ...]


@contextlib.contextmanager
def reusing_output(pipeline: Any, mask: Sequence[bool]) -> Iterator[None]:
    """Where the mask is not set, the transformer returns what it returned last."""
    net = pipeline.transformer
    original, runs, newest = net.forward, iter(mask), None

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal newest
        if next(runs):
            newest = original(*args, **kwargs)
        return newest

    net.forward = forward
    yield


def attach(pipeline: Any, mask: Sequence[bool], reuse: str) -> ContextManager:
    if reuse == OUTPUT:
        return reusing_output(pipeline, mask)
    return with_plan(pipeline, Plan(len(mask), skip=tuple(step for step, runs in enumerate(mask) if not runs)))


def arm(mask: Mask, reuse: str) -> Arm:
    text = "".join(str(int(runs)) for runs in mask)
    return Arm(
        lambda own: attach(own, mask, reuse), name=NAME, family=NAME, work=sum(mask) / len(mask),
        key=f"{NAME}, {reuse}, {int(text, 2):x} of {len(mask)}",
    )  # fmt: skip


def even(runs: int, steps: int, first: int) -> Mask:
    """`runs` computed steps: the first ones, and the others evenly behind."""
    behind = {first + number * (steps - first) // (runs - first) for number in range(runs - first)}
    return tuple(step < first or step in behind for step in range(steps))


def moved(mask: Mask, generator: np.random.Generator) -> Mask:
    """One computed step elsewhere: half of the time next to where it was. Step 0 stays."""
    computed = [step for step, runs in enumerate(mask) if runs and step]
    free = {step for step, runs in enumerate(mask) if not runs}
    beside = [(step, to) for step in computed for to in (step - 1, step + 1) if to in free]
    if generator.random() < 0.5 and beside:
        begin, end = beside[generator.integers(len(beside))]
    else:
        begin, end = generator.choice(computed), generator.choice(sorted(free))
    return tuple(step == end or (runs and step != begin) for step, runs in enumerate(mask))


def search(calibration: Calibration, work: float, budget: float = BUDGET) -> Arm:
    """The best mask that annealing meets within the budget; what was evaluated is kept, so it goes on if killed."""
    steps, runs = calibration.steps, int(work * calibration.steps + 1e-6)
    if not 1 < runs < steps:
        raise ValueError(f"{work:g} of {steps} steps leave nothing to search")
    known: Dict[Tuple[Mask, str], float] = {}

    def square(mask: Mask, reuse: str) -> float:
        if (mask, reuse) not in known:
            known[mask, reuse] = mean_square(calibration, arm(mask, reuse))
        return known[mask, reuse]

    stretches = sorted({min(first, runs - 1) for first in (1, calibration.warmup)})
    starts = [(even(runs, steps, first), reuse) for first in stretches for reuse in (OUTPUT, DENOISED)]
    now, reuse = min(starts, key=lambda start: square(*start))
    most = int((budget - 1) * steps / runs + 1e-6)
    generator = np.random.default_rng(0)
    trace: List[float] = [square(now, reuse)]
    while len(known) < most and len(trace) < 10 * most:  # a few steps may have few masks
        # The mask that annealing is at, not the best; what it met is known.
        candidate = moved(now, generator)
        rise = math.log(square(candidate, reuse) / square(now, reuse)) / 2
        share = 1 - len(known) / most
        if rise <= 0 or generator.random() < math.exp(-rise / max(TEMPERATURE * share, 1e-9)):
            now = candidate
        trace.append(square(now, reuse))
    return arm(*min(known, key=lambda tried: known[tried]))


COMPETITOR = Competitor(NAME, search)
