# SPDX-License-Identifier: Apache-2.0
"""Caches at equal computed blocks on a trained reference model.

    python -m benchmarks.caches [--prompts 12] [--ratio 1.6] [--json FILE]      one table
    python -m benchmarks.caches --curve FILE.png [--json FILE]                  fidelity against computed blocks

The ratio is all block calls of the plain 100-step run / those of an arm. Every arm samples the same held-out prompts
from the same noise and with the same warm-up. Methods with a threshold get one that meets the budget on
calibration prompts. Intervals are 95 % bootstrap over prompts; errors are against the plain 100-step run.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch

from benchmarks import competitors
from benchmarks.competitors import fewer_steps, packages
from benchmarks.lib import compare as comparison
from benchmarks.lib import masks, models
from benchmarks.lib.bench import Arm, Bench, Sample
from benchmarks.lib.calibration import Calibration
from benchmarks.lib.kept import made_by
from benchmarks.lib.models import Case
from benchmarks.lib.own import interval_config, masked, planned
from benchmarks.lib.quality import errors, interval, psnr
from osaccel.demo.compare import ssim
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.formats import read_cache_config
from osaccel.plan import Region, of_dit_cache

RATIO, RATIOS = 1.6, (1.3, 1.5, 1.8, 2.2)


def own_arms(calibration: Calibration, work: float, config: Optional[DitCacheConfig]) -> List[Arm]:
    """osaccel: the four keys, also those of a file if there is one; masks with reuse and forecast."""
    bench, region = calibration.bench, Region(1, calibration.num_blocks)
    size = (calibration.budget(work), calibration.num_blocks, calibration.steps, calibration.warmup)
    arms = []
    for label, keys in (("", interval_config(*size)), (" (file)", config)):
        if keys is not None:
            plan = of_dit_cache(keys)
            name = f"osaccel, {plan.regions[0]}, interval {keys.cache_step_interval}{label}"
            arms.append(planned(bench, plan, name, f"osaccel, interval{label}"))
    even = masks.even(*size)
    costs = np.array(calibration.learned("costs of skipping", lambda: _costs(calibration, region)))
    for name, mask, forecast in (
        ("even mask, reuse", even, False),
        ("even mask, forecast", even, True),
        ("placed mask, forecast", masks.place(costs, sum(even), calibration.warmup), True),
    ):
        arms.append(planned(bench, masked(region, mask, forecast), f"osaccel, {region}, {name}"))
    return arms


def _costs(calibration: Calibration, region: Region) -> List[Any]:
    return masks.costs(calibration.bench, calibration.cases, calibration.warmup, region).tolist()


class Arms:
    """The arms at one budget, the plain run first, and the methods that have none there."""

    def __init__(
        self, calibration: Calibration, work: float, absent: Dict[str, str], config: Optional[DitCacheConfig] = None
    ):
        steps = calibration.steps
        halved, fewer = fewer_steps.of(steps // 2, steps), fewer_steps.at(calibration, work)
        others, self.left_out = competitors.arms_at(calibration, work, absent, competitors.CACHES)
        found = [Arm(name=f"plain {steps}"), halved, fewer, *own_arms(calibration, work, config), *others]
        self.by_name = {arm.name: arm for arm in found}
        self.thresholds = {arm.name: arm.threshold for arm in others if arm.threshold is not None}


def compare(
    calibration: Calibration,
    ratio: float,
    cases: Sequence[Case],
    absent: Dict[str, str],
    config: Optional[DitCacheConfig] = None,
) -> Dict[str, Any]:
    """One budget's report: every arm's row, the budget in block calls, the thresholds found."""
    bench = calibration.bench
    arms = Arms(calibration, 1 / ratio, absent, config)
    samples = run(bench, arms.by_name, cases)
    reference = next(iter(samples.values()))
    rows = {name: judged(bench, own, reference, cases) for name, own in samples.items()}
    for name, row in rows.items():
        row["family"] = arms.by_name[name].family
    return {
        "ratio": ratio, "budget": calibration.budget(1 / ratio), "thresholds": arms.thresholds,
        "left out": arms.left_out, "rows": rows,
    }  # fmt: skip


def run(bench: Bench, arms: Dict[str, Arm], cases: Sequence[Case]) -> Dict[str, List[Sample]]:
    """Every arm on every video; for odd ones in reverse order, so that no arm is always first."""
    samples: Dict[str, List[Sample]] = {name: [] for name in arms}
    for number, case in enumerate(cases):
        for name in sorted(arms, key=list(arms).index, reverse=bool(number % 2)):
            samples[name].append(bench.sample(arms[name], *case))
    return samples


def judged(bench: Bench, samples: List[Sample], reference: List[Sample], cases: Sequence[Case]) -> Dict[str, Any]:
    """One arm's row; fidelity is against the reference run of the same noise, and absent for the reference itself."""
    row: Dict[str, Any] = {
        "computed": float(np.mean([sample.computed for sample in samples])),
        "speedup": interval([base.seconds / own.seconds for own, base in zip(samples, reference)], np.median),
    }
    frames = [bench.frames(sample) for sample in samples]
    judge = bench.model.judge
    if judge is not None:
        row["as_prompted"] = interval([judge(video, case.prompt)["valid"] for video, case in zip(frames, cases)])
    if samples is not reference:
        plain = [bench.frames(sample) for sample in reference]
        each = errors(samples, reference)
        row["latent_error"], row["latent_error_each"] = interval(each), each
        row["psnr"] = interval([psnr(own, base) for own, base in zip(frames, plain)])
        row["ssim"] = interval([ssim(own, base) for own, base in zip(frames, plain)])
    return row


