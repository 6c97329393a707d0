# SPDX-License-Identifier: Apache-2.0
"""The plan search against everything else at equal network work, on a trained reference model.

    python -m benchmarks.plans --model miniature --work 1.3,1.6,2,3,4 --videos 48 --kept FOLDER
    python -m benchmarks.plans ... --only fewer,taylor        some groups of rows; --table only what is kept already
    python -m benchmarks.plans ... --out benchmarks/results/plans-miniature      the table, its JSON and its plot

Every row samples the same held-out prompts from the same noise, ancestral noise included; errors are relative L2 of the
final latents against the plain run. Network work is counted where blocks run. Whatever is tuned is tuned on calibration
calls: the search and even patterns on `--prompts` of them, thresholds and masks on two. Intervals are 95 % bootstrap
over videos, the same videos drawn for both sides of a comparison. What is finished is kept in the folder: an
interrupted command goes on, commands with different `--only` may share a folder, and rows of changed code run anew.

The last lines of a table say whether choices keep their place: the found plan among structured and random plans of its
work on the first `--rival-videos` held-out videos, and on the others among those that were better there.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from benchmarks.competitors import (
    budcache,
    cache_dit,
    cfg_gate,
    fewer_steps,
    first_block_cache,
    mag_cache,
    packages,
    sea_cache,
    taylor_seer,
    tea_cache,
)
from benchmarks.lib import compare, models, patterns, plan_search
from benchmarks.lib.bench import Arm, Bench, NotKept
from benchmarks.lib.calibration import SEED, Calibration, Competitor
from benchmarks.lib.compare import Row
from benchmarks.lib.kept import digest_of, made_by
from benchmarks.lib.models import Case
from benchmarks.lib.own import planned
from benchmarks.lib.plan_search import Searched
from benchmarks.lib.quality import STATISTICS, errors, over
from osaccel import formats

WORKS = (1.3, 1.6, 2.0, 3.0, 4.0)
SAMPLERS = ("EulerAncestralDiscrete", "EulerDiscrete", "DDIM")
OURS = "osaccel plan"
# What is said of errors where the best row is named.
JUDGED = ("mean", "typical", "worst tenth", "turned")

GROUPS: Dict[str, Tuple[Competitor, ...]] = {
    "fewer": (fewer_steps.COMPETITOR,),
    "taylor": (taylor_seer.COMPETITOR,),
    "gate": (cfg_gate.COMPETITOR,),
    "sea": (sea_cache.COMPETITOR,),
    "first-block": (first_block_cache.COMPETITOR,),
    "mag": (mag_cache.COMPETITOR,),
    "cache-dit": cache_dit.COMPETITORS,
    "tea": (tea_cache.COMPETITOR,),
    "masks": (budcache.COMPETITOR,),
}  # fmt: skip
ONLY = ("ours", "alone", "even", *GROUPS, "rivals")


class Rivals(NamedTuple):
    """The found plan among others of its work, on the same held-out videos.

    Attributes:
        better: how many of the `drawn` had a lower mean error, and typical error.
        over: by statistic, how much larger the found plan's error is than that of the best rival, with its interval.
        best: by statistic, the best rival's error; own: the found plan's; kinds: what the best rivals were.
    """

    drawn: int
    videos: int
    better: Dict[str, int]
    over: Dict[str, List[float]]
    best: Dict[str, float]
    own: Dict[str, float]
    kinds: Dict[str, str]

    def __str__(self) -> str:
        parts = [
            "{}: {} {:.4f}, best rival {:.4f} ({}), {:+.0%} [{:+.0%}, {:+.0%}], {} better".format(
                name, OURS, self.own[name], self.best[name], self.kinds[name], *self.over[name], self.better[name]
            )
            for name in self.own
        ]
        return f"among {self.drawn} plans of its work on {self.videos} videos, " + "; ".join(parts)


class Comparison:
    """All rows at all works, made one after the other.

    Args:
        bench: with the folder where everything is kept.
        speeds: 1 / network work; one search serves them all.
        videos: held-out ones; prompts: calibration calls of searches, `first` the number of the first of them.
        probed: how many of them our search probes.
        targets: the speed-ups that the one search serves, `speeds` among them.
        absent: of competitors' packages, those that are missing.
    """

    def __init__(
        self,
        bench: Bench,
        speeds: Sequence[float],
        videos: int,
        prompts: int,
        absent: Dict[str, str],
        only: Sequence[str] = ONLY,
        rivals: Tuple[int, int] = (24, 8),
        targets: Optional[Sequence[float]] = None,
        first: int = 0,
        probed: int = plan_search.PROBED,
    ):
        self.bench, self.speeds, self.absent, self.only, self.rival_count = bench, list(speeds), absent, only, rivals
        self.cases = bench.model.heldout_cases(videos)
        self.calls: List[Case] = bench.model.calibration_cases(first + prompts, SEED)[first:]
        self.tuning, self.searches = Calibration(bench), Calibration(bench, prompts=prompts)
        self.rows: Dict[float, List[Row]] = {speed: [] for speed in speeds}
        self.left_out: Dict[float, Dict[str, str]] = {speed: {} for speed in speeds}
        self.among: Dict[float, List[Rivals]] = {}
        self.not_run: List[str] = []
        self.targets, self.probed = list(targets or speeds), probed
        self._searched: Optional[Searched] = None

    @property
    def searched(self) -> Searched:
        if self._searched is None:
            self._searched = plan_search.search(self.bench, self.calls, self.targets, self.probed)
        return self._searched

    def run(self) -> Iterator[str]:
        """Makes everything that was asked for, and says what is finished."""
        for speed in self.speeds:
            for group in self.only:
                try:
                    yield from self._group(group, speed)
                except NotKept as error:
                    self.not_run.append(f"{group} at {speed:g}x ({error})")

    def _group(self, group: str, speed: float) -> Iterator[str]:
        if group == "rivals":
            if self.searched.plans[self.targets.index(speed)] is None:
                return
            self.among[speed] = self._among(speed)
            yield from (f"{speed:g}x, {ranked}" for ranked in self.among[speed])
            return
        for name, make in self._makers(group, speed):
            try:
                arm = make()
            except ValueError as error:
                self.left_out[speed][name] = str(error)
                continue
            row = compare.in_parts(self.bench, arm, self.cases)
            self.rows[speed].append(row)
            mean, typical = (STATISTICS[name](row.errors, axis=0) for name in ("mean", "typical"))
            yield f"{speed:g}x, {row.name}: work {row.work:.1%}, mean {mean:.4f}, typical {typical:.4f}"

    def _makers(self, group: str, speed: float) -> List[Tuple[str, Callable[[], Arm]]]:
        """What makes the group's arms at this work, by name; each raises ValueError where there is none."""
        work, part = 1 / speed, functools.partial
        if group == "ours":
            return [(OURS, part(self._found, speed))]
        if group == "alone":
            return [(f"{name}, searched", part(self._alone, name, speed)) for name in plan_search.FAMILIES]
        if group == "even":
            return [(f"{name}, even", part(patterns.best, self.searches, name, work)) for name in patterns.FAMILIES]
        return [(one.name, part(self._competitor, one, work)) for one in GROUPS[group]]

    def _found(self, speed: float) -> Arm:
        return self._planned(self.searched.plans[self.targets.index(speed)], OURS)

    def _alone(self, family: str, speed: float) -> Arm:
        return self._planned(self.searched.families[family][self.targets.index(speed)], f"{family}, searched")

    def _planned(self, content: Any, name: str) -> Arm:
        if content is None:
            raise ValueError("no plan of it saves as much")
        return planned(self.bench, formats.parse_plan(content, "a found plan"), name, name)

    def _competitor(self, competitor: Competitor, work: float) -> Arm:
        if competitor.package in self.absent:
            raise ValueError(self.absent[competitor.package])
        return competitor.at(self.tuning, work)

    def _among(self, speed: float) -> List[Rivals]:
        """On the first videos; then, on the others, those that were better there, as some are so by chance."""
        count, videos = self.rival_count
        drawn = self.searched.rivals[self.targets.index(speed)][:count]
        found, better = self._ranked(speed, drawn, self.cases[:videos])
        if not better or videos >= len(self.cases):
            return [found]
        return [found, self._ranked(speed, better, self.cases[videos:])[0]]

    def _ranked(self, speed: float, rivals: Sequence[Any], cases: Sequence[Case]) -> Tuple[Rivals, List[Any]]:
        """The found plan among rivals, [kind, content], and those of them that have less mean or typical error."""
        own = self._errors(self._found(speed), cases)
        each = [self._errors(self._planned(content, kind), cases) for kind, content in rivals]
        found, better = Rivals(len(rivals), len(cases), {}, {}, {}, {}, {}), set()
        for name in ("mean", "typical"):
            statistic = STATISTICS[name]
            values = [float(statistic(errors, axis=0)) for errors in each]
            best, found.own[name] = int(np.argmin(values)), float(statistic(own, axis=0))
            found.best[name], found.kinds[name] = values[best], rivals[best][0]
            found.over[name] = over(own, each[best], statistic)
            lower = [place for place, value in enumerate(values) if value < found.own[name]]
            found.better[name] = len(lower)
            better.update(lower)
        return found, [rivals[place] for place in sorted(better)]

    def _errors(self, arm: Arm, cases: Sequence[Case]) -> List[float]:
        """Of final latents; kept, without decoding anything."""
        name = f"errors-{digest_of([arm.key, *map(list, cases)])}"
        return self.bench.kept.value(name, lambda: errors(self.bench.run(arm, cases), self.bench.plain(cases)))

    # What is written

    def text(self) -> str:
        """A table for every work, the best rows named below it."""
        parts = []
        for speed in self.speeds:
            rows = self.rows[speed]
            against = OURS if any(row.name == OURS for row in rows) else None
            lines = [
                f"{speed:g}x: network work at most {1 / speed:.1%}",
                *([compare.table(rows, against)] if rows else []),
            ]
            lines += [f"{name}: none; {reason}" for name, reason in self.left_out[speed].items()]
            if against and len(rows) > 1:
                lines += verdict(rows)
            lines += map(str, self.among.get(speed, ()))
            parts.append("\n".join(lines))
        return "\n\n".join([*parts, *([f"not run: {'; '.join(self.not_run)}"] if self.not_run else [])])

    def content(self) -> Dict[str, Any]:
        """For a JSON file."""
        works = {
            f"{speed:g}x": {
                "rows": compare.summaries(self.rows[speed]),
                "left out": self.left_out[speed],
                "rivals": [ranked._asdict() for ranked in self.among.get(speed, ())],
            }
            for speed in self.speeds
        }
        search = self._searched and {
            **self._searched._asdict(),
            "rivals": [len(kept) for kept in self._searched.rivals],
        }
        return {
            "videos": len(self.cases),
            "calls": self.calls,
            "search": search,
            "not run": self.not_run,
            "works": works,
        }

    def plot(self, path: Path) -> None:
        rows = [row for speed in self.speeds for row in self.rows[speed]]
        if rows:
            compare.plot(rows, path, f"{self.bench.model.name}, {len(self.cases)} held-out videos", first=(OURS,))


