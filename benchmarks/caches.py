# SPDX-License-Identifier: Apache-2.0
"""Caches at equal computed blocks on the trained miniature: `python -m benchmarks.caches`.

Every arm samples the same held-out prompts from the same noise, prompt by prompt. Rules with a threshold get the one
that meets the budget of computed blocks on a calibration prompt. Fidelity is against the plain 100-step run; plain 50
steps draws other noise by design, so only the parser judges it. Intervals are 95 % bootstrap over prompts.
"""

import argparse
import json
import time
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import torch

from benchmarks.reference.load import GUIDANCE, STEPS, calibration_prompts, heldout_prompts, judge, load_pipeline
from benchmarks.rules import FirstBlockCache, MagCache, Rule, TaylorSeer, TeaCache
from osaccel.cache.config import DitCacheConfig
from osaccel.cache.policy import IntervalPolicy, computed_blocks
from osaccel.demo.compare import psnr, ssim
from osaccel.generation import Generation

WARMUP = 10
REGION = DitCacheConfig(cache_block_start=1, cache_num_blocks=10, cache_step_start=WARMUP, cache_step_interval=2)


class Sample(NamedTuple):
    latents: torch.Tensor
    frames: np.ndarray
    computed: int
    seconds: float


def generate(pipeline: Any, prompt: str, seed: int, steps: int = STEPS) -> torch.Tensor:
    torch.manual_seed(seed)
    return pipeline(
        prompt, negative_prompt="", num_inference_steps=steps, guidance_scale=GUIDANCE, max_sequence_length=16,
        output_type="latent",
    ).images  # fmt: skip


def finished(pipeline: Any, latents: torch.Tensor, computed: int, started: float) -> Sample:
    seconds = time.perf_counter() - started
    with torch.no_grad():
        frames = pipeline.decode_latents(latents)[0].numpy()
    return Sample(latents, frames, computed, seconds)


def plain(pipeline: Any, steps: int) -> Callable[[str, int], Sample]:
    def sample(prompt: str, seed: int) -> Sample:
        started = time.perf_counter()
        latents = generate(pipeline, prompt, seed, steps)
        return finished(pipeline, latents, steps * len(pipeline.transformer.transformer_blocks), started)

    return sample


def region(pipeline: Any, config: DitCacheConfig) -> Callable[[str, int], Sample]:
    def sample(prompt: str, seed: int) -> Sample:
        with Generation(pipeline, policy=IntervalPolicy(config)) as generation:
            started = time.perf_counter()
            latents = generate(pipeline, prompt, seed)
            return finished(pipeline, latents, generation.cache.computed_blocks, started)

    return sample


def ruled(rule: Rule) -> Callable[[str, int], Sample]:
    def sample(prompt: str, seed: int) -> Sample:
        rule.reset()
        with rule:
            started = time.perf_counter()
            latents = generate(rule.pipeline, prompt, seed)
        return finished(rule.pipeline, latents, rule.computed, started)

    return sample


def meet_budget(rule: Rule, budget: int, rounds: int = 9) -> Rule:
    """Set the lowest threshold whose computed blocks stay within the budget on a calibration prompt, by bisection."""
    prompt, low, high = calibration_prompts(1)[0], 0.0, 1.0
    for _ in range(rounds):
        rule.threshold = (low + high) / 2
        if ruled(rule)(prompt, 10**6).computed > budget:
            low = rule.threshold
        else:
            high = rule.threshold
    rule.threshold = high
    return rule


def make_arms(pipeline: Any) -> Dict[str, Callable[[str, int], Sample]]:
    budget = computed_blocks(IntervalPolicy(REGION), len(pipeline.transformer.transformer_blocks), STEPS)
    prompt = calibration_prompts(1)[0]
    for rule in (TeaCache, MagCache):
        rule.calibrate(pipeline, lambda: generate(pipeline, prompt, 10**6))
    arms = {
        "plain 100": plain(pipeline, STEPS),
        "plain 50": plain(pipeline, STEPS // 2),
        "osaccel, blocks 1-10, interval 2": region(pipeline, REGION),
        "TaylorSeer order 1, interval 2": ruled(TaylorSeer(pipeline, 2, WARMUP)),
    }
    for rule in (FirstBlockCache, TeaCache, MagCache):
        arms[rule.__name__] = ruled(meet_budget(rule(pipeline, 0.0, WARMUP), budget))
    return arms


def interval(values: Sequence[float]) -> List[float]:
    draws = np.random.default_rng(0).choice(np.asarray(values), (2000, len(values))).mean(axis=1)
    return [float(np.mean(values)), *map(float, np.percentile(draws, [2.5, 97.5]))]


def compare(samples: List[Sample], reference: List[Sample], prompts: Sequence[str], same_noise: bool) -> Dict[str, Any]:
    row: Dict[str, Any] = {
        "computed": float(np.mean([sample.computed for sample in samples])),
        "speedup": interval([base.seconds / sample.seconds for sample, base in zip(samples, reference)]),
        "as_prompted": interval([judge(sample.frames, prompt)["valid"] for sample, prompt in zip(samples, prompts)]),
    }
    if same_noise and samples is not reference:
        pairs = list(zip(samples, reference))
        row["latent_error"] = interval([float((a.latents - b.latents).norm() / b.latents.norm()) for a, b in pairs])
        row["psnr"] = interval([psnr(a.frames, b.frames) for a, b in pairs])
        row["ssim"] = interval([ssim(a.frames, b.frames) for a, b in pairs])
    return row


def show(rows: Dict[str, Dict[str, Any]]) -> str:
    head = f"{'':<34}{'blocks':>8}{'latent rel. L2':>24}{'PSNR dB':>20}{'SSIM':>7}{'as prompted':>13}{'speed-up':>10}"
    lines = [head]
    for name, row in rows.items():
        error, quality = row.get("latent_error"), row.get("psnr")
        errors = f"{error[0]:.4f} ({error[1]:.4f}-{error[2]:.4f})" if error else "-"
        decibels = f"{quality[0]:.1f} ({quality[1]:.1f}-{quality[2]:.1f})" if quality else "-"
        likeness = f"{row['ssim'][0]:.3f}" if "ssim" in row else "-"
        lines.append(
            f"{name:<34}{row['computed']:>8.0f}{errors:>24}{decibels:>20}{likeness:>7}"
            f"{100 * row['as_prompted'][0]:>11.0f} %{row['speedup'][0]:>9.2f}x"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts (12)")
    parser.add_argument("--json", help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline, prompts = load_pipeline(), heldout_prompts(arguments.prompts)
    rows, reference = {}, []
    for name, sample in make_arms(pipeline).items():
        samples = [sample(prompt, seed) for seed, prompt in enumerate(prompts)]
        reference = reference or samples
        rows[name] = compare(samples, reference, prompts, same_noise=name != "plain 50")
    print(show(rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