def show(report: Dict[str, Any]) -> str:
    """The readable table of one budget."""
    lines = [
        f"budget {report['budget']} block calls ({report['ratio']:g}x)",
        f"{'':<48}{'blocks':>7}{'latent rel. L2':>25}{'PSNR dB':>20}{'SSIM':>7}{'as prompted':>13}{'speed-up':>22}",
    ]
    for name, row in report["rows"].items():
        error = _cell(row.get("latent_error"), "{:.4f} ({:.4f}-{:.4f})")
        quality = _cell(row.get("psnr"), "{:.1f} ({:.1f}-{:.1f})")
        likeness = _cell(row.get("ssim"), "{:.3f}")
        valid = _cell(row.get("as_prompted") and [100 * row["as_prompted"][0]], "{:.0f} %")
        speed = _cell(row["speedup"], "{:.2f}x ({:.2f}-{:.2f})")
        lines.append(f"{name:<48}{row['computed']:>7.0f}{error:>25}{quality:>20}{likeness:>7}{valid:>13}{speed:>22}")
    return "\n".join([*lines, *(f"{name} left out: {reason}" for name, reason in report["left out"].items())])


def _cell(values: Optional[Sequence[float]], form: str) -> str:
    return "-" if values is None else form.format(*values)


def plot(reports: Sequence[Dict[str, Any]], path: Path) -> None:
    """Latent error and PSNR against the share of blocks computed, one line per method."""
    panels: Dict[str, Dict[str, comparison.Points]] = {"latent_error": {}, "psnr": {}}
    for report in reports:
        plain = next(iter(report["rows"].values()))["computed"]
        for row in report["rows"].values():
            for measure, lines in panels.items():
                if measure in row:
                    lines.setdefault(row["family"], []).append((row["computed"] / plain, row[measure][0]))
    labels = ("relative L2 error of the final latents", "PSNR of the frames, dB")
    comparison.draw(list(zip(labels, panels.values())), path, "share of block calls computed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts (12)")
    parser.add_argument("--ratio", type=float, nargs="+", help=f"block calls saved ({RATIO}; for a curve {RATIOS})")
    parser.add_argument("--curve", type=Path, help="several budgets, plotted to this PNG")
    parser.add_argument("--cache-config", type=Path, help="also a dit_cache_config.json, at its own budget")
    models.add_options(parser)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    absent = packages.missing()
    print("\n".join([*(f"{name}: {value}" for name, value in made_by().items()), *absent.values()]), flush=True)
    reports = compare_ratios(options, absent)
    if options.json:
        content = {"made by": made_by(), "prompts": options.prompts, "budgets": reports}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.curve:
        plot(reports, options.curve)


def compare_ratios(options: argparse.Namespace, absent: Dict[str, str]) -> List[Dict[str, Any]]:
    """Every ratio's comparison, each table printed as soon as it is there."""
    ratios = options.ratio or (RATIOS if options.curve else (RATIO,))
    model, pipeline = models.load(options)
    calibration, cases = Calibration(Bench(model, pipeline)), model.heldout_cases(options.prompts)
    config = read_cache_config(str(options.cache_config)) if options.cache_config else None
    reports = []
    for ratio in ratios:
        reports.append(compare(calibration, ratio, cases, absent, config))
        print(show(reports[-1]) + "\n", flush=True)
    return reports


if __name__ == "__main__":
    main()
