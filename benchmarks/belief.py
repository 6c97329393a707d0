# SPDX-License-Identifier: Apache-2.0
"""What the cache search believes before it measures anything, from calibration prompts alone, on the trained miniature.

    python -m benchmarks.belief --jobs 2

`MISSED` and `CALL` of `candidates`: how log errors differ from predicted ones, on average over calls
and from call to call. Every candidate of the families of three speed-ups runs on a few calls; the two are what makes
the errors of the better candidates of each family most likely. What searches find that believe so is compared with what
those find that believe what is in use.

`TURNS` of `error_model`: configurations that reuse at high noise run on many prompts; how many videos
turn into others, over the lasting change early on.

Finished evaluations are kept in the journals of `benchmarks.search`, so an interrupted run goes on and the two share
them, one running after the other. Writes OUT/belief.md.
"""

import argparse
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from scipy.optimize import minimize
from scipy.stats import chi2

from benchmarks.search import (
    RATIOS,
    TURNED,
    Bench,
    Case,
    calibration_cases,
    each_ratio,
    numbers_of,
    open_bench,
    parser,
)
from osaccel.search.dit_cache import candidates as cache_search
from osaccel.search.dit_cache import error_model, probes
from osaccel.search.dit_cache.candidates import (
    MAX_INTERVAL,
    Candidate,
    Goal,
    Search,
    Variation,
    candidates,
    cost,
    features,
)
from osaccel.search.dit_cache.error_model import Predictions, predictions
from osaccel.search.dit_cache.region_errors import RegionErrors
from osaccel.search.team import Team

# Of each family, the share of candidates that a search may end at; what is far worse does not follow the same rules.
BETTER = 0.3
# Configurations that reuse from the first steps on.
REUSING_EARLY = {1.5: Candidate(4, 12, 0, 2), 1.8: Candidate(0, 11, 1, 2)}
SEED, TURN_SEED = 7, 20000

# Of predictions and of calls.
Pair = Tuple[Variation, Variation]


class Family(NamedTuple):
    """Every candidate on every call: errors (call, candidate), what was predicted, and the probes' block forwards."""

    ratio: float
    pool: Sequence[Candidate]
    blocks: int
    steps: int
    errors: np.ndarray
    predicted: Sequence[Predictions]
    probed: Sequence[int]

    def better(self) -> "Missed":
        """What the predictions of the better candidates missed."""
        logs = np.log(self.errors)
        better = np.argsort(logs.mean(0), kind="stable")[: int(BETTER * len(self.pool))]
        missed = logs - np.log([one.errors for one in self.predicted])
        return Missed(features(self.pool, self.blocks, self.steps)[better], missed[:, better])


class Missed(NamedTuple):
    """Of some candidates, log errors over predicted ones (call, candidate)."""

    features: np.ndarray
    values: np.ndarray


class Turning(NamedTuple):
    """How many videos turned, of how many, how large their errors are, and the share that is predicted with TURNS 1."""

    candidate: Candidate
    errors: List[float]
    videos: int
    share: float


def predicted(bench: Bench, pool: Sequence[Candidate], case: Case) -> Tuple[Predictions, int]:
    """What a search predicts from this call, and the block forwards of its probes."""
    errors = RegionErrors(len(bench.blocks), MAX_INTERVAL - 1)
    replay = bench.record(case, errors.observe)
    grams = errors.tensor(bench.steps).numpy()
    gains, spent = probes.measure(replay, grams, [c.start for c in pool], [c.stop for c in pool], Team())
    return predictions(pool, grams, gains), spent


def family(bench: Bench, ratio: float, cases: Sequence[Case]) -> Family:
    pool = candidates(len(bench.blocks), bench.steps, ratio)
    found, errors = [], []
    for case in cases:
        found.append(predicted(bench, pool, case))
        errors.append([bench.error(candidate, case) for candidate in pool])
        bench.forget(case)
    return Family(ratio, pool, len(bench.blocks), bench.steps, np.array(errors), *zip(*found))


