# SPDX-License-Identifier: Apache-2.0
"""The second-order correction on a trained reference model, held-out prompts.

    python -m benchmarks.corrections --work DIR [--prompts 16] [--seconds 3000] [--json FILE]

1. The same video sooner: of the plain run's steps only some are computed and the others skipped, uncorrected and
   corrected. Relative L2 of the final latents against the plain run of the same noise.
2. Fewer steps by themselves, uncorrected and corrected, and diffusers' samplers of higher order at the same number of
   calls, each with the spacing that does best at the fewest steps: energy distance and bands against fresh data of the
   same prompts (two videos each).

3. With --response N: how much of the moves of D over two steps the response foresees, in N plain generations; and how
   much of D half way between two computed steps the straight line between them says,
   and the best weights of this move and the one before.

Every batch is kept in DIR: after --seconds what is there is measured, and the same command goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch

from benchmarks.competitors import samplers
from benchmarks.lib import measures, models
from benchmarks.lib.bench import PLAIN, Arm, Bench, Sample
from benchmarks.lib.kept import digest_of, made_by
from benchmarks.lib.models import Case
from benchmarks.lib.own import along, planned, with_plan
from benchmarks.lib.quality import STATISTICS, errors, interval, over
from benchmarks.schedules import SEEDS_PER_PROMPT, fresh_data
from osaccel.plan import UNDER_SKIP, Correction, Plan
from osaccel.schedule import ANCESTRAL
from osaccel.search.places import even_places
from osaccel.search.plan.local import Foreseen, Record
from osaccel.search.plan.observation import DenoisedLog
from osaccel.settings import DEFAULT_CORRECTION

CORRECTIONS = {
    "uncorrected": Correction(),
    "corrector": Correction(0.0, 1.0),
    # What OSACCEL_CORRECTION=1 does beside skipped steps.
    "corrector and response": UNDER_SKIP,
}


def skipping(bench: Bench, computed: int, name: str) -> Arm:
    """The plain run of which `computed` steps, spread evenly, call the network."""
    kept = even_places(bench.steps, computed)
    skip = tuple(step for step in range(bench.steps) if step not in kept)
    plan = Plan(steps=bench.steps, skip=skip, correction=CORRECTIONS[name])
    return planned(bench, plan, f"{computed} computed, {name}")._replace(key=f"skip {computed} {name}")


def fewer(bench: Bench, count: int, name: str, correction: Correction) -> Arm:
    """As many steps as calls."""

    def attach(pipeline: Any) -> Any:
        return with_plan(pipeline, Plan(correction=correction))

    title = f"{name} {count}"
    return Arm(attach, count, title, name, count / bench.steps, key=f"fewer {title} {correction}")


class Sampled:
    """Samples of arms on the same videos, batch by batch, each kept under the arm's key.

    until: no batch is begun later.
    """

    def __init__(self, bench: Bench, cases: Sequence[Case], until: float):
        self.bench, self.until = bench, until
        self.parts = [list(cases[start : start + bench.batch]) for start in range(0, len(cases), bench.batch)]

    def of(self, arm: Arm) -> List[Sample]:
        """Of every video; fewer when time is over."""
        found: List[Sample] = []
        for part in self.parts:
            name = f"batch-{digest_of([arm.key, *map(list, part)])[:16]}"
            if not self.bench.kept.has(name):
                if time.time() > self.until:
                    break
                samples = self.bench.run(arm, part)
                self.bench.kept.put(name, {"latents": torch.cat([sample.latents for sample in samples])})
                print(f"{arm.name}: {len(found) + len(part)} videos", flush=True)
            found += [Sample(latents, 0.0, 0.0) for latents in self.bench.kept.get(name)["latents"].split(1)]
        return found


def same_videos(sampled: Sampled, counts: Sequence[int]) -> Dict[str, Dict[str, Any]]:
    """By arm: errors against the plain run of the same noise, video by video, and their statistics."""
    plain = sampled.of(PLAIN._replace(key="plain"))
    rows: Dict[str, Dict[str, Any]] = {}
    for count in counts:
        for name in CORRECTIONS:
            arm = skipping(sampled.bench, count, name)
            found = errors(sampled.of(arm), plain)
            if not found:
                return rows
            rows[arm.name] = {"errors": found, **{key: interval(found, of) for key, of in STATISTICS.items()}}
            rival = rows[f"{count} computed, uncorrected"]["errors"]
            if name != "uncorrected" and len(rival) == len(found):
                rows[arm.name]["over"] = {key: over(found, rival, STATISTICS[key]) for key in ("typical", "mean")}
    return rows


def distributions(sampled: Sampled, counts: Sequence[int], others: Sequence[int], real: Any) -> Dict[str, Any]:
    """Fewer steps, corrected or not, and other samplers, against data."""
    bench, groups = sampled.bench, len(real[1]) // SEEDS_PER_PROMPT
    arms = [fewer(bench, count, name, correction) for count in counts for name, correction in (
        ("plain", Correction()), ("corrected", DEFAULT_CORRECTION))]  # fmt: skip
    results = {f"plain {bench.steps}": latents_of(sampled, PLAIN._replace(key="plain"))}
    results.update({arm.name: latents_of(sampled, arm) for arm in arms})
    if others:
        tried = {arm.name: latents_of(sampled, arm) for arm in samplers.every(min(others), bench.steps)}
        results.update(tried)
        first = measures.compare(dict(results), real, [min(others)], groups, draws=1)
        best = best_spacings(first, min(others))
        for count in sorted(others)[1:]:
            arms = [samplers.of(name, spacing, count, bench.steps) for name, spacing in best.items()]
            results.update({arm.name: latents_of(sampled, arm) for arm in arms})
    return measures.compare(results, real, sorted({*counts, *others}, reverse=True), groups)


def foreseen_shares(logs: Sequence[DenoisedLog], steps: Sequence[int]) -> Dict[str, List[float]]:
    """R^2 of what the response foresees of D's move over two steps, place by place and with one slope for a video."""
    left: Dict[str, torch.Tensor] = {name: torch.zeros(len(steps)) for name in ("places", "videos", "moved")}
    for log in logs:
        denoised, noise = torch.stack(log.rows), torch.stack(log.noise)
        for place, step in enumerate(steps):
            left["moved"][place] += (denoised[step + 2] - denoised[step]).square().sum()
            # Without frames there is one slope for a video.
            for name, shown in (("places", (denoised, noise)), ("videos", (denoised.flatten(2), noise.flatten(2)))):
                foreseen = _foreseen(log.sigmas, *shown, step)
                left[name][place] += (shown[0][step + 2] - foreseen).square().sum()
    return {name: (1 - left[name] / left["moved"]).tolist() for name in ("places", "videos")}