def verdict(rows: Sequence[Row]) -> List[str]:
    """For every statistic, how the found plan stands to the best other row."""
    own = next(row for row in rows if row.name == OURS)
    others, lines = [row for row in rows if row is not own], []
    for name in JUDGED:
        statistic = STATISTICS[name]
        values = [float(statistic(row.errors, axis=0)) for row in others]
        best, value = others[int(np.argmin(values))], float(statistic(own.errors, axis=0))
        line = f"{name}: {OURS} {value:.4f}, best other row {min(values):.4f} ({best.name})"
        if name != "turned":
            low_high = over(own.errors, best.errors, statistic)
            line += ", {:+.0%} [{:+.0%}, {:+.0%}]".format(*low_high)
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_options(parser)
    parser.add_argument("--sampler", choices=SAMPLERS, default=SAMPLERS[0])
    parser.add_argument("--work", type=_numbers, default=WORKS, help="speed-ups in network work (1.3,1.6,2,3,4)")
    parser.add_argument("--targets", type=_numbers, help="that the one search serves (those of --work)")
    parser.add_argument("--videos", type=int, default=48, help="held-out videos (48)")
    parser.add_argument("--prompts", type=int, default=4, help="calibration calls of searches (4)")
    parser.add_argument("--first", type=int, default=0, help="number of the first calibration call of our search (0)")
    parser.add_argument("--probed", type=int, default=plan_search.PROBED, help="OSACCEL_SEARCH_PROBED of our search")
    parser.add_argument("--kept", type=Path, required=True, help="folder for everything that is finished")
    parser.add_argument("--only", type=_groups, default=ONLY, help=f"of {','.join(ONLY)}")
    parser.add_argument("--rivals", type=int, default=24, help="plans of equal work to rank the found one among (24)")
    parser.add_argument("--rival-videos", type=int, default=8, help="on how many held-out videos (8)")
    parser.add_argument("--batch", type=int, default=4, help="videos sampled at a time where a method allows it (4)")
    parser.add_argument("--steps", type=int, help="of the plain run (the model's)")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is kept")
    parser.add_argument("--note", help="of the circumstances, written with the rest")
    parser.add_argument("--out", type=Path, help="also write OUT.txt, OUT.json and OUT.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    absent = packages.missing()
    model, pipeline = models.load(options, options.sampler)
    bench = Bench(model, pipeline, options.steps, options.batch, options.kept, only_kept=options.table)
    rivals = (options.rivals, options.rival_videos)
    comparison = Comparison(
        bench, options.work, options.videos, options.prompts, absent, options.only, rivals, options.targets,
        options.first, options.probed,
    )  # fmt: skip
    made = {**made_by(), "sampler": options.sampler, **({"note": options.note} if options.note else {})}
    print("\n".join(f"{name}: {value}" for name, value in made.items()), flush=True)
    for line in comparison.run():
        print(line, flush=True)
    text = "\n".join(
        [*(f"{name}: {value}" for name, value in made.items()), *header(comparison), "", comparison.text()]
    )
    print(text, flush=True)
    if options.out:
        write(comparison, made, text, options.out)


def header(comparison: Comparison) -> List[str]:
    """What the tables compare, and what the searches cost."""
    bench, calls = comparison.bench, len(comparison.calls)
    lines = [
        f"{bench.model.name}, {bench.steps} steps, guidance {bench.model.guidance:g}, "
        f"{len(comparison.cases)} held-out videos; searches looked at {calls} calibration calls",
        f"mask search: {budcache.BUDGET:g} plain generations of {len(comparison.tuning.cases)} calls for every work",
    ]
    if comparison._searched is not None:
        lines.append(
            f"{OURS}: one search for {len(comparison.targets)} works, "
            f"{comparison.searched.generations:.2f} plain generations of these calls, plain runs included"
        )
    return lines


def write(comparison: Comparison, made: Dict[str, str], text: str, out: Path) -> None:
    out.with_name(out.name + ".txt").write_text(text + "\n")
    content = rounded({"made by": made, **comparison.content()})
    out.with_name(out.name + ".json").write_text(json.dumps(content) + "\n")
    comparison.plot(out.with_name(out.name + ".png"))


def rounded(value: Any) -> Any:
    """Numbers of six digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _numbers(text: str) -> List[float]:
    return [float(part) for part in text.split(",")]


def _groups(text: str) -> List[str]:
    groups = text.split(",")
    unknown = [group for group in groups if group not in ONLY]
    if unknown:
        raise argparse.ArgumentTypeError(f"no group {unknown[0]!r}; there are {', '.join(ONLY)}")
    return groups


if __name__ == "__main__":
    main()
