# SPDX-License-Identifier: Apache-2.0
"""What the cache search believes before it measures anything, from calibration prompts alone, on the trained miniature.

    python -m benchmarks.belief --jobs 2

`MISSED` and `CALL` of `osaccel.search.cache_search`: how log errors differ from predicted ones, on average over calls
and from call to call. Every candidate of the families of three speed-ups runs on a few calls; the two are what makes
the errors of the better candidates of each family most likely. `TURNS` of `osaccel.search.error_model`: configurations
that reuse at high noise run on many prompts; how many videos turn into others, over the lasting change early on.

Finished evaluations are kept in the journals of `benchmarks.search`, so an interrupted run goes on and the two share
them, one running after the other. Writes OUT/belief.md.
"""

import argparse
import math
import multiprocessing
from pathlib import Path
from typing import List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import binomtest

from benchmarks.reference.load import STEPS, calibration_prompts
from benchmarks.reference.paths import CHECKPOINT
from benchmarks.search import NAMES, RATIOS, TURNED, Bench, Case
from osaccel.cache.executor import HiddenStates
from osaccel.search import cache_search, error_model, probes
from osaccel.search.boundaries import Boundaries
from osaccel.search.cache_search import MAX_INTERVAL, Candidate, Variation, candidates, features
from osaccel.search.error_model import Predictions, predictions
from osaccel.search.observe import watch_blocks
from osaccel.search.regions import RegionErrors
from osaccel.search.replay import Replay
from osaccel.search.team import Team

# Of each family, the share of candidates that a search may end at; what is far worse does not follow the same rules.
BETTER = 0.3
# Configurations that reuse from the first steps on.
EARLY = {1.5: Candidate(4, 12, 0, 2), 1.8: Candidate(0, 11, 1, 2)}
SEED, TURN_SEED = 7, 20000


class Family(NamedTuple):
    """The better candidates: `missed` (call, candidate) are log errors over predicted ones."""

    features: np.ndarray
    missed: np.ndarray


def predicted(bench: Bench, pool: Sequence[Candidate], case: Case) -> Predictions:
    """What a search predicts from this call."""
    replay, errors = Replay(bench.call(case)), RegionErrors(len(bench.blocks), MAX_INTERVAL - 1)
    replay.boundaries = Boundaries()
    states = HiddenStates(NAMES)
    replay.record(
        lambda g: watch_blocks(bench.blocks, g.clock, states, errors.observe, replay.boundaries.observe), decode=False
    )
    grams = errors.tensor(bench.steps).numpy()
    gains, _ = probes.measure(replay, grams, [c.start for c in pool], [c.stop for c in pool], Team())
    return predictions(pool, grams, gains)


def family(bench: Bench, pool: Sequence[Candidate], cases: Sequence[Case], found: Sequence[Predictions]) -> Family:
    """Every candidate on every call."""
    logs = []
    for case in cases:
        logs.append([math.log(bench.error(candidate, case)) for candidate in pool])
        bench.forget(case)
    errors = np.array(logs)
    better = np.argsort(errors.mean(0), kind="stable")[: int(BETTER * len(pool))]
    missed = errors - np.log([one.errors for one in found])
    return Family(features(pool, len(bench.blocks), bench.steps)[better], missed[:, better])


def unlikelihood(family: Family, missed: Variation, call: Variation) -> float:
    """-log of the likelihood of a family's errors, up to a constant; what all candidates share is left out."""
    calls, count = family.missed.shape
    over_candidates, over_calls = contrasts(count), contrasts(calls)
    own = over_candidates.T @ call.covariance(family.features, family.features) @ over_candidates
    shared = over_candidates.T @ missed.covariance(family.features, family.features) @ over_candidates + own / calls
    values = family.missed @ over_candidates
    return _unlikelihood(own, over_calls.T @ values) + _unlikelihood(shared, values.mean(0, keepdims=True))


def _unlikelihood(covariance: np.ndarray, rows: np.ndarray) -> float:
    """Of independent rows, each normal with this covariance."""
    logarithm = np.linalg.slogdet(covariance)[1]
    return 0.5 * float(len(rows) * logarithm + (rows * np.linalg.solve(covariance, rows.T).T).sum())


