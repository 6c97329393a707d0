# SPDX-License-Identifier: Apache-2.0
"""Masks, which say at what steps a region is computed: spread evenly, or placed where calibration runs say it matters.

The model of the final error: the sum over skipped steps of (sensitivity of the step x relative error of the forecast
delta) squared. Forecast errors come from the deltas of plain generations, for every choice of the two computed steps
before; sensitivities from generations that skip one step only. The best mask of every size is then exact, by dynamic
programming.
"""

import contextlib
from typing import Any, Iterator, List, Sequence, Tuple

import numpy as np
import torch

from benchmarks.lib.bench import Arm, Bench
from benchmarks.lib.models import Case
from benchmarks.lib.own import masked, planned
from osaccel.plan import Region

REACH = 8  # most steps between two computed ones


@contextlib.contextmanager
def recorded(pipeline: Any, region: Region, deltas: List[torch.Tensor]) -> Iterator[None]:
    """Appends the region's delta of every step, for blocks called with their hidden states first."""
    blocks, entered = pipeline.transformer.transformer_blocks, []
    first = blocks[region.start].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    last = blocks[region.stop - 1].register_forward_hook(lambda *call: deltas.append(call[-1] - entered.pop()))
    try:
        yield
    finally:
        first.remove()
        last.remove()


def forecast_errors(deltas: Sequence[torch.Tensor], reach: int = REACH) -> np.ndarray:
    """Squared relative errors [step, ahead, gap]: forecast from the steps `step - ahead` and `step - ahead - gap`."""
    errors = np.full((len(deltas), reach + 1, reach + 1), np.inf)
    for step, delta in enumerate(deltas):
        for ahead in range(1, min(reach, step) + 1):
            newest = deltas[step - ahead]
            for gap in range(1, min(reach, step - ahead) + 1):
                slope = (newest - deltas[step - ahead - gap]) / gap
                difference = newest + ahead * slope - delta
                errors[step, ahead, gap] = float(difference.square().sum() / delta.square().sum())
    return errors


def costs(bench: Bench, cases: Sequence[Case], warmup: int, region: Region) -> np.ndarray:
    """What skipping a step adds to the squared final error, [step, ahead, gap]; the mean over calibration videos."""
    return np.mean([_costs(bench, case, warmup, region) for case in cases], axis=0)


def _costs(bench: Bench, case: Case, warmup: int, region: Region) -> np.ndarray:
    deltas: List[torch.Tensor] = []
    plain = bench.run(Arm(lambda own: recorded(own, region, deltas)), [case])[0].latents
    errors, steps = forecast_errors(deltas), bench.steps
    probed = sorted({*np.linspace(max(warmup, 2), steps - 1, 8).astype(int).tolist()})
    sensitivities = []
    for skipped in probed:
        plan = masked(region, [step != skipped for step in range(steps)], forecast=True)
        final = bench.run(planned(bench, plan), [case])[0].latents
        square = float((final - plain).square().sum() / plain.square().sum())
        sensitivities.append(max(square, 1e-16) / errors[skipped, 1, 1])
    every = np.exp(np.interp(np.arange(steps), probed, np.log(sensitivities)))
    return errors * every[:, None, None]


def even(budget: int, num_blocks: int, steps: int, warmup: int) -> List[bool]:
    """Block 0 always runs, the others in the warm-up, at the last step and as evenly between as the budget allows."""
    runs = (budget - steps) // (num_blocks - 1) - warmup
    if not 1 < runs <= steps - warmup:
        raise ValueError(f"{budget} block calls do not fit {warmup} warm-up steps of {steps}")
    later = {warmup + number * (steps - 1 - warmup) // (runs - 1) for number in range(runs)}
    return [step < warmup or step in later for step in range(steps)]


def place(cost: np.ndarray, runs: int, warmup: int) -> List[bool]:
    """The mask with `runs` computed steps, the warm-up of at least two among them, of the least summed cost.

    `cost` is [step, ahead, gap]. Raises ValueError when `runs` are too few or too many.
    """
    steps, reach = len(cost), cost.shape[1] - 1
    ways = _segments(cost)
    best = np.full((steps, reach + 1), np.inf)  # by the newest computed step and the gap before it
    best[warmup - 1, 1] = 0.0
    pointers = []
    for _ in range(runs - warmup):
        best, pointer = _one_more(best, ways)
        pointers.append(pointer)
    closing = np.array([[ways[n, g, steps - n] if steps - n <= reach else np.inf for g in range(reach + 1)]
                        for n in range(steps)])  # fmt: skip
    total = best + closing
    if not np.isfinite(total).any():
        raise ValueError(f"no mask of {steps} steps with {warmup} warm-up steps computes {runs} of them")
    step, gap = np.unravel_index(total.argmin(), total.shape)
    mask = [number < warmup for number in range(steps)]
    for pointer in reversed(pointers):
        mask[step] = True
        step, gap = step - gap, pointer[step, gap]
    return mask


def _segments(cost: np.ndarray) -> np.ndarray:
    """[newest step, gap before it, distance to the next]: summed cost of the steps skipped between."""
    steps, reach = len(cost), cost.shape[1] - 1
    ways = np.full((steps, reach + 1, reach + 1), np.inf)
    ways[:, 1:, 1] = 0.0
    for step in range(steps):
        for distance in range(2, min(reach, steps - step) + 1):
            ways[step, :, distance] = ways[step, :, distance - 1] + cost[step + distance - 1, distance - 1]
    return ways


def _one_more(best: np.ndarray, ways: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """One more computed step: the new table, and for each of its entries the gap before its predecessor."""
    steps, reach = len(best), best.shape[1] - 1
    grown, pointer = np.full_like(best, np.inf), np.zeros(best.shape, dtype=int)
    for distance in range(1, min(reach, steps - 1) + 1):
        candidates = (best + ways[:, :, distance])[:-distance]
        grown[distance:, distance], pointer[distance:, distance] = candidates.min(1), candidates.argmin(1)
    return grown, pointer
