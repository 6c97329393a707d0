# SPDX-License-Identifier: Apache-2.0
"""Timestep lists judged on the trained miniature: searched on calibration prompts, measured on held-out ones.

    python -m benchmarks.schedules [--videos 48] [--steps 50 20] [--seeds 5] [--exponents 1] [--json FILE]

All arms of one prompt share the initial noise and the Brownian motion. Fresh data are encoded videos of the held-out
prompts; the floor is the same measure between two halves of such data.
"""

import argparse
import json
import time
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as scheduling

from benchmarks import measures, oracle
from benchmarks.reference import data, load
from osaccel.generation import Generation
from osaccel.search import timesteps
from osaccel.search.denoiser_log import DenoiserLog, NoiseLevels, step_arguments


def latent_shape(pipeline: Any) -> Sequence[int]:
    frames, height, width = pipeline.vae.vae_scale_factor
    return (pipeline.transformer.config.in_channels, (data.FRAMES - 1) // frames + 1, data.SIZE // height,
            data.SIZE // width)  # fmt: skip


def generate(pipeline: Any, prompts: Sequence[str], steps: int, latents: torch.Tensor, kind: str = "latent") -> Any:
    return pipeline(
        list(prompts), num_inference_steps=steps, guidance_scale=load.GUIDANCE, num_frames=data.FRAMES,
        height=data.SIZE, width=data.SIZE, latents=latents, output_type=kind,
    ).images  # fmt: skip


def search_statistics(pipeline: Any, prompts: Sequence[str], seed: int, steps: int = 100) -> timesteps.Statistics:
    """What OSACCEL_SEARCH=restep logs, one generation per prompt."""
    log = DenoiserLog(pipeline.scheduler)
    torch.manual_seed(seed)
    for prompt in prompts:
        with Generation(pipeline, step=log.step):
            generate(pipeline, [prompt], steps, torch.randn(1, *latent_shape(pipeline)))
        log.end_generation()
    return log.statistics()


def sample_arms(pipeline: Any, lists: Dict[str, List[float]], prompts: Sequence[str], batch: int) -> Dict[str, Any]:
    """Final latents per arm, coupled within a prompt."""
    levels = NoiseLevels(pipeline.scheduler)
    sigmas = [levels.sigma(value) for values in lists.values() for value in values]
    finals: Dict[str, List[torch.Tensor]] = {name: [] for name in lists}
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        for name, times in lists.items():
            motion = measures.Motion(sigmas, (len(part), *latent_shape(pipeline)), seed=5000 + start)
            with motion.patched(scheduling, levels, times), Generation(pipeline, timesteps=times):
                finals[name].append(generate(pipeline, part, len(times), motion.initial()))
        print(f"{start + len(part)} of {len(prompts)} prompts", flush=True)
    return {name: torch.cat(parts) for name, parts in finals.items()}


def fresh_data(pipeline: Any, prompts: Sequence[str], seed: int) -> torch.Tensor:
    """Encoded videos of the same prompts, (N, C, T, H, W)."""
    scenes, latents = data.by_caption(), []
    for number, prompt in enumerate(prompts):
        video = np.asarray(data.render(scenes[prompt], np.random.default_rng(seed * 100003 + number)))
        pixels = torch.from_numpy(video).float()
        pixels = pixels / 127.5 - 1 if video.dtype == np.uint8 else pixels * 2 - 1
        latents.append(pipeline.vae.encode(pixels.permute(3, 0, 1, 2)[None]).float())
    return torch.cat(latents)


def parser_scores(pipeline: Any, results: Dict[str, torch.Tensor], prompts: Sequence[str]) -> Dict[str, Any]:
    """Share of prompted attributes that the decoded frames show."""
    scores = {}
    for name, final in results.items():
        videos = np.concatenate([pipeline.decode_latents(part).numpy() for part in final.split(8)])
        scores[name] = load.score(videos, prompts)
    return scores


def seed_spread(pipeline: Any, counts: Sequence[int], seeds: int) -> Dict[str, Any]:
    """The wdp lists found from one generation each, with other prompts and noise: spread per entry, in timesteps."""
    logs = [DenoiserLog(pipeline.scheduler) for _ in range(seeds)]

    def step(original: Any, args: tuple, kwargs: dict) -> Any:
        output, timestep, sample = step_arguments(args, kwargs)
        for number, log in enumerate(logs):
            log.observe(output[number : number + 1], timestep, sample[number : number + 1])
        return original(*args, **kwargs)

    torch.manual_seed(40)
    prompts = load.calibration_prompts(100)[-seeds:]
    with Generation(pipeline, step=step):
        generate(pipeline, prompts, 100, torch.randn(seeds, *latent_shape(pipeline)))
    found: Dict[int, List[np.ndarray]] = {count: [] for count in counts}
    for log in logs:
        log.end_generation()
        for count, values in timesteps.wdp(log.statistics(), counts).items():
            found[count].append(values)
    spread = {}
    for count, lists in found.items():
        deviation = np.std(lists, axis=0)
        even = 999 / (count - 1)
        spread[str(count)] = {"mean": float(deviation.mean()), "largest": float(deviation.max()),
                              "even gap": even, "lists": np.array(lists).tolist()}  # fmt: skip
    return spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--calibration", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20])
    parser.add_argument("--seeds", type=int, default=0, help="repeat the search with this many seeds")
    parser.add_argument("--exponents", type=float, nargs="*", default=[], help="further wdp arms with this weight")
    parser.add_argument("--arms", nargs="*", help="only arms whose name begins with one of these words")
    parser.add_argument("--json")
    options = parser.parse_args()
    started = time.time()
    pipeline = load.load_pipeline()
    statistics = search_statistics(pipeline, load.calibration_prompts(options.calibration), seed=1)
    lists = oracle.arms(statistics, options.steps)
    for count in options.steps:
        for exponent in options.exponents:
            given = timesteps.Parameters(exponent)
            lists[f"wdp g={exponent:g} {count}"] = timesteps.wdp(statistics, [count], given)[count].tolist()
    if options.arms:
        lists = {name: times for name, times in lists.items() if name.startswith(("plain", *options.arms))}
    prompts = load.heldout_prompts(options.videos)
    with torch.no_grad():
        results = sample_arms(pipeline, lists, prompts, options.batch)
        reference = [fresh_data(pipeline, prompts, seed) for seed in (1, 2)]
        if options.seeds:
            spread = seed_spread(pipeline, options.steps, options.seeds)
            print({count: (value["mean"], value["largest"]) for count, value in spread.items()}, flush=True)
        report = measures.compare(results, reference, options.steps)
        report["parser"] = parser_scores(pipeline, results, prompts)
        report["lists"] = lists
        if options.seeds:
            report["seeds"] = spread
    report["seconds"] = time.time() - started
    print(measures.table(report))
    print("\nparser: share of videos with all prompted attributes")
    for name, score in report["parser"].items():
        print(f"{name:<18}{score['valid']:.3f}")
    for count, spread in report.get("seeds", {}).items():
        print(f"{count} steps, {options.seeds} seeds: deviation per entry {spread['mean']:.2f} mean, "
              f"{spread['largest']:.2f} largest, of an even gap of {spread['even gap']:.1f}")  # fmt: skip
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
