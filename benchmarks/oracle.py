# SPDX-License-Identifier: Apache-2.0
"""Timestep lists judged on an exact denoiser: a Gaussian mixture, the pipeline's loop, the real scheduler.

    python -m benchmarks.oracle [--videos 1024] [--mixture SEED] [--mixtures N] [--decay 3] [--scale 1] [--json FILE]
    python -m benchmarks.oracle --corrections [--guidance 7.5] ...          the second-order correction instead of lists

The latents (4, 3, 8, 8) are a mixture of 8 videos' means with power-law spectra, in cosine coefficients, and the
prediction is exact. All arms share one Brownian path per video, so their results are paired. Several mixtures have a
search each; they are compared together, and the bootstrap resamples mixtures. With guidance, the prompt names two of
the eight, and in place of data are samples of 1000 plain steps, to whose distribution fewer steps should come.
"""

import argparse
import json
import math
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler

from benchmarks.lib import measures
from benchmarks.lib.kept import Kept, made_by
from benchmarks.lib.lists import lists_of
from benchmarks.lib.motion import Motion, euler_ancestral
from benchmarks.lib.own import along, with_plan
from osaccel.plan import Correction, Plan
from osaccel.sampling.levels import NoiseLevels
from osaccel.search.timesteps import lists as timesteps
from osaccel.search.timesteps.denoised import DenoiserLog, cosine_matrix
from osaccel.settings import DEFAULT_CORRECTION

SHAPE = (4, 3, 8, 8)


