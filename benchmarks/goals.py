# SPDX-License-Identifier: Apache-2.0
"""What errors and PSNRs that are to be kept cost, and whether they are kept on other videos.

    python -m benchmarks.goals --model miniature --goals psnr:50,psnr:45,error:0.02 --videos 48 --kept FOLDER

One plan search for each goal, on calibration calls: the network work of its plan and what was measured there; then the
mean error and the PSNR on held-out videos, which no search saw: of the mean squared error of all frames, as the search
has it, and typically (the median of the videos). Searches and videos are kept in the folder: an interrupted command
goes on.
"""

import argparse
from pathlib import Path
from typing import List

import numpy as np
import torch

from benchmarks.lib import compare, models, plan_search
from benchmarks.lib.bench import Bench
from benchmarks.lib.calibration import SEED
from benchmarks.lib.kept import made_by
from benchmarks.lib.models import Case
from benchmarks.lib.own import planned
from benchmarks.lib.quality import interval
from osaccel import formats, settings
from osaccel.search.frames import mean_psnr
from osaccel.settings import Goal


def line(bench: Bench, calls: List[Case], videos: List[Case], goal: Goal, probed: int = plan_search.PROBED) -> str:
    """What a goal costs and what is kept of it."""
    found = plan_search.reached(bench, calls, goal, probed)
    report = found["report"]
    row = compare.in_parts(bench, planned(bench, formats.parse_plan(found["plan"], "a found plan")), videos)
    error = "{:.4f} [{:.4f}, {:.4f}]".format(*interval(row.errors))
    psnr = "-" if report["psnr"] is None else f"{report['psnr']:.1f}"
    return (
        f"{goal!s:<12}{report['work']:>7.1%}{report['error']:>9.4f}{psnr:>7}"
        f"{report['cost']['plain_generations']:>13.2f}{error:>27}{mean_psnr(row.psnr):>9.1f}{np.median(row.psnr):>11.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_options(parser)
    parser.add_argument("--goals", required=True, help="psnr:DB and error:E, with commas between")
    parser.add_argument("--videos", type=int, default=48, help="held-out videos (48)")
    parser.add_argument("--prompts", type=int, default=8, help="calibration calls of searches (8)")
    parser.add_argument("--probed", type=int, default=plan_search.PROBED, help="OSACCEL_SEARCH_PROBED of the searches")
    parser.add_argument("--kept", type=Path, required=True, help="folder for everything that is finished")
    parser.add_argument("--batch", type=int, default=4, help="videos sampled at a time (4)")
    parser.add_argument("--steps", type=int, help="of the plain run (the model's)")
    options = parser.parse_args()
    goals = settings.load({"OSACCEL_TARGET": options.goals}).target
    torch.set_num_threads(1)
    model, pipeline = models.load(options)
    bench = Bench(model, pipeline, options.steps, options.batch, options.kept)
    calls, videos = model.calibration_cases(options.prompts, SEED), model.heldout_cases(options.videos)
    print("\n".join(f"{name}: {value}" for name, value in made_by().items()))
    print(f"{model.name}, {bench.steps} steps; searches looked at {len(calls)} calls; {len(videos)} held-out videos")
    print(
        f"{'':<12}{'work':>7}{'error':>9}{'PSNR':>7}{'generations':>13}{'held out: error':>27}{'PSNR':>9}"
        f"{'typically':>11}",
        flush=True,
    )
    for goal in goals:
        print(line(bench, calls, videos, goal, options.probed), flush=True)


if __name__ == "__main__":
    main()
