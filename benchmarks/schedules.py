# SPDX-License-Identifier: Apache-2.0
"""Timestep lists judged on the trained miniature: searched on calibration prompts, measured on held-out ones.

    python -m benchmarks.schedules --work DIR [--seconds 700] [--prompts 129] [--steps 50 20] [--json FILE]

All arms of one video share the initial noise and the Brownian motion. Fresh data are encoded videos of the same
prompts; the floor is the same measure between two sets of such data. Every batch is kept in DIR: after --seconds what
is there is measured, and the same command goes on with the batches that are missing.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch

from benchmarks.lib import measures, models
from benchmarks.lib.jobs import in_processes
from benchmarks.lib.kept import Kept, made_by, weights_digest
from benchmarks.lib.lists import lists_of
from benchmarks.lib.motion import Motion, euler_ancestral
from benchmarks.lib.own import along
from benchmarks.reference import data, load
from benchmarks.reference.paths import CHECKPOINT
from osaccel.interceptors import Interceptor, StepCall
from osaccel.sampling.levels import NoiseLevels
from osaccel.search.timesteps import lists as timesteps
from osaccel.search.timesteps.denoised import DenoiserLog

MODEL = models.model("miniature")
TEACHER_STEPS = 100
SEEDS_PER_PROMPT = 2


class Batch(NamedTuple):
    """Prompts that are sampled together, the seed of their noise, and what their latents are kept as."""

    prompts: Sequence[str]
    seed: int
    name: str


class _Rows(Interceptor):
    """A log for each video of the batch."""

    def __init__(self, logs: Sequence[DenoiserLog]):
        self.logs = logs

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        for number, log in enumerate(self.logs):
            row = slice(number, number + 1)
            log.observe(call.model_output[row], call.timestep, call.sample[row])
        return proceed(call)


def logged(pipeline: Any, prompts: Sequence[str], seed: int, batch: int = 8) -> List[DenoiserLog]:
    """What OSACCEL_SEARCH=restep logs, a log for each prompt's generation; in batches, to save time here."""
    logs = [DenoiserLog(pipeline.scheduler) for _ in prompts]
    torch.manual_seed(seed)
    for start in range(0, len(prompts), batch):
        rows = logs[start : start + batch]
        with along(pipeline, None, _Rows(rows)):
            noise = torch.randn(len(rows), *MODEL.latent_shape(pipeline))
            MODEL.generate(pipeline, prompts[start : start + batch], TEACHER_STEPS, noise)
        for log in rows:
            log.end_generation()
    return logs


def joined(logs: Sequence[DenoiserLog]) -> timesteps.Statistics:
    """The statistics of one search that saw all these generations."""
    parts = [log.statistics() for log in logs]
    distances, powers = (np.mean([getattr(part, name) for part in parts], axis=0) for name in ("distances", "powers"))
    return parts[0]._replace(distances=distances, powers=powers)


def search(pipeline: Any, options: argparse.Namespace) -> Dict[str, Any]:
    """The arms' lists, and the wdp lists that other calibration prompts and noise lead to."""
    size = options.calibration
    logs = logged(pipeline, load.calibration_prompts(size * options.seeds), seed=1, batch=options.batch)
    searches = [joined(logs[start : start + size]) for start in range(0, len(logs), size)]
    lists = lists_of(searches[0], options.steps, options.variants)
    spread = {str(count): spread_of([timesteps.wdp(one, [count])[count] for one in searches], count)
              for count in options.steps}  # fmt: skip
    singles = {str(count): spread_of([timesteps.wdp(joined([log]), [count])[count] for log in logs], count)
               for count in options.steps}  # fmt: skip
    return {"lists": lists, "seeds": spread, "seeds, one generation each": singles, "calibration": size}


def spread_of(lists: Sequence[np.ndarray], count: int) -> Dict[str, Any]:
    """How much lists differ per entry, standard deviation in timesteps."""
    deviation = np.std(lists, axis=0)
    return {"searches": len(lists), "mean": float(deviation.mean()), "largest": float(deviation.max()),
            "even gap": 999 / (count - 1), "lists": np.array(lists).tolist()}  # fmt: skip


def sample_batch(pipeline: Any, lists: Dict[str, List[float]], prompts: Sequence[str], seed: int) -> Dict[str, Any]:
    """Final latents per arm, coupled."""
    levels = NoiseLevels(pipeline.scheduler)
    sigmas = [levels.sigma(value) for values in lists.values() for value in values]
    finals = {}
    for name, times in lists.items():
        motion = Motion(sigmas, (len(prompts), *MODEL.latent_shape(pipeline)), seed)
        with motion.patched(euler_ancestral, levels, times), along(pipeline, times):
            finals[name] = MODEL.generate(pipeline, prompts, len(times), motion.initial())
    return finals


