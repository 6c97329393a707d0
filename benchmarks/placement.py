# SPDX-License-Identifier: Apache-2.0
"""What a plan would gain whose steps were placed freely: the found plan, moved far beyond a search's budget.

    python -m benchmarks.placement --model second --target 3 --targets 2,1.6,3,1.3,4 --prompts 48 --kept FOLDER

A move exchanges what two steps do, or twice two, half of the time next to each other; so the work stays. It is kept
where it makes the mean error on `--calls` calls less, which the search did not see. The lines say what is left of that
on held-out videos, by which no move was chosen, and how much more it is than the found plan's, with a 95 % bootstrap
interval. Every error is kept in the folder: an interrupted command goes on.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple

import numpy as np
import torch

from benchmarks.lib import models, plan_search
from benchmarks.lib.bench import Bench
from benchmarks.lib.calibration import SEED
from benchmarks.lib.kept import digest_of, made_by
from benchmarks.lib.models import Case
from benchmarks.lib.own import planned
from benchmarks.lib.quality import errors, over
from osaccel import formats
from osaccel.plan import Plan


def exchanged(plan: Plan, one: int, other: int) -> Plan:
    """The plan in which two steps do what the other one did."""

    def swapped(steps: Sequence[int]) -> Tuple[int, ...]:
        return tuple(sorted({one: other, other: one}.get(step, step) for step in steps))

    regions = tuple(replace(region, reuse=swapped(tuple(region.reuse))) for region in plan.regions)
    return replace(plan, skip=swapped(plan.skip), conditional_only=swapped(plan.conditional_only), regions=regions)


def moved(plan: Plan, generator: np.random.Generator) -> Plan:
    """One exchange or two, of steps that do not do the same. Step 0 stays."""
    steps, found = plan.steps or 0, plan
    for _ in range(generator.integers(1, 3)):
        before = found
        while found in (before, plan):
            one, other = generator.integers(1, steps, size=2).tolist()
            beside = min(max(one + int(generator.choice([-1, 1])), 1), steps - 1)
            found = exchanged(before, one, beside if generator.random() < 0.5 else other)
    return found


class Placement:
    """Moves the steps of a plan as long as the mean error on calls becomes less."""

    def __init__(self, bench: Bench, plan: Plan, calls: Sequence[Case]):
        self.bench, self.plan, self.calls = bench, plan, calls
        self.tried, self.taken = 0, 0
        self.errors = self.on(calls)
        self._generator = np.random.default_rng(0)

    def on(self, cases: Sequence[Case]) -> List[float]:
        """The errors of the plan as it is."""
        return self._errors(self.plan, cases)

    def go(self, moves: int) -> None:
        """Try so many moves."""
        for _ in range(moves):
            plan = moved(self.plan, self._generator)
            found = self._errors(plan, self.calls)
            if np.mean(found) < np.mean(self.errors):
                self.plan, self.errors, self.taken = plan, found, self.taken + 1
            self.tried += 1

    def _errors(self, plan: Plan, cases: Sequence[Case]) -> List[float]:
        arm = planned(self.bench, plan)
        name = f"placed-{digest_of([arm.key, *map(list, cases)])}"
        return self.bench.kept.value(name, lambda: errors(self.bench.run(arm, cases), self.bench.plain(cases)))


def lines(bench: Bench, plan: Plan, calls: Sequence[Case], videos: Sequence[Case], moves: int) -> Iterator[str]:
    """The found plan, then what is left after a third, two thirds and all of the moves."""
    placed = Placement(bench, plan, calls)
    on_calls, on_videos = placed.errors, placed.on(videos)
    for part in range(4):
        placed.go(moves // 3 if part else 0)
        now = placed.on(videos)
        more = ["{:+.1%} [{:+.1%}, {:+.1%}]".format(*over(now, on_videos, each)) for each in (np.mean, np.median)]
        yield (
            f"{placed.tried:>5}{placed.taken:>6}{np.mean(placed.errors):>9.4f}{over(placed.errors, on_calls)[0]:>+8.1%}"
            f"{np.mean(now):>10.4f}{more[0]:>25}{np.median(now):>9.4f}{more[1]:>25}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_options(parser)
    parser.add_argument("--target", type=float, default=2.0, help="speed-up of the plan that is moved (2)")
    parser.add_argument("--targets", help="that its search serves, with commas between (that one)")
    parser.add_argument("--prompts", type=int, default=24, help="calibration calls of the search (24)")
    parser.add_argument("--calls", type=int, default=24, help="other calibration calls, by which moves are kept (24)")
    parser.add_argument("--moves", type=int, default=300, help="how many are tried (300)")
    parser.add_argument("--videos", type=int, default=96, help="held-out videos (96)")
    parser.add_argument("--kept", type=Path, required=True, help="folder for everything that is finished")
    parser.add_argument("--batch", type=int, default=4, help="videos sampled at a time (4)")
    parser.add_argument("--steps", type=int, help="of the plain run (the model's)")
    options = parser.parse_args()
    targets = [float(target) for target in (options.targets or str(options.target)).split(",")]
    torch.set_num_threads(1)
    model, pipeline = models.load(options)
    bench = Bench(model, pipeline, options.steps, options.batch, options.kept)
    cases = model.calibration_cases(options.prompts + options.calls, SEED)
    searched, calls = cases[: options.prompts], cases[options.prompts :]
    found = plan_search.search(bench, searched, targets).plans[targets.index(options.target)]
    print("\n".join(f"{name}: {value}" for name, value in made_by().items()))
    print(f"{model.name}, {bench.steps} steps, the plan for {options.target:g}x after {len(searched)} calls")
    print(f"moves kept by the mean error on {len(calls)} other calls; {options.videos} held-out videos\n")
    print(f"{'moves':>5}{'kept':>6}{'on calls':>17}{'held out: mean':>35}{'typical':>34}", flush=True)
    plan = formats.parse_plan(found, "a found plan")
    for line in lines(bench, plan, calls, model.heldout_cases(options.videos), options.moves):
        print(line, flush=True)


if __name__ == "__main__":
    main()