def between_shares(generations: Sequence[Sequence[torch.Tensor]], steps: Sequence[int]) -> Dict[str, List[float]]:
    """R^2 of what D_step and D_(step+2) say of D_(step+1): the line between them; the best weights of both moves.

    generations: of each, D at every step.
    """
    products = torch.zeros(len(steps), 3, 3, dtype=torch.float64)
    for rows in generations:
        for place, step in enumerate(steps):
            moves = [rows[step] - rows[step - 2], rows[step + 2] - rows[step], rows[step + 1] - rows[step]]
            shown = torch.stack([move.flatten() for move in moves]).double()
            products[place] += shown @ shown.T
    squares, along = products[:, 2, 2], products[:, :2, 2]
    line = (products[:, 1, 2] - products[:, 1, 1] / 4) / squares
    best = (torch.linalg.solve(products[:, :2, :2], along) * along).sum(1) / squares
    return {"line": line.tolist(), "best weights": best.tolist()}


def watched(bench: Bench, case: Case) -> DenoisedLog:
    """What a plain generation predicted, and the noise that it drew."""
    log = DenoisedLog()
    bench.run(Arm(lambda pipeline: along(pipeline, None, log), alone=True), [case])
    return log


def _foreseen(sigmas: Sequence[float], denoised: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
    """D two steps behind `step`, as the response foresees it by the two before."""
    nothing = torch.zeros(0)
    record = Record(denoised, nothing, sigmas, nothing, [], ANCESTRAL, noise=noise)
    return Foreseen(record, step - 2, step).at(step + 2)


def best_spacings(report: Dict[str, Any], count: int) -> Dict[str, str]:
    """By sampler, the spacing with the least energy distance at this number of steps."""

    def distance(name: str, spacing: str) -> float:
        return float(report["arms"][f"{name}, {spacing} {count}"]["energy distance"][0])

    return {name: min(samplers.SPACINGS, key=lambda spacing: distance(name, spacing)) for name in samplers.MAKERS}


def latents_of(sampled: Sampled, arm: Arm) -> torch.Tensor:
    found = sampled.of(arm)
    if len(found) < sum(map(len, sampled.parts)):
        raise SystemExit(f"{arm.name}: not all videos fit into --seconds; run the same command again")
    return torch.cat([sample.latents for sample in found])


def text(rows: Dict[str, Dict[str, Any]]) -> str:
    """A line per arm of the first table."""
    lines = [f"{'same noise, error against plain':<38}" + "".join(f"{name:>27}" for name in STATISTICS)
             + f"{'typical over uncorrected':>32}{'mean over uncorrected':>32}"]  # fmt: skip
    for name, row in rows.items():
        cells = ["{:.4f} [{:.4f}, {:.4f}]".format(*row[key]) for key in STATISTICS]
        more = ["{:+.0%} [{:+.0%}, {:+.0%}]".format(*value) for value in row.get("over", {}).values()]
        lines.append(f"{name:<38}" + "".join(f"{cell:>27}" for cell in cells) + "".join(f"{c:>32}" for c in more))
    return "\n".join(lines)


def _rows(shares: Dict[str, List[float]]) -> str:
    return "\n".join(f"{name:<13}" + " ".join(f"{value:6.3f}" for value in found) for name, found in shares.items())


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="directory for what is finished")
    parser.add_argument("--seconds", type=float, default=3000, help="no batch is begun later")
    parser.add_argument("--prompts", type=int, default=16, help=f"held out, {SEEDS_PER_PROMPT} videos of each")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--computed", type=int, nargs="*", default=[67, 50, 34, 25], help="of the steps, by skipping")
    parser.add_argument("--steps", type=int, nargs="*", default=[67, 50, 34, 25], help="fewer steps, corrected or not")
    parser.add_argument("--samplers", type=int, nargs="*", default=[50, 25], help="steps of other samplers")
    parser.add_argument("--data", type=int, default=24, help="fresh data per prompt")
    parser.add_argument(
        "--response", type=int, default=0, metavar="N", help="plain generations to look at D's moves in"
    )
    parser.add_argument("--json")
    models.add_options(parser)
    return parser.parse_args()