def batches(prompts: Sequence[str], options: argparse.Namespace) -> List[Batch]:
    """The prompts in batches."""
    step = max(1, options.batch // SEEDS_PER_PROMPT)
    parts = [prompts[start : start + step] for start in range(0, len(prompts), step)]
    return [Batch(part, 5000 + n, f"batch-{n:03d}") for n, part in enumerate(parts)]


def make_batches(
    share: int,
    lists: Dict[str, List[float]],
    todo: Sequence[Batch],
    options: argparse.Namespace,
    kept: Kept,
    until: float,
) -> None:
    """Sample this job's share of the batches, as long as another one would be ready before `until`."""
    pipeline, longest = load.load_pipeline(checkpoint=options.checkpoint), 0.0
    for batch in todo[share :: options.jobs]:
        if kept.has(batch.name):
            continue
        if time.time() + longest > until:
            break
        begun = time.time()
        rows = [prompt for prompt in batch.prompts for _ in range(SEEDS_PER_PROMPT)]
        kept.put(batch.name, sample_batch(pipeline, lists, rows, batch.seed))
        longest = max(longest, time.time() - begun)
        print(f"{batch.name} of {len(todo)} batches", flush=True)


def sample_all(lists: Dict[str, List[float]], options: argparse.Namespace, kept: Kept, until: float) -> Dict[str, Any]:
    """Every batch that is there or fits before `until`: {"prompts": [...], "finals": {arm: latents}}."""
    todo = batches(prompts_of(options), options)
    threads = max(1, torch.get_num_threads() // options.jobs)
    calls = [(share, lists, todo, options, kept, until) for share in range(options.jobs)]
    in_processes(make_batches, calls, options.jobs, threads)
    done = [batch for batch in todo if kept.has(batch.name)]
    if not done:
        raise SystemExit("no batch fits into --seconds")
    parts = [kept.get(batch.name) for batch in done]
    prompts = [prompt for batch in done for prompt in batch.prompts]
    return {"prompts": prompts, "finals": {name: torch.cat([part[name] for part in parts]) for name in lists}}


def fresh_data(pipeline: Any, prompts: Sequence[str], each: int, seed: int) -> torch.Tensor:
    """Encoded videos, `each` of every prompt, (prompts * each, C, T, H, W)."""
    scenes, latents = data.by_caption(), []
    for number, prompt in enumerate(prompts):
        streams = [np.random.default_rng([seed, number, index]) for index in range(each)]
        videos = np.stack([np.asarray(data.render(scenes[prompt], stream)) for stream in streams])
        pixels = torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.no_grad():
            latents.append(pipeline.vae.encode(pixels).float())
    return torch.cat(latents)


def parser_scores(pipeline: Any, results: Dict[str, torch.Tensor], prompts: Sequence[str]) -> Dict[str, Any]:
    """Share of prompted attributes that the decoded frames show."""
    scores = {}
    for name, final in results.items():
        with torch.no_grad():
            videos = np.concatenate([pipeline.decode_latents(part).numpy() for part in final.split(8)])
        scores[name] = load.score(list(videos), prompts)
    return scores


def text(report: Dict[str, Any]) -> str:
    lines = [measures.table(report), "", "parser: share of videos that show every prompted attribute"]
    lines += [f"{name:<26}{score['valid']:.3f}" for name, score in report["parser"].items()]
    for name in ("seeds", "seeds, one generation each"):
        for count, spread in report[name].items():
            lines.append(
                f"{count} steps, {spread['searches']} searches ({name}): deviation per entry {spread['mean']:.2f} "
                f"mean, {spread['largest']:.2f} largest, of an even gap of {spread['even gap']:.1f}"
            )
    return "\n".join(lines)


def parsed(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="directory for what is finished; must be new for other lists")
    parser.add_argument("--seconds", type=float, default=700, help="no batch is begun that would end later")
    parser.add_argument("--prompts", type=int, default=129)
    parser.add_argument(
        "--split", choices=("heldout", "calibration"), default="heldout", help="calibration: for tuning"
    )
    parser.add_argument("--calibration", type=int, default=4, help="generations of one search")
    parser.add_argument("--seeds", type=int, default=5, help="searches, each with other prompts and noise")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2, help="processes that sample")
    parser.add_argument("--data", type=int, default=24, help="fresh data per prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20])
    parser.add_argument("--variants", nargs="*", default=[], help="further wdp arms, e.g. '{\"decisions\": 0.3}'")
    parser.add_argument("--arms", nargs="*", help="only arms whose name begins with one of these words")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--json")
    return parser.parse_args(arguments)


def prompts_of(options: argparse.Namespace) -> List[str]:
    if options.split == "heldout":
        return load.heldout_prompts(options.prompts)
    # Not those the searches see.
    used = options.calibration * options.seeds
    return load.calibration_prompts(used + options.prompts)[used:]


def main() -> None:
    options, started = parsed(), time.time()
    pipeline = load.load_pipeline(checkpoint=options.checkpoint)
    kept = Kept(options.work, {"weights": weights_digest(pipeline.transformer)})
    found = kept.value("search", lambda: search(pipeline, options))
    lists = found["lists"]
    if options.arms:
        lists = {name: times for name, times in lists.items() if name.startswith(("plain", *options.arms))}
    sampled = sample_all(lists, options, kept, started + options.seconds)
    prompts, results = sampled["prompts"], sampled["finals"]
    real = [fresh_data(pipeline, prompts, options.data, 1), fresh_data(pipeline, prompts, SEEDS_PER_PROMPT, 2)]
    report = measures.compare(results, real, options.steps, groups=len(prompts))
    report["parser"] = parser_scores(pipeline, results, [name for name in prompts for _ in range(SEEDS_PER_PROMPT)])
    report.update(found, lists=lists, split=options.split, seconds=time.time() - started)
    report["made by"] = made_by()
    print("\n".join(f"{name}: {value}" for name, value in made_by().items()))
    print(text(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
