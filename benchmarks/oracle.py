# SPDX-License-Identifier: Apache-2.0
"""Timestep lists judged on an exact denoiser: a Gaussian mixture, the pipeline's loop, the real scheduler.

    python -m benchmarks.oracle [--videos 1024] [--mixture SEED] [--mixtures N] [--decay 3] [--scale 1] [--json FILE]

The latents (4, 3, 8, 8) are a mixture of 8 videos' means with power-law spectra, in cosine coefficients; guidance does
not exist here, so the prediction is exact. All arms share one Brownian path per video, so their results are paired.
Several mixtures have a search each; they are compared together, and the bootstrap resamples mixtures.
"""

import argparse
import json
import math
from typing import Any, Dict, List, Sequence

import torch
from diffusers import EulerAncestralDiscreteScheduler

from benchmarks.lib import measures
from benchmarks.lib.kept import made_by
from benchmarks.lib.lists import lists_of
from benchmarks.lib.motion import Motion, euler_ancestral
from benchmarks.lib.own import along
from osaccel.sampling.levels import NoiseLevels
from osaccel.search.timesteps import lists as timesteps
from osaccel.search.timesteps.denoised import DenoiserLog, cosine_matrix

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
        x, total = self.to_coefficients(x), self.variance + sigma**2
        scaled = self.means / total
        mean = (x @ scaled.T - 0.5 * (scaled * self.means).sum(-1)).softmax(-1) @ self.means
        return self.from_coefficients(mean + (x - mean) * (self.variance / total))

    def sample(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.from_coefficients(self.means[chosen] + self.variance.sqrt() * noise)


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


def run(pipeline: Pipeline, times: Sequence[float], motion: Motion) -> torch.Tensor:
    """One batch along `times`, on the given Brownian motion."""
    with motion.patched(euler_ancestral, pipeline.transformer.levels, times), along(pipeline, times):
        return pipeline(motion.initial(), len(times))


def search_statistics(pipeline: Pipeline, videos: int, seed: int, steps: int = 100) -> timesteps.Statistics:
    """What OSACCEL_SEARCH=restep does: log plain generations."""
    log = DenoiserLog(pipeline.scheduler)
    torch.manual_seed(seed)
    for _ in range(videos):
        with along(pipeline, None, log):
            pipeline(torch.randn(1, *SHAPE), steps)
        log.end_generation()
    return log.statistics()


def sample_all(pipeline: Pipeline, lists: Dict[str, List[float]], videos: int, batch: int) -> Dict[str, torch.Tensor]:
    """Final latents per arm, (videos, C, T, H, W)."""
    finals: Dict[str, List[torch.Tensor]] = {name: [] for name in lists}
    sigmas = [pipeline.transformer.levels.sigma(value) for values in lists.values() for value in values]
    for number in range(videos // batch):
        for name, times in lists.items():
            motion = Motion(sigmas, (batch, *SHAPE), seed=1000 + number)
            finals[name].append(run(pipeline, times, motion))
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
    parser.add_argument("--json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    lists, finals, data = [], [], []
    for seed in range(options.mixture, options.mixture + options.mixtures):
        mixture = Mixture(decay=options.decay, seed=seed, scale=options.scale)
        pipeline = Pipeline(mixture)
        statistics = search_statistics(pipeline, options.calibration, seed=1)
        lists.append(lists_of(statistics, options.steps, options.variants))
        finals.append(sample_all(pipeline, lists[-1], options.videos, options.batch))
        data.append([mixture.sample(4 * options.videos, 7), mixture.sample(options.videos, 8)])
    results = {name: torch.cat([final[name] for final in finals]) for name in finals[0]}
    real = [torch.cat(parts) for parts in zip(*data)]
    groups = options.mixtures if options.mixtures > 1 else None
    report = measures.compare(results, real, options.steps, groups)
    report["lists"] = lists if groups else lists[0]
    report["made by"] = made_by()
    print("\n".join(f"{name}: {value}" for name, value in made_by().items()))
    print(measures.table(report))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
