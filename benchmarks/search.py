# SPDX-License-Identifier: Apache-2.0
"""The search for msModelSlim's four keys against its two-stage loop and against the family, on a reference model.

    python -m benchmarks.search --model second --kept DIR      ratios 1.3 and 1.5; what is finished is kept in DIR
    ... --others old.json                                      also the choices in another result of this command

Every error is one of final latents, relative to the plain generation with the same noise. Searches see calibration
prompts, one and four of them, several times; what they choose is run on held-out videos that nothing saw, beside a
random draw of the family of the same ratio (`--draw`; all of it where it is not larger). A choice's rank is among the
draw, by mean and by typical (median) error; "over best" is how much larger its error is than that of the drawn best.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch

from benchmarks.lib import models
from benchmarks.lib.bench import Bench
from benchmarks.lib.kept import digest_of, made_by
from benchmarks.lib.models import Case
from benchmarks.lib.own import code
from benchmarks.lib.quality import LOST, STATISTICS
from osaccel import formats
from osaccel.plan import of_dit_cache
from osaccel.search.dit_cache.candidates import Candidate, candidate_of, candidates
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.session import Session
from osaccel.settings import Settings
from osaccel.targets import target_of

BATCH = 8
# Calibration prompts that a repeated search is given; it looks at some of them.
EACH = 8


class Choice(NamedTuple):
    """What a method chose on its calls, its own measured error of it, and what that took in plain generations."""

    method: str
    candidate: Sequence[int]
    error: float
    verified: int
    generations: float


class Ledger:
    """Errors of candidates on videos of one model, each measured once, whatever is interrupted."""

    def __init__(self, bench: Bench):
        self.bench, self.pipeline = bench, bench.pipeline
        self._replays: Dict[Any, Replay] = {}

    def arguments(self, prompt: Any) -> Dict[str, Any]:
        return {**self.bench.model.arguments(), "prompt": prompt, "num_inference_steps": self.bench.steps}

    def errors(self, candidate: Candidate, cases: Sequence[Case]) -> List[float]:
        """Video by video."""
        parts = [cases[start : start + BATCH] for start in range(0, len(cases), BATCH)]
        return [error for part in parts for error in self._of_part(candidate, part)]

    def _of_part(self, candidate: Candidate, cases: Sequence[Case]) -> List[float]:
        name = f"errors-{digest_of([list(candidate), *map(list, cases)])}"
        return self.bench.kept.value(name, lambda: self._measured(candidate, self._replay(cases)))

    def _replay(self, cases: Sequence[Case]) -> Replay:
        """The recorded plain generation of these videos at once; their noise follows from the first one's seed."""
        key = tuple(cases)
        if key not in self._replays:
            torch.manual_seed(cases[0].seed)
            arguments = self.arguments([case.prompt for case in cases])
            self._replays[key] = Replay(Call(type(self.pipeline).__call__, self.pipeline, (self.pipeline,), arguments))
            self._replays[key].record(decode=False)
        return self._replays[key]

    @staticmethod
    def _measured(candidate: Candidate, replay: Replay) -> List[float]:
        last: List[torch.Tensor] = []
        replay.run(of_dit_cache(candidate.config), candidate.first, lambda _, latents: last.append(latents.clone()))
        plain = replay.recording.latents[-1].flatten(1)
        found = (last[-1].flatten(1) - plain).norm(dim=1) / plain.norm(dim=1)
        return [error if np.isfinite(error) else LOST for error in found.tolist()]


def ours(ledger: Ledger, ratio: float, cases: Sequence[Case], name: str) -> Choice:
    """What OSACCEL_SEARCH=dit_cache finds when these are the script's first calls."""

    def run() -> List[Any]:
        with tempfile.TemporaryDirectory() as folder:
            report = _searched(ledger, ratio, cases, str(Path(folder) / "dit_cache_config.json"))
        count, generations = len(report["evaluations"]), report["cost"]["plain_generations"]
        return [list(candidate_of(report["chosen"])), report["error"], count, generations]

    asked = [ratio, *map(list, cases), code("network", "sampling", "search", "plan.py")]
    found = ledger.bench.kept.value(f"search-{digest_of(asked)}", run)
    print(name, *found, flush=True)
    return Choice(name, *found)


