# SPDX-License-Identifier: Apache-2.0
"""The cache search against msModelSlim's two-stage loop and against brute force, on the trained miniature.

    python -m benchmarks.search --jobs 2          ratios 1.3, 1.5, 1.8, one process each, 100 steps
    python -m benchmarks.search --ratios 1.5      one ratio; --table only writes the table of what is there
    ... --first 300 --heldout 552                 on held-out videos 300 to 851; nothing was chosen on these

Every error is one of final latents, relative to the plain generation with the same noise; costs are transformer block
forwards. Brute force evaluates the whole family, each candidate resumed exactly from the recorded plain generation;
its cost is given as what running every candidate from the start would take, as the two-stage loop does. Held-out
figures are over prompts that neither training nor search saw, with 95 % bootstrap intervals: the mean error, which few
videos that a cache turns into others make up in good part; the typical one, their geometric mean; and the share of such
videos. Finished evaluations are kept in OUT/*.journal: an interrupted run goes on, another checkpoint or step count
starts anew; remove `ours-*.pt` there to search again with changed code.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from scipy.stats import gmean

from benchmarks.lib import models
from benchmarks.lib.jobs import in_processes
from benchmarks.lib.kept import made_by
from benchmarks.lib.models import Case
from benchmarks.lib.quality import interval, over, turned
from benchmarks.reference.load import STEPS
from benchmarks.reference.paths import CHECKPOINT
from osaccel import binding, formats
from osaccel.network.regions import HiddenStates
from osaccel.search.dit_cache.candidates import Candidate, candidate_of, candidates, cost
from osaccel.search.dit_cache.evaluate import Evaluator
from osaccel.search.journal import Journal
from osaccel.search.recording.observe import watch_blocks
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.session import Session
from osaccel.search.team import Team
from osaccel.settings import Settings
from osaccel.targets import target_of

RATIOS = (1.3, 1.5, 1.8)
# Searches are calibrated on one prompt, as by default; the second row shows what OSACCEL_SEARCH_PROMPTS=4 changes.
MORE = 4
METHODS = ("ours", f"ours, {MORE} prompts", "two-stage", "brute force")
MODEL = models.model("miniature")
BLOCKS = "transformer.transformer_blocks"


class Ledger:
    """Evaluates candidates on calls of one pipeline, each pair at most once, whatever is interrupted."""

    def __init__(self, steps: int, checkpoint: Path, journal: Path):
        self.pipeline, self.steps = MODEL.load(checkpoint=checkpoint), steps
        self.blocks = list(self.pipeline.transformer.transformer_blocks)
        self.replays: Dict[Case, Replay] = {}
        bound = binding.of_search(self._call(Case("", 0)), len(self.blocks), None, 1, 1, "latents")
        self.journal = Journal(str(journal), json.loads(json.dumps(bound)))
        if self.journal.started_anew:
            print(f"{journal}: starting anew: {self.journal.started_anew}", flush=True)
        self.known = {_key(*entry["of"]): entry for entry in self.journal.records("errors")}

    @property
    def plain(self) -> int:
        """Block forwards of a plain generation."""
        return len(self.blocks) * self.steps

    def arguments(self, prompt: str) -> Dict[str, Any]:
        return dict(MODEL.arguments(), prompt=prompt, num_inference_steps=self.steps)

    def _call(self, case: Case) -> Call:
        torch.manual_seed(case.seed)
        return Call(type(self.pipeline).__call__, self.pipeline, (self.pipeline,), self.arguments(case.prompt))

    def replay(self, case: Case) -> Replay:
        """The recorded plain generation."""
        if case not in self.replays:
            self.replays[case] = replay = Replay(self._call(case))
            states, observe = HiddenStates(), replay.boundaries.observe
            replay.record(lambda g: watch_blocks(self.blocks, g.clock, states, observe), decode=False)
        return self.replays[case]

    def forget(self, case: Case) -> None:
        """Its recording is not needed any more; what was evaluated stays known."""
        self.replays.pop(case, None)

    def error(self, candidate: Candidate, case: Case) -> float:
        key = _key(candidate, case)
        if key not in self.known:
            found = Evaluator([self.replay(case)], Team())(candidate).error
            self.known[key] = {"of": [list(candidate), list(case)], "error": found}
            self.journal.append("errors", self.known[key])
        error = self.known[key]["error"]
        return math.inf if error is None else error

    def speed_up(self, candidate: Candidate) -> float:
        return candidate.speed_up(len(self.blocks), self.steps)

    def whole(self, pool: Sequence[Candidate]) -> int:
        """Block forwards of a plain generation and of every candidate's own, from the first step on."""
        return self.plain + sum(cost(candidate, len(self.blocks), self.steps, resume=0) for candidate in pool)


