# SPDX-License-Identifier: Apache-2.0
"""Places the computed steps of a mask with forecast where calibration runs say that they matter.

The model of the final error: the sum over skipped steps of (sensitivity of the step x relative error of the forecast
delta) squared. Forecast errors come from the deltas of plain generations, for every choice of the two computed steps
before; sensitivities from generations that skip one step only. The best mask of every size is then exact, by dynamic
programming.
"""

import contextlib
from typing import Any, Iterator, List, Sequence, Tuple

import numpy as np
import torch

from benchmarks.harness import Arm, Bench
from osaccel.generation import Generation
from osaccel.network.policy import MaskPolicy, Region

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


def costs(bench: Bench, prompts: Sequence[str], seed: int, steps: int, warmup: int, region: Region) -> np.ndarray:
    """What skipping a step adds to the squared final error, [step, ahead, gap]; the mean over prompts."""
    return np.mean([_costs(bench, prompt, seed + number, steps, warmup, region) for number, prompt in
                    enumerate(prompts)], axis=0)  # fmt: skip


def _costs(bench: Bench, prompt: str, seed: int, steps: int, warmup: int, region: Region) -> np.ndarray:
    deltas: List[torch.Tensor] = []
    plain = bench.sample(Arm(lambda own: recorded(own, region, deltas), steps), prompt, seed).latents
    errors = forecast_errors(deltas)
    probed = sorted({*np.linspace(max(warmup, 2), steps - 1, 8).astype(int).tolist()})
    sensitivities = []
    for skipped in probed:
        policy = MaskPolicy(region, [step != skipped for step in range(steps)], forecast=True)
        attach = lambda own, policy=policy: Generation(own, policy=policy)  # noqa: E731
        final = bench.sample(Arm(attach, steps), prompt, seed).latents
        square = float((final - plain).square().sum() / plain.square().sum())
        sensitivities.append(max(square, 1e-16) / errors[skipped, 1, 1])
    every = np.exp(np.interp(np.arange(steps), probed, np.log(sensitivities)))
    return errors * every[:, None, None]


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