def searched(family: Family, number: int, missed: Variation, call: Variation) -> int:
    """The place in the pool of what a search on this call finds that believes so and gives no candidate up early."""
    pool, found = family.pool, family.predicted[number]
    search = Search(
        pool, found.errors, family.blocks, family.steps, Goal(family.ratio), overhead=family.probed[number],
        turned=found.turned,
    )  # fmt: skip
    search.belief.missed, search.belief.call = missed, call
    round_ = search.next_round()
    while round_:
        for candidate in round_:
            error = float(family.errors[number, pool.index(candidate)])
            search.add({
                "config": candidate.config.to_dict(), "error": error, "abandoned": False,
                "block_forwards": cost(candidate, family.blocks, family.steps),
            })  # fmt: skip
        round_ = search.next_round()
    choice = search.choice()
    assert choice is not None, "every candidate has an error"
    return pool.index(choice)


def losses(families: Sequence[Family], choose: Callable[[Family, int], int]) -> Tuple[float, float]:
    """How much larger the error of what is chosen from one call is than the least: on it; on the others, with what is
    expected of videos that turn. Means over calls and families."""
    own, other = [], []
    for family in families:
        turned = np.mean([one.turned for one in family.predicted], axis=0)
        for number, errors in enumerate(family.errors):
            place = choose(family, number)
            elsewhere = np.delete(family.errors, number, axis=0).mean(0) + turned
            own.append(errors[place] / errors.min() - 1)
            other.append(elsewhere[place] / elsewhere.min() - 1)
    return float(np.mean(own)), float(np.mean(other))


def unlikelihood(family: Missed, missed: Variation, call: Variation) -> float:
    """-log of the likelihood of a family's errors, up to a constant; what all candidates share is left out."""
    calls, count = family.values.shape
    over_candidates, over_calls = contrasts(count), contrasts(calls)
    own = over_candidates.T @ call.covariance(family.features, family.features) @ over_candidates
    shared = over_candidates.T @ missed.covariance(family.features, family.features) @ over_candidates + own / calls
    values = family.values @ over_candidates
    return _unlikelihood(own, over_calls.T @ values) + _unlikelihood(shared, values.mean(0, keepdims=True))


def _unlikelihood(covariance: np.ndarray, rows: np.ndarray) -> float:
    """Of independent rows, each normal with this covariance."""
    logarithm = np.linalg.slogdet(covariance)[1]
    return 0.5 * float(len(rows) * logarithm + (rows * np.linalg.solve(covariance, rows.T).T).sum())


def contrasts(count: int) -> np.ndarray:
    """(count, count - 1): orthonormal differences between `count` values."""
    return np.linalg.svd(np.eye(count) - 1 / count)[0][:, : count - 1]


def fit(families: Sequence[Missed]) -> Pair:
    """The variations, of predictions and of calls, under which all families' errors are most likely."""

    def split(logs: np.ndarray) -> Pair:
        values = np.exp(logs).tolist()
        return Variation(*values[:3]), Variation(*values[3:])

    found = minimize(
        lambda logs: sum(unlikelihood(family, *split(logs)) for family in families),
        np.log([0.3, 0.3, 0.02, 0.1, 0.3, 0.03]),
        method="Nelder-Mead",
        options={"maxiter": 2000, "xatol": 1e-2, "fatol": 1e-2},
    )
    return split(found.x)


def run_ratio(options: argparse.Namespace, ratio: float) -> Tuple[Family, Optional[Turning]]:
    """The family's errors, and the turned videos where the ratio has a configuration to look at."""
    bench = open_bench(options, ratio)
    whole, turning = family(bench, ratio, calibration_cases(options.calls, SEED)), None
    if ratio in REUSING_EARLY:
        candidate = REUSING_EARLY[ratio]
        shares = [one.turned[whole.pool.index(candidate)] for one in whole.predicted]
        turning = turned(bench, candidate, options.videos, float(np.mean(shares)) / error_model.TURNS)
    return whole, turning