def main() -> None:
    options, started = parsed(), time.time()
    torch.set_num_threads(1)
    model, pipeline = models.load(options)
    bench = Bench(model, pipeline, batch=options.batch, folder=options.work)
    prompts = model.heldout(options.prompts)
    rows = [prompt for prompt in prompts for _ in range(SEEDS_PER_PROMPT)]
    sampled = Sampled(bench, [Case(prompt, n) for n, prompt in enumerate(rows)], started + options.seconds)
    report: Dict[str, Any] = {"made by": made_by(), "videos": len(rows), "default": str(DEFAULT_CORRECTION)}
    print("\n".join(f"{name}: {value}" for name, value in made_by().items()))
    report["same videos"] = same_videos(sampled, options.computed)
    print(text(report["same videos"]), flush=True)
    if options.response:
        steps = [round(part * bench.steps) for part in (0.4, 0.6, 0.7, 0.8, 0.88, 0.94)]
        logs = [watched(bench, case) for case in model.calibration_cases(options.response, 10**6)]
        shares = foreseen_shares(logs, steps)
        report["response"] = {"steps": steps, **shares}
        print(f"of D's moves over two steps from {steps} the response foresees, R^2:")
        print(_rows(shares))
        between = between_shares([log.rows for log in logs], steps)
        report["between"] = {"steps": steps, **between}
        print("of its moves over one step, once the second is known, R^2:")
        print(_rows(between))
    # Fresh data can be drawn for the miniature only.
    if options.model == "miniature" and (options.steps or options.samplers):
        real = [fresh_data(pipeline, prompts, options.data, 1), fresh_data(pipeline, prompts, SEEDS_PER_PROMPT, 2)]
        report["distributions"] = distributions(sampled, options.steps, options.samplers, real)
        print(measures.table(report["distributions"]))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