def _key(candidate: Sequence[int], case: Sequence[Any]) -> Tuple[Any, ...]:
    return (*candidate, *case)


class Found(NamedTuple):
    """What a method chose, from how many generations or parts of them, for how many block forwards."""

    candidate: Candidate
    evaluations: int
    block_forwards: int


def ours(ledger: Ledger, ratio: float, cases: Sequence[Case]) -> Found:
    """What OSACCEL_SEARCH=1 finds and reports when these are the script's first calls."""
    name = f"ours-{cases[0].seed}-{len(cases)}.pt"
    report = ledger.journal.load(name)
    if report is None:
        with tempfile.TemporaryDirectory() as folder:
            output = str(Path(folder) / "dit_cache_config.json")
            settings = Settings(
                search="dit_cache", cache_ratio=ratio, cache_output=output, search_then="continue",
                search_prompts=len(cases),
            )  # fmt: skip
            session = Session(settings, target_of(ledger.pipeline))
            for case in cases:
                torch.manual_seed(case.seed)
                arguments = ledger.arguments(case.prompt)
                session.on_call(type(ledger.pipeline).__call__, ledger.pipeline, (ledger.pipeline,), arguments)
            report = formats.read_file(binding.report_path(output))
        ledger.journal.save(name, report)
    found = candidate_of(report["chosen"])
    return Found(found, len(report["evaluations"]), report["cost"]["block_forwards"])


def two_stage(ledger: Ledger, ratio: float, case: Case) -> Found:
    """msModelSlim's published loop bounds: every start but block 0 at the least length, then 3 starts x 8 x 2.

    Judged by latents, which is kinder than its own re-encoded videos; lengths rounded so that the ratio is reached.
    """
    blocks = len(ledger.blocks)
    reaching = [
        Candidate(start, start + length, first, 2)
        for first in (0, 5)
        for length in range(1, blocks)
        for start in range(1, blocks - length + 1)
        if Candidate(start, start + length, first, 2).speed_up(blocks, ledger.steps) >= ratio
    ]
    if not reaching:
        raise ValueError(f"the two-stage loop has no configuration that reaches {ratio:g} with {blocks} blocks")
    least = min(c.stop - c.start for c in reaching if c.first == 0)
    tried = [c for c in reaching if c.first == 0 and c.stop - c.start == least]
    starts = {c.start for c in sorted(tried, key=lambda c: ledger.error(c, case))[:3]}
    lengths = range(least, least + 8)
    tried += [c for c in reaching if c.start in starts and c.stop - c.start in lengths and c not in tried]
    return Found(min(tried, key=lambda c: ledger.error(c, case)), len(tried), ledger.whole(tried))


def ranked(ledger: Ledger, pool: Sequence[Candidate], case: Case, label: str) -> List[Candidate]:
    """The whole family, best first."""
    for number, candidate in enumerate(pool):
        ledger.error(candidate, case)
        if number % 50 == 49:
            print(f"{label}: {number + 1} of {len(pool)} evaluated", flush=True)
    return sorted(pool, key=lambda candidate: ledger.error(candidate, case))


