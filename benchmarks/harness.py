# SPDX-License-Identifier: Apache-2.0
"""Samples every arm of a cache comparison under the same conditions.

All arms follow one Brownian motion per prompt, so runs with fewer steps are coupled to the plain run as well; each
generation gets a copy of the transformer, so nothing an arm leaves behind reaches another; and a block counts as
computed when its feed-forward runs, whatever the arm itself reports.
"""

import contextlib
import copy
import time
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, NamedTuple, Sequence

import numpy as np
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as scheduling

from benchmarks.measures import Motion
from benchmarks.reference.data import CAPTION_WORDS
from benchmarks.reference.load import GUIDANCE, STEPS, judge
from benchmarks.schedules import latent_shape
from osaccel.demo.compare import ssim
from osaccel.search.dit_cache.evaluate import psnr
from osaccel.search.timesteps.denoised import NoiseLevels


class Arm(NamedTuple):
    """One way to sample: `attach(pipeline)` is entered around one generation with a fresh transformer."""

    attach: Callable[[Any], ContextManager] = contextlib.nullcontext
    steps: int = STEPS


class Sample(NamedTuple):
    """Final latents (1, C, T, H, W), uint8 frames (T, H, W, 3), real block calls, seconds of denoising."""

    latents: torch.Tensor
    frames: np.ndarray
    computed: int
    seconds: float


class Bench:
    """Samples arms on one pipeline.

    Args:
        pipeline: the miniature's, with its EulerAncestralDiscrete scheduler.
        counts: every number of steps that an arm of this comparison takes; the noise depends on them.
    """

    def __init__(self, pipeline: Any, counts: Iterable[int]):
        self.pipeline, self.levels = pipeline, NoiseLevels(pipeline.scheduler)
        self.num_blocks = len(pipeline.transformer.transformer_blocks)
        self.times = {count: self._timesteps(count) for count in sorted({*counts})}
        self.sigmas = [self.levels.sigma(time) for times in self.times.values() for time in times]

    def _timesteps(self, count: int) -> List[float]:
        self.pipeline.scheduler.set_timesteps(count)
        return self.pipeline.scheduler.timesteps.tolist()

    def sample(self, arm: Arm, prompt: str, seed: int) -> Sample:
        motion = Motion(self.sigmas, (1, *latent_shape(self.pipeline)), seed)
        noise = motion.patched(scheduling, self.levels, self.times[arm.steps])
        with self._own_transformer() as transformer, counted(transformer) as calls, arm.attach(self.pipeline), noise:
            started = time.perf_counter()
            latents = self.pipeline(
                prompt, num_inference_steps=arm.steps, guidance_scale=GUIDANCE, max_sequence_length=CAPTION_WORDS,
                latents=motion.initial(), output_type="latent",
            ).images  # fmt: skip
            seconds = time.perf_counter() - started
        with torch.no_grad():
            frames = self.pipeline.decode_latents(latents)[0].numpy()
        return Sample(latents, frames, len(calls), seconds)

    @contextlib.contextmanager
    def _own_transformer(self) -> Iterator[torch.nn.Module]:
        original = self.pipeline.transformer
        self.pipeline.transformer = copy.deepcopy(original)
        try:
            yield self.pipeline.transformer
        finally:
            self.pipeline.transformer = original


@contextlib.contextmanager
def counted(transformer: torch.nn.Module) -> Iterator[List[int]]:
    """Yields a list to which every block that really runs appends its index."""
    calls: List[int] = []
    handles = [
        block.ff.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
        for index, block in enumerate(transformer.transformer_blocks)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def meet_budget(compute: Callable[[float], float], budget: int, slack: int, rounds: int = 12) -> float:
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
    return 10**best


def run_arms(bench: Bench, arms: Dict[str, Arm], prompts: Sequence[str]) -> Dict[str, List[Sample]]:
    """Every arm on every prompt; for odd prompts in reverse order, so that no arm is always first."""
    samples: Dict[str, List[Sample]] = {name: [] for name in arms}
    for seed, prompt in enumerate(prompts):
        for name in sorted(arms, key=list(arms).index, reverse=bool(seed % 2)):
            samples[name].append(bench.sample(arms[name], prompt, seed))
    return samples


def interval(values: Sequence[float], mean: Callable[..., Any] = np.mean) -> List[float]:
    """The mean and its 95 % bootstrap interval over prompts."""
    draws = mean(np.random.default_rng(0).choice(np.asarray(values), (2000, len(values))), axis=1)
    return [float(mean(values)), *map(float, np.percentile(draws, [2.5, 97.5]))]


def judged(samples: List[Sample], reference: List[Sample], prompts: Sequence[str]) -> Dict[str, Any]:
    """One arm's row; fidelity is against the reference run of the same noise, and absent for the reference itself."""
    row: Dict[str, Any] = {
        "computed": float(np.mean([sample.computed for sample in samples])),
        "speedup": interval([base.seconds / own.seconds for own, base in zip(samples, reference)], np.median),
        "as_prompted": interval([judge(sample.frames, prompt)["valid"] for sample, prompt in zip(samples, prompts)]),
    }
    if samples is not reference:
        pairs = list(zip(samples, reference))
        each = [float((own.latents - base.latents).norm() / base.latents.norm()) for own, base in pairs]
        row["latent_error"], row["latent_error_each"] = interval(each), each
        row["psnr"] = interval([psnr(own.frames, base.frames) for own, base in pairs])
        row["ssim"] = interval([ssim(own.frames, base.frames) for own, base in pairs])
    return row