def _searched(ledger: Ledger, ratio: float, cases: Sequence[Case], output: str) -> Dict[str, Any]:
    settings = Settings(
        search="dit_cache", cache_ratio=ratio, cache_output=output, search_then="continue", search_prompts=len(cases)
    )
    pipeline = ledger.pipeline
    session = Session(settings, target_of(pipeline))
    try:
        for case in cases:
            torch.manual_seed(case.seed)
            session.on_call(type(pipeline).__call__, pipeline, (pipeline,), ledger.arguments(case.prompt))
    finally:
        session.abandon()
    return formats.read_file(formats.report_path(output))


def two_stage(ledger: Ledger, ratio: float, case: Case) -> Optional[Choice]:
    """msModelSlim's published loop bounds: every start but block 0 at the least length, then 3 starts x 8 x 2.

    Judged by latents, which is kinder than its own re-encoded videos; lengths rounded so that the ratio is reached.
    None where no such candidate reaches it.
    """
    blocks, steps = ledger.bench.num_blocks, ledger.bench.steps
    reaching = [
        Candidate(start, start + length, first, 2)
        for first in (0, 5)
        for length in range(1, blocks)
        for start in range(1, blocks - length + 1)
        if Candidate(start, start + length, first, 2).speed_up(blocks, steps) >= ratio
    ]
    if not any(c.first == 0 for c in reaching):
        return None
    least = min(c.stop - c.start for c in reaching if c.first == 0)
    tried = [c for c in reaching if c.first == 0 and c.stop - c.start == least]
    error = {c: ledger.errors(c, [case])[0] for c in tried}
    starts = {c.start for c in sorted(tried, key=lambda c: error[c])[:3]}
    tried += [c for c in reaching if c.start in starts and 0 <= c.stop - c.start - least < 8 and c not in tried]
    error.update((c, ledger.errors(c, [case])[0]) for c in tried if c not in error)
    best = min(tried, key=lambda c: error[c])
    whole = 1 + sum(of_dit_cache(c.config).work(blocks, steps) for c in tried)
    return Choice("two-stage loop, 1 prompt", list(best), error[best], len(tried), whole)


def drawn(pool: Sequence[Candidate], count: int) -> List[Candidate]:
    """As many of the family, at random but always the same."""
    order = np.random.default_rng(0).permutation(len(pool))
    return [pool[place] for place in order[:count]]


def compare(ledger: Ledger, ratio: float, options: argparse.Namespace) -> Dict[str, Any]:
    """The choices and the draw on the held-out videos."""
    pool = candidates(ledger.bench.num_blocks, ledger.bench.steps, ratio)
    heldout = ledger.bench.model.heldout_cases(options.heldout, options.first, seed=1000)
    chosen = [Choice(*row) for path in options.others for row in _choices_in(path, ratio)]
    if not options.draw_only:
        every = ledger.bench.model.calibration_cases(EACH * options.repeats, options.seed)
        for prompts in options.prompts:
            for turn in range(options.repeats):
                cases = every[turn * EACH :][:prompts]
                name = f"{options.label}, {prompts} prompt{'s' * (prompts > 1)}, {chr(ord('a') + turn)}"
                chosen.append(ours(ledger, ratio, cases, name))
        loop = two_stage(ledger, ratio, every[0])
        chosen += [loop] if loop else []
    found = {}
    for candidate in [*(Candidate(*choice.candidate) for choice in chosen), *drawn(pool, options.draw)]:
        found[candidate] = ledger.errors(candidate, heldout)
        print(f"{ratio:g}: {list(candidate)}: {np.mean(found[candidate]):.4f}", flush=True)
    return {
        "ratio": ratio, "family": len(pool), "videos": len(heldout), "choices": [list(choice) for choice in chosen],
        "draw": [list(candidate) for candidate in drawn(pool, options.draw)],
        "errors": [[list(candidate), errors] for candidate, errors in found.items()],
    }  # fmt: skip


