# SPDX-License-Identifier: Apache-2.0
"""What methods learn before they are compared, on calibration prompts only, and how one is brought to a given work."""

import math
from typing import Any, Callable, ContextManager, NamedTuple, Optional

from benchmarks.lib.bench import Arm, Bench

SEED = 10**6
# First steps that every cache computes.
WARMUP = 10


class Calibration:
    """Generations on calibration prompts for the methods of one comparison; kept where the bench keeps its runs.

    Args:
        warmup: first steps that every cache is told to compute.
        prompts: on how many prompts thresholds are tuned.
    """

    def __init__(self, bench: Bench, warmup: int = WARMUP, prompts: int = 2, seed: int = SEED):
        self.bench, self.warmup = bench, warmup
        self.steps, self.num_blocks = bench.steps, bench.num_blocks
        self.cases = bench.model.calibration_cases(prompts, seed)

    @property
    def label(self) -> str:
        """What everything learnt depends on, beside the bench."""
        return f"warmup {self.warmup}, {len(self.cases)} from {self.cases[0].seed}"

    def budget(self, work: float) -> int:
        """Block calls that network work allows."""
        return int(work * self.bench.plain_blocks + 1e-6)

    def computed(self, attach: Callable[[Any], ContextManager], prompts: Optional[int] = None) -> float:
        """Block calls x share of the batch, the mean over prompts; every video by itself."""
        samples = self.bench.run(Arm(attach, alone=True), self.cases[:prompts])
        return sum(sample.computed for sample in samples) / len(samples)

    def learn(self, attach: Callable[[Any], ContextManager]) -> None:
        """One generation, for rules that learn from it."""
        self.computed(attach, prompts=1)

    def learned(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make()` learns, once for all works; anything that JSON holds."""
        return self.bench.kept.value(_file_name(f"learned {name}, {self.label}"), make)

    def threshold(self, name: str, attach: Callable[[Any, float], ContextManager], work: float) -> float:
        """A threshold with which `attach(pipeline, threshold)` computes at most this work.

        Raises ValueError where there is none.
        """
        budget = self.budget(work)

        def find() -> Any:
            try:
                found = meet_budget(
                    lambda value: self.computed(lambda own: attach(own, value)), budget, slack=self.num_blocks
                )
            except ValueError as error:
                return {"reason": str(error)}
            return {"threshold": found}

        found = self.bench.kept.value(_file_name(f"threshold {name}, {budget} blocks, {self.label}"), find)
        if "reason" in found:
            raise ValueError(found["reason"])
        return found["threshold"]


class Competitor(NamedTuple):
    """A method to compare with.

    at: `at(calibration, work)` is its arm at this network work; ValueError says why it has none there.
    package: what must be installed (see `benchmarks.competitors.packages`), if anything.
    """

    name: str
    at: Callable[[Calibration, float], Arm]
    package: str = ""


def tuned(calibration: Calibration, name: str, attach: Callable[[Any, float], ContextManager], work: float) -> Arm:
    """The arm of a method that decides by a threshold; its work is what it turns out to be."""
    value = calibration.threshold(name, attach, work)
    key = f"{name}, threshold {value!r}, {calibration.label}"
    return Arm(lambda own: attach(own, value), name=name, family=name, alone=True, key=key, threshold=value)


def meet_budget(compute: Callable[[float], float], budget: float, slack: float, rounds: int = 12) -> float:
    """A threshold in 1e-4 .. 10 whose computed blocks are within the budget, by bisection of its logarithm.

    `compute(threshold)` counts them on calibration prompts; more are computed the lower the threshold is.
    Found is one that leaves less than `slack` blocks of the budget, or else the lowest within it. Raises ValueError
    when even the highest threshold exceeds the budget.
    """
    low, high, best = -4.0, 1.0, None
    for _ in range(rounds):
        middle = (low + high) / 2
        computed = compute(10**middle)
        if computed > budget:
            low = middle
            continue
        high = best = middle
        if computed > budget - slack:
            break
    if best is None:
        raise ValueError(f"no threshold keeps the computed blocks within {budget}")
    return math.pow(10, best)


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)