def contrasts(count: int) -> np.ndarray:
    """(count, count - 1): orthonormal differences between `count` values."""
    return np.linalg.svd(np.eye(count) - 1 / count)[0][:, : count - 1]


def fit(families: Sequence[Family]) -> Tuple[Variation, Variation]:
    """The variations, of predictions and of calls, under which all families' errors are most likely."""

    def split(logs: np.ndarray) -> Tuple[Variation, Variation]:
        values = np.exp(logs).tolist()
        return Variation(*values[:3]), Variation(*values[3:])

    found = minimize(
        lambda logs: sum(unlikelihood(family, *split(logs)) for family in families),
        np.log([0.3, 0.3, 0.02, 0.1, 0.3, 0.03]),
        method="Nelder-Mead",
        options={"maxiter": 2000, "xatol": 1e-2, "fatol": 1e-2},
    )
    return split(found.x)


def run_ratio(options: argparse.Namespace, ratio: float) -> Tuple[Family, List[str]]:
    """The family's errors, and what is to be said of turned videos."""
    torch.set_num_threads(1)
    bench = Bench(options.steps, options.checkpoint, Path(f"{options.out}/search-{options.steps}-{ratio:g}.journal"))
    pool = candidates(len(bench.blocks), bench.steps, ratio)
    cases = [Case(text, SEED + number) for number, text in enumerate(calibration_prompts(options.calls))]
    found = [predicted(bench, pool, case) for case in cases]
    lines = []
    if ratio in EARLY:
        expected = float(np.mean([one.turned[pool.index(EARLY[ratio])] for one in found]))
        lines.append(turned(bench, EARLY[ratio], options.videos, expected))
    return family(bench, pool, cases, found), lines


def turned(bench: Bench, candidate: Candidate, videos: int, expected: float) -> str:
    """How many videos turn, against the share that is predicted."""
    cases = [Case(text, TURN_SEED + number) for number, text in enumerate(calibration_prompts(videos))]
    count = 0
    for case in cases:
        count += bench.error(candidate, case) > TURNED
        bench.forget(case)
    share = binomtest(count, len(cases)).proportion_ci(method="wilson")
    return (
        f"| {candidate.start}, {candidate.stop - candidate.start}, {candidate.first}, {candidate.interval} | "
        f"{count} of {len(cases)} | {100 * count / len(cases):.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}] | "
        f"{100 * expected:.2f} % |"
    )


def report(options: argparse.Namespace, families: Sequence[Family], lines: Sequence[str]) -> str:
    counts = ", ".join(str(family.missed.shape[1]) for family in families)
    table = [f"Smooth part, length and own part that fit best, {counts} candidates:", ""]
    table += ["| calls | MISSED | CALL |", "|---|---|---|"]
    table.append(_row(f"all {options.calls}", *fit(families)))
    for left_out in range(options.calls):
        rest = [family._replace(missed=np.delete(family.missed, left_out, axis=0)) for family in families]
        table.append(_row(f"all but number {left_out + 1}", *fit(rest)))
    table.append(_row("in use", cache_search.MISSED, cache_search.CALL))
    table += ["", f"Turned into another video, predicted with TURNS = {error_model.TURNS:g}:", ""]
    table += ["| start, blocks, step, interval | turned | share [95 %] | predicted |", "|---|---|---|---|", *lines]
    return "\n".join(table) + "\n"


def _row(name: str, *variations: Variation) -> str:
    return f"| {name} | " + " | ".join(", ".join(f"{value:.3f}" for value in one) for one in variations) + " |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--calls", type=int, default=5, help="calls that run every family")
    parser.add_argument("--videos", type=int, default=300, help="calibration prompts for turned videos (392 exist)")
    parser.add_argument("--jobs", type=int, default=1, help="speed-ups at a time")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(RATIOS))) as pool:
        families, lines = zip(*pool.starmap(run_ratio, [(options, ratio) for ratio in RATIOS], chunksize=1))
    text = report(options, families, [line for group in lines for line in group])
    (options.out / "belief.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