def compare(
    ledger: Ledger, ratio: float, cases: List[Case], heldout: List[Case], rank_cases: List[Case]
) -> Dict[str, Any]:
    """One row per method, and where the found configurations stand in the family."""
    case = cases[0]
    own, more = ours(ledger, ratio, cases[:1]), ours(ledger, ratio, cases)
    pool = candidates(len(ledger.blocks), ledger.steps, ratio)
    order = ranked(ledger, pool, case, f"ratio {ratio:g}, calibration prompt")
    brute = Found(order[0], len(pool), ledger.whole(pool))
    found = dict(zip(METHODS, (own, more, two_stage(ledger, ratio, case), brute)))
    ledger.forget(case)
    errors: Dict[str, List[float]] = {method: [] for method in METHODS}
    for held in heldout:
        for method, result in found.items():
            errors[method].append(ledger.error(result.candidate, held))
        ledger.forget(held)
    best = ledger.error(order[0], case)
    rows = {method: row(ledger, result, ledger.error(result.candidate, case), best) for method, result in found.items()}
    for method in METHODS:
        rows[method].update(against(errors["ours"], errors[method]))
    chosen = {method: found[method].candidate for method in METHODS if method != "two-stage"}
    ranks = [heldout_rank(ledger, pool, chosen, held, ratio) for held in rank_cases]
    return {
        "rows": rows,
        "heldout": len(heldout),
        "first_seed": heldout[0].seed,
        "family": len(pool),
        "rank": 1 + order.index(own.candidate),
        "heldout_ranks": ranks,
    }


def row(ledger: Ledger, found: Found, error: float, best: float) -> Dict[str, Any]:
    return {
        "config": found.candidate.config.to_dict(),
        "speed_up": ledger.speed_up(found.candidate),
        "calibration_error": error,
        "over_best": error / best - 1,
        "evaluations": found.evaluations,
        "block_forwards": found.block_forwards,
        "plain_generations": found.block_forwards / ledger.plain,
    }


def against(own: Sequence[float], other: Sequence[float]) -> Dict[str, Any]:
    """A method's held-out errors, and how much larger ours are, the same prompts drawn for both."""
    mean, *mean_interval = over(own, other)
    typical, *typical_interval = over(own, other, gmean)
    return {
        "heldout_error": float(np.mean(other)),
        "heldout_interval": interval(other)[1:],
        "heldout_typical": float(gmean(other)),
        "heldout_turned": float(turned(other)),
        "ours_over_this": mean,
        "ours_over_this_interval": mean_interval,
        "ours_over_this_typical": typical,
        "ours_over_this_typical_interval": typical_interval,
    }


def heldout_rank(
    ledger: Ledger, pool: Sequence[Candidate], chosen: Dict[str, Candidate], case: Case, ratio: float
) -> Dict[str, Any]:
    """Where the methods' choices stand when the whole family runs on a held-out prompt."""
    order = ranked(ledger, pool, case, f"ratio {ratio:g}, held-out prompt")
    ledger.forget(case)
    best = ledger.error(order[0], case)
    return {
        "prompt": case.prompt,
        "places": {
            method: {"rank": 1 + order.index(candidate), "over_best": ledger.error(candidate, case) / best - 1}
            for method, candidate in chosen.items()
        },
    }