def _choices_in(path: str, ratio: float) -> List[List[Any]]:
    results = [result for result in json.loads(Path(path).read_text())["ratios"] if result["ratio"] == ratio]
    return [row for result in results for row in result["choices"] if row[0].startswith(("ours", "old"))]


def table(results: Sequence[Dict[str, Any]]) -> str:
    lines = []
    for result in results:
        errors = {tuple(candidate): values for candidate, values in result["errors"]}
        draw = [tuple(candidate) for candidate in result["draw"]]
        lines += [
            "",
            f"{result['ratio']:g}x: {len(draw)} of {result['family']} candidates on {result['videos']} held-out videos",
            f"{'':<28}{'start, stop, step, every':>26}{'own error':>11}{'verified':>10}{'cost':>7}"
            + "".join(f"{name:>10}{'rank':>6}{'over best':>11}" for name in ("mean", "typical"))
            + f"{'worst tenth':>13}{'turned':>8}",
        ]
        rows = [Choice(*row) for row in result["choices"]]
        for name in ("mean", "typical") if draw else ():
            _, best = min((float(STATISTICS[name](errors[candidate])), candidate) for candidate in draw)
            rows.append(Choice(f"best {name}, drawn", best, float("nan"), 0, 0.0))
        lines += [_line(row, errors, draw) for row in rows]
    return "\n".join(lines) + "\n"


def _line(row: Choice, errors: Dict[Any, List[float]], draw: Sequence[Any]) -> str:
    own, cells = errors[tuple(row.candidate)], ""
    for name in ("mean", "typical"):
        value, others = STATISTICS[name](own), [STATISTICS[name](errors[candidate]) for candidate in draw]
        rank = str(1 + sum(other < value for other in others)) if others else "-"
        over = f"{value / min(others) - 1:.1%}" if others else "-"
        cells += f"{value:>10.4f}{rank:>6}{over:>11}"
    where = ", ".join(map(str, row.candidate))
    return (
        f"{row.method:<28}{where:>26}{row.error:>11.4f}{row.verified:>10}{row.generations:>7.2f}{cells}"
        f"{STATISTICS['worst tenth'](own):>13.4f}{STATISTICS['turned'](own):>8.1%}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_options(parser)
    parser.add_argument("--ratios", type=float, nargs="+", default=(1.3, 1.5))
    parser.add_argument("--heldout", type=int, default=24, help="held-out videos")
    parser.add_argument("--first", type=int, default=0, help="the number of the first of them; leaves out earlier ones")
    parser.add_argument("--draw", type=int, default=50, help="candidates of the family that run on them")
    parser.add_argument("--draw-only", action="store_true", help="search nothing")
    parser.add_argument("--repeats", type=int, default=3, help="searches with each number of prompts")
    parser.add_argument("--prompts", type=int, nargs="+", default=(1, 4), help="calibration prompts of a search, to 8")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--label", default="ours", help="what the searches are called in the table")
    parser.add_argument("--others", nargs="*", default=(), help="results of this command whose choices are also run")
    parser.add_argument("--kept", type=Path, help="a folder for what is finished")
    parser.add_argument("--out", type=Path, help="file without its ending (benchmarks/results/search-MODEL)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    model, pipeline = models.load(options)
    ledger = Ledger(Bench(model, pipeline, folder=options.kept))
    results = [compare(ledger, ratio, options) for ratio in options.ratios]
    out = options.out or Path(f"benchmarks/results/search-{model.name}")
    made = made_by()
    formats.write_json(f"{out}.json", {"made by": made, "ratios": results})
    text = "".join(f"{key}: {value}\n" for key, value in made.items()) + table(results)
    Path(f"{out}.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