def turned(bench: Bench, candidate: Candidate, videos: int, share: float) -> Turning:
    errors = []
    for case in calibration_cases(videos, TURN_SEED):
        errors.append(bench.error(candidate, case))
        bench.forget(case)
    return Turning(candidate, [error for error in errors if error > TURNED], len(errors), share)


def report(calls: int, families: Sequence[Family], turning: Sequence[Turning]) -> str:
    better = [family.better() for family in families]
    best, used = fit(better), (cache_search.MISSED, cache_search.CALL)
    table = [*_fits(calls, better, best, used), "", *_searches(families, best, used), "", *_turns(turning)]
    return "\n".join(table) + "\n"


def _fits(calls: int, better: Sequence[Missed], best: Pair, used: Pair) -> List[str]:
    counts = ", ".join(str(missed.values.shape[1]) for missed in better)
    table = [f"Smooth part, length and own part that fit best, {counts} candidates:", ""]
    table += ["| calls | MISSED | CALL |", "|---|---|---|"]
    table.append(_row(f"all {calls}", *best))
    for left_out in range(calls):
        rest = [missed._replace(values=np.delete(missed.values, left_out, axis=0)) for missed in better]
        table.append(_row(f"all but number {left_out + 1}", *fit(rest)))
    return [*table, _row("in use", *used)]


def _searches(families: Sequence[Family], best: Pair, used: Pair) -> List[str]:
    table = ["Searches on one call each, error over the least one:", ""]
    table += ["| believing | on the call | on the others, with turned ones |", "|---|---|---|"]
    choices: List[Tuple[str, Callable[[Family, int], int]]] = [
        ("what fits best", lambda family, number: searched(family, number, *best)),
        ("what is in use", lambda family, number: searched(family, number, *used)),
        ("the call alone: brute force", lambda family, number: int(family.errors[number].argmin())),
    ]
    for name, choose in choices:
        own, other = losses(families, choose)
        table.append(f"| {name} | {100 * own:+.1f} % | {100 * other:+.1f} % |")
    return table


def _turns(turning: Sequence[Turning]) -> List[str]:
    table = ["Videos that turned into others:", ""]
    table += ["| start, blocks, step, interval | turned | their errors | expected with TURNS 1 |", "|---|---|---|---|"]
    table += [_turning_row(one) for one in turning]
    count, expected = sum(len(one.errors) for one in turning), sum(one.share * one.videos for one in turning)
    # The exact interval of a Poisson count (Garwood 1936).
    least, most = np.nan_to_num(chi2.ppf([0.025, 0.975], [2 * count, 2 * count + 2]) / 2) / expected
    return [*table, "", f"TURNS: {count / expected:.2f} [{least:.2f}, {most:.2f}], in use {error_model.TURNS:g}"]


def _turning_row(one: Turning) -> str:
    return (
        f"| {numbers_of(one.candidate.config.to_dict())} | {len(one.errors)} of {one.videos} | "
        f"{', '.join(f'{error:.2f}' for error in sorted(one.errors))} | {one.share * one.videos:.1f} |"
    )


def _row(name: str, *variations: Variation) -> str:
    return f"| {name} | " + " | ".join(", ".join(f"{value:.3f}" for value in one) for one in variations) + " |"


def parse() -> argparse.Namespace:
    own = parser(__doc__.splitlines()[0])
    own.add_argument("--calls", type=int, default=5, help="calls that run every family")
    own.add_argument("--videos", type=int, default=300, help="calibration prompts for turned videos (392 exist)")
    return own.parse_args()


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    families, turning = zip(*each_ratio(run_ratio, options, RATIOS))
    text = report(options.calls, families, [one for one in turning if one])
    (options.out / "belief.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