def table(results: Dict[str, Any]) -> str:
    """Markdown: what made each ratio's figures, its rows, then the ranks."""
    made = {ratio: "; ".join(result["made by"].values()) for ratio, result in results.items() if "made by" in result}
    lines = [
        *(f"* {ratio}: {text}" for ratio, text in made.items()),
        "",
        "| ratio | method | start, blocks, step, interval | speed-up | error | over best | evaluations | "
        "block forwards | plain generations |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ratio, result in results.items():
        lines += [_line(ratio, method, result["rows"][method]) for method in METHODS]
    videos = ", ".join(f"{result['heldout']} from seed {result['first_seed']} on" for result in results.values())
    lines += [
        "",
        f"On held-out videos ({videos}):",
        "",
        "| ratio | method | mean error [95 %] | ours over it [95 %] | typical error | ours over it [95 %] | "
        "turned into another video |",
        "|---|---|---|---|---|---|---|",
    ]
    for ratio, result in results.items():
        lines += [_heldout_line(ratio, method, result["rows"][method]) for method in METHODS]
    lines += [
        "",
        "Place of the choices in the whole family run on held-out prompts, and their error over the best one's:",
        "",
    ]
    for ratio, result in results.items():
        own = result["rows"]["ours"]["over_best"]
        lines.append(
            f"* {ratio}: ours is {result['rank']} of {result['family']} ({100 * own:+.1f} %) on its own prompt"
        )
        for number, held in enumerate(result["heldout_ranks"], 1):
            places = "; ".join(
                f"{method} {place['rank']} ({100 * place['over_best']:+.1f} %)"
                for method, place in held["places"].items()
            )
            lines.append(f"  * held-out prompt {number}: {places}")
    return "\n".join(lines) + "\n"


def _line(ratio: str, method: str, row: Dict[str, Any]) -> str:
    return (
        f"| {ratio} | {method} | {numbers_of(row['config'])} | {row['speed_up']:.3f} | "
        f"{row['calibration_error']:.5f} | {100 * row['over_best']:+.1f} % | {row['evaluations']} | "
        f"{row['block_forwards']} | {row['plain_generations']:.2f} |"
    )


def numbers_of(config: Dict[str, int]) -> str:
    """Start, blocks, step, interval."""
    keys = ("cache_block_start", "cache_num_blocks", "cache_step_start", "cache_step_interval")
    return ", ".join(str(config[key]) for key in keys)


def _heldout_line(ratio: str, method: str, row: Dict[str, Any]) -> str:
    low, high = row["heldout_interval"]
    over = ["", ""]
    if method != METHODS[0]:
        for place, key in enumerate(("ours_over_this", "ours_over_this_typical")):
            least, most = (100 * value for value in row[key + "_interval"])
            over[place] = f"{100 * row[key]:+.1f} % [{least:+.1f}, {most:+.1f}]"
    return (
        f"| {ratio} | {method} | {row['heldout_error']:.4f} [{low:.4f}, {high:.4f}] | {over[0]} | "
        f"{row['heldout_typical']:.4f} | {over[1]} | {100 * row['heldout_turned']:.1f} % |"
    )


def run_ratio(options: argparse.Namespace, ratio: float, made: Dict[str, str]) -> None:
    """One ratio's comparison, written to its JSON file; `made` says what by."""
    stem = _stem(options, ratio)
    ledger = Ledger(options.steps, options.checkpoint, Path(f"{stem}.journal"))
    cases = MODEL.calibration_cases(MORE, options.seed)
    heldout = MODEL.heldout_cases(options.heldout, options.first, seed=1000)
    result = compare(ledger, ratio, cases, heldout, heldout[: options.rank_prompts])
    formats.write_json(f"{stem}.json", {"made by": made, "steps": options.steps, "ratio": ratio, **result})


def _stem(options: argparse.Namespace, ratio: float) -> Path:
    return options.out / f"search-{options.steps}-{ratio:g}"


def write_table(options: argparse.Namespace) -> str:
    """The table of every ratio that has been finished, by whichever process."""
    found = {}
    for path in options.out.glob(f"search-{options.steps}-*.json"):
        result = json.loads(path.read_text())
        found[result["ratio"]] = result
    text = table({f"{ratio:g}": found[ratio] for ratio in sorted(found)})
    (options.out / f"search-{options.steps}.md").write_text(text)
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=1, help="ratios at a time")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--heldout", type=int, default=120, help="held-out videos for the found configurations")
    parser.add_argument("--first", type=int, default=0, help="the number of the first of them; leaves out earlier ones")
    parser.add_argument("--rank-prompts", type=int, default=2, help="of them, how many run the whole family")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="evaluate nothing")
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        in_processes(run_ratio, [(options, ratio, made_by()) for ratio in options.ratios], options.jobs)
    print(write_table(options))


if __name__ == "__main__":
    main()