class Mixture:
    """p(x0) = mean over k of N(mu_k, diag) in orthonormal cosine coefficients; `denoise` is E[x0 | x0 + s z]."""

    def __init__(
        self, components: int = 8, decay: float = 3.0, between: float = 0.3, seed: int = 0, scale: float = 1.0
    ):
        generator = torch.Generator().manual_seed(seed)
        t, h, w = (torch.arange(size).float() for size in SHAPE[1:])
        radius = ((1.5 * t[:, None, None]) ** 2 + h[None, :, None] ** 2 + w[None, None, :] ** 2).sqrt()
        spectrum = (1 + radius).pow(-decay).expand(SHAPE)
        self.variance = (spectrum / spectrum.mean() * (1 - between)).reshape(-1) * scale**2
        means = torch.randn(components, *SHAPE, generator=generator) * spectrum.sqrt()
        means = means - means.mean(0)
        self.means = (means * (scale * between**0.5 / means.square().mean().sqrt())).reshape(components, -1)
        self.axes = [cosine_matrix(size) for size in SHAPE[1:]]

    def to_coefficients(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bcthw,pt,qh,rw->bcpqr", x, *self.axes).reshape(len(x), -1)

    def from_coefficients(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bcpqr,pt,qh,rw->bcthw", x.reshape(-1, *SHAPE), *self.axes)

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        return self.from_coefficients(self.expected(self.to_coefficients(x), sigma, self.means))

    def expected(self, x: torch.Tensor, sigma: float, means: torch.Tensor) -> torch.Tensor:
        """E[x0 | x] where only these means exist; in coefficients."""
        total = self.variance + sigma**2
        scaled = means / total
        mean = (x @ scaled.T - 0.5 * (scaled * means).sum(-1)).softmax(-1) @ means
        return mean + (x - mean) * (self.variance / total)

    def sample(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.from_coefficients(self.means[chosen] + self.variance.sqrt() * noise)


class Guided(Mixture):
    """Guided towards the first two components of a mixture; `sample` is what very many plain steps give."""

    NAMED, LIMIT = 2, 1000

    def __init__(self, guidance: float, **options: Any):
        super().__init__(**options)
        self.guidance = guidance

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        x = self.to_coefficients(x)
        plain = self.expected(x, sigma, self.means)
        named = self.expected(x, sigma, self.means[: self.NAMED])
        return self.from_coefficients(plain + self.guidance * (named - plain))

    def sample(self, count: int, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([Pipeline(self)(part, self.LIMIT) for part in torch.randn(count, *SHAPE).split(256)])


class Arm(NamedTuple):
    """Timesteps, descending, and the correction on them."""

    times: List[float]
    correction: Correction = Correction()


class Transformer(torch.nn.Module):
    """The mixture behind the network's interface: scaled sample and timestep in, noise prediction out."""

    def __init__(self, mixture: Mixture, levels: NoiseLevels):
        super().__init__()
        self.mixture, self.levels = mixture, levels
        self.transformer_blocks = torch.nn.ModuleList([torch.nn.Identity()])

    def forward(self, scaled: torch.Tensor, timestep: Any) -> torch.Tensor:
        sigma = self.levels.sigma(timestep)
        x = scaled * math.sqrt(1 + sigma**2)
        return (x - self.mixture.denoise(x, sigma)) / sigma


class Pipeline:
    """The upstream's loop: set_timesteps, initial noise, scale_model_input, model, step."""

    def __init__(self, mixture: Mixture):
        self.scheduler: Any = EulerAncestralDiscreteScheduler()
        self.transformer = Transformer(mixture, NoiseLevels(self.scheduler))

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, num_inference_steps: int) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        latents = latents * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            noise = self.transformer(self.scheduler.scale_model_input(latents, t), t)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


def run(pipeline: Pipeline, arm: Arm, motion: Motion) -> torch.Tensor:
    """One batch of an arm, on the given Brownian motion."""
    plan = Plan(timesteps=tuple(arm.times), correction=arm.correction)
    with motion.patched(euler_ancestral, pipeline.transformer.levels, arm.times), with_plan(pipeline, plan):
        return pipeline(motion.initial(), len(arm.times))


CORRECTIONS = {
    "corrector": Correction(0.0, 1.0),
    "predictor": Correction(1.0, 0.0),
    "default": DEFAULT_CORRECTION,
}


def corrected_arms(statistics: timesteps.Statistics, counts: Sequence[int]) -> Dict[str, Arm]:
    """Even and searched spacing, uncorrected and corrected; a search that knows of the correction as well."""
    last = float(statistics.timesteps[0])
    aware = timesteps.DEFAULTS._replace(corrector=1.0)
    arms = {}
    for count in sorted({100, *counts}, reverse=True):
        even = np.linspace(last, 0, count).tolist()
        arms[f"plain {count}"] = Arm(even)
        if count == 100:
            arms[f"default {count}"] = Arm(even, DEFAULT_CORRECTION)
            continue
        arms.update({f"{name} {count}": Arm(even, used) for name, used in CORRECTIONS.items()})
        searched, knowing = (timesteps.wdp(statistics, [count], used)[count].tolist()
                             for used in (timesteps.DEFAULTS, aware))  # fmt: skip
        arms[f"searched {count}"] = Arm(searched)
        arms[f"searched, default {count}"] = Arm(searched, DEFAULT_CORRECTION)
        arms[f"searched for it, default {count}"] = Arm(knowing, DEFAULT_CORRECTION)
    return arms


def search_statistics(pipeline: Pipeline, videos: int, seed: int, steps: int = 100) -> timesteps.Statistics:
    """What OSACCEL_SEARCH=restep does: log plain generations."""
    log = DenoiserLog(pipeline.scheduler)
    torch.manual_seed(seed)
    for _ in range(videos):
        with along(pipeline, None, log):
            pipeline(torch.randn(1, *SHAPE), steps)
        log.end_generation()
    return log.statistics()


def sample_all(pipeline: Pipeline, arms: Dict[str, Arm], videos: int, batch: int) -> Dict[str, torch.Tensor]:
    """Final latents per arm, (videos, C, T, H, W)."""
    finals: Dict[str, List[torch.Tensor]] = {name: [] for name in arms}
    sigmas = [pipeline.transformer.levels.sigma(value) for arm in arms.values() for value in arm.times]
    for number in range(videos // batch):
        for name, arm in arms.items():
            motion = Motion(sigmas, (batch, *SHAPE), seed=1000 + number)
            finals[name].append(run(pipeline, arm, motion))
    return {name: torch.cat(parts) for name, parts in finals.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1024, help="of each mixture, a multiple of --batch")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20])
    parser.add_argument("--mixture", type=int, default=0, help="seed of the mixture; the defaults were tuned on 0")
    parser.add_argument("--mixtures", type=int, default=1, help="this many, with seeds from --mixture on")
    parser.add_argument("--decay", type=float, default=3.0, help="exponent of the power-law spectrum")
    parser.add_argument("--scale", type=float, default=1.0, help="standard deviation of the latents")
    parser.add_argument("--calibration", type=int, default=4, help="generations a search sees")
    parser.add_argument("--variants", nargs="*", default=[], help="further wdp arms, e.g. '{\"decisions\": 0.3}'")
    parser.add_argument("--corrections", action="store_true", help="arms with and without the correction")
    parser.add_argument("--guidance", type=float, help="guide towards two of the eight components")
    parser.add_argument("--work", help="directory for what is finished; must be new after the code has changed")
    parser.add_argument("--json")
    return parser.parse_args()


# What a kept mixture depends on.
BOUND = ("videos", "batch", "steps", "decay", "scale", "calibration", "variants", "corrections", "guidance")


def of_mixture(seed: int, options: argparse.Namespace) -> Dict[str, Any]:
    """One mixture: its lists, the final latents of every arm, and two sets of data."""
    shape = {"decay": options.decay, "seed": seed, "scale": options.scale}
    mixture = Mixture(**shape) if options.guidance is None else Guided(options.guidance, **shape)
    pipeline = Pipeline(mixture)
    statistics = search_statistics(pipeline, options.calibration, seed=1)
    if options.corrections:
        arms = corrected_arms(statistics, options.steps)
    else:
        arms = {name: Arm(times) for name, times in lists_of(statistics, options.steps, options.variants).items()}
    more = 4 if options.guidance is None else 2  # there every datum costs a thousand steps
    return {
        "lists": {name: arm.times for name, arm in arms.items()},
        "finals": sample_all(pipeline, arms, options.videos, options.batch),
        "data": [mixture.sample(more * options.videos, 7), mixture.sample(options.videos, 8)],
    }  # fmt: skip


def goals(counts: Sequence[int]) -> List[Tuple[str, str]]:
    """What corrected steps are meant to be as good as."""
    wanted = ((50, 100), (25, 50), (25, 100), (15, 50))
    names = ("default", "searched, default", "searched for it, default")
    return [(f"{name} {count}", f"plain {rival}") for name in names for count, rival in wanted
            if count in counts and (rival == 100 or rival in counts)]  # fmt: skip


def main() -> None:
    options = parse()
    kept = Kept(options.work, {name: value for name, value in vars(options).items() if name in BOUND})
    found = []
    for seed in range(options.mixture, options.mixture + options.mixtures):
        if not kept.has(f"mixture-{seed}"):
            kept.put(f"mixture-{seed}", of_mixture(seed, options))
        found.append(kept.get(f"mixture-{seed}"))
    results = {name: torch.cat([one["finals"][name] for one in found]) for name in found[0]["finals"]}
    real = [torch.cat(parts) for parts in zip(*(one["data"] for one in found))]
    groups = options.mixtures if options.mixtures > 1 else None
    pairs = goals(options.steps) if options.corrections else []
    report = measures.compare(results, real, options.steps, groups, pairs=pairs)
    lists = [one["lists"] for one in found]
    report["lists"] = lists if groups else lists[0]
    report["made by"] = made_by()
    print("\n".join(f"{name}: {value}" for name, value in made_by().items()))
    print(measures.table(report))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
