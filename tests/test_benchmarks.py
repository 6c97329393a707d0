# SPDX-License-Identifier: Apache-2.0
"""The comparison harness: real block counts, budgets that are met, packages that may be missing."""

import argparse
import ast
import contextlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from benchmarks import caches, search  # noqa: E402
from benchmarks.competitors import (  # noqa: E402
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
from benchmarks.lib import compare, masks, models, motion, quality  # noqa: E402
from benchmarks.lib.bench import Arm, Bench  # noqa: E402
from benchmarks.lib.calibration import Calibration, meet_budget  # noqa: E402
from benchmarks.lib.own import interval_config, masked, planned, with_plan  # noqa: E402
from benchmarks.reference.load import heldout_prompts, load_pipeline  # noqa: E402
from osaccel.plan import Region, of_dit_cache  # noqa: E402
from osaccel.search.dit_cache.candidates import Candidate  # noqa: E402

MODEL = models.model("miniature")
STEPS, WARMUP, BLOCKS, SEED = 12, 3, 12, 1
PROMPT = heldout_prompts(1)[0]
MASK = masks.even(100, BLOCKS, STEPS, WARMUP)


@pytest.fixture(scope="module")
def bench():
    return Bench(MODEL, load_pipeline(), STEPS)


@pytest.fixture(scope="module")
def calibration(bench):
    return Calibration(bench, WARMUP)


def sampled(bench, attach):
    return bench.sample(Arm(attach), PROMPT, SEED)


def own(forecast):
    return lambda pipeline: with_plan(pipeline, masked(Region(1, BLOCKS), MASK, forecast))


def test_blocks_are_counted_where_they_run(bench):
    plain = bench.sample(Arm(steps=STEPS), PROMPT, SEED)
    assert plain.computed == STEPS * BLOCKS
    assert sampled(bench, own(False)).computed == STEPS + sum(MASK) * (BLOCKS - 1) == 100
    again = bench.sample(Arm(steps=STEPS), PROMPT, SEED)
    assert torch.equal(plain.latents, again.latents)


def test_fewer_steps_follow_the_same_motion(bench):
    """Coupled to the plain run: nearer to it than a plain run from other noise, on average over seeds."""

    plain, half, other = (
        [bench.sample(Arm(steps=steps), PROMPT, seed + first).latents for seed in range(8)]
        for steps, first in ((STEPS, 1), (STEPS // 2, 1), (STEPS, 100))
    )
    ratios = [float((b - a).norm() / (c - a).norm()) for a, b, c in zip(plain, half, other)]
    assert sum(ratios) / len(ratios) < 0.85


@pytest.mark.parametrize("forecast", [False, True])
def test_cache_dit_with_the_same_mask_is_the_same_rule(bench, forecast):
    pytest.importorskip("cache_dit")
    theirs = sampled(bench, lambda own: cache_dit.attach(own, STEPS, WARMUP, mask=MASK, taylor=forecast))
    ours = sampled(bench, own(forecast))
    assert theirs.computed == ours.computed
    assert (theirs.latents - ours.latents).norm() < 1e-3 * ours.latents.norm()


PACKAGED = {
    "cache-dit": lambda own, value: cache_dit.attach(own, STEPS, WARMUP, value),
    "cache-dit TaylorSeer": lambda own, value: cache_dit.attach(own, STEPS, WARMUP, value, taylor=True),
    "FirstBlockCache": lambda own, value: first_block_cache.attach(own, STEPS, WARMUP, value),
    "SeaCache": lambda own, value: sea_cache.attach(own, STEPS, WARMUP, value),
    "MagCache": lambda own, value: mag_cache.attach(own, STEPS, WARMUP, value, [1.0, *[0.9] * (STEPS - 1)]),
    "TeaCache": lambda own, value: tea_cache.attach(own, WARMUP, value),
}


@pytest.mark.parametrize("name", PACKAGED)
def test_thresholds_skip_after_the_warm_up_and_leave_nothing_behind(bench, name):
    if any(word in str(packages.missing()) for word in (name.split()[0], "diffusers")):
        pytest.skip("package missing")
    plain = sampled(bench, own(False))
    lowest, highest = (sampled(bench, lambda own, value=value: PACKAGED[name](own, value)) for value in (1e-9, 1e9))
    assert lowest.computed == STEPS * BLOCKS
    assert WARMUP * BLOCKS <= highest.computed < STEPS * BLOCKS
    assert torch.equal(sampled(bench, own(False)).latents, plain.latents)


def test_taylor_seer_keeps_to_its_schedule(bench):
    if "diffusers" in packages.missing():
        pytest.skip("package missing")
    every, start = taylor_seer.schedule(100, BLOCKS, STEPS, WARMUP)
    found = sampled(bench, lambda own: taylor_seer.attach(own, STEPS, start, every))
    assert 100 - BLOCKS < found.computed <= 100


def test_the_budget_is_met_from_below():
    blocks = lambda threshold: 40 - int(30 * min(threshold, 1))  # noqa: E731
    assert 20 <= blocks(meet_budget(blocks, 24, slack=4)) <= 24
    with pytest.raises(ValueError, match="no threshold keeps the computed blocks within 5"):
        meet_budget(blocks, 5, slack=4)


@pytest.mark.parametrize("ratio", [1.3, 1.5, 1.6, 1.8, 2.2])
def test_fixed_schedules_fill_the_budget(ratio):
    size = budget, *_ = (int(1200 / ratio), 12, 100, 10)
    computed = of_dit_cache(interval_config(*size)).work(12, 100) * 1200
    assert 0.95 * budget < computed <= budget
    assert 0.95 * budget < 100 + 11 * sum(masks.even(*size)) <= budget
    every, start = taylor_seer.schedule(*size)
    runs = sum(step < start or (step - start - 1) % every == 0 for step in range(100))
    assert 0.95 * budget < 12 * runs <= budget


def test_a_missing_package_is_one_clear_line(calibration, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    absent = packages.missing()
    assert list(absent) == ["cache-dit"] and "cache-dit left out" in absent["cache-dit"]
    assert "pip install" in absent["cache-dit"] and "\n" not in absent["cache-dit"]
    everything = {**absent, "diffusers": "diffusers left out"}
    names = list(caches.Arms(calibration, 1 / 1.5, everything).by_name)
    assert names[0] == f"plain {STEPS}" and not any(name.startswith(("cache-dit", "diffusers")) for name in names)


def test_tables_and_curve(calibration, tmp_path):
    """The whole comparison on a few steps, without the packages."""
    everything = {"cache-dit": "", "diffusers": ""}
    report = caches.compare(calibration, 1.5, MODEL.heldout_cases(2), everything)
    rows, fixed = report["rows"], [name for name in report["rows"] if name not in report["thresholds"]][1:]
    assert rows["plain 12"]["computed"] == 144 and "latent_error" not in rows["plain 12"]
    assert rows["plain 6"]["computed"] == 72 and rows["plain 8"]["computed"] == report["budget"] == 96
    assert all(rows[name]["computed"] <= 96 and len(rows[name]["latent_error_each"]) == 2 for name in fixed)
    json.dumps(report)
    assert len(caches.show(report).splitlines()) == len(rows) + 2 + len(report["left out"])
    caches.plot([report], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_s_parser_knows_every_caption():
    from benchmarks.reference import data
    from osaccel.demo import parser

    for scene in data.all_scenes():
        assert parser.attributes(scene.caption) == {name: getattr(scene, name) for name in parser.ATTRIBUTES}
    with pytest.raises(ValueError, match="'a cat' is no prompt of the miniature"):
        parser.attributes("a cat")


def test_placed_masks_are_the_best_of_their_size():
    """Against every mask there is, on costs drawn at random."""
    steps, warmup, reach = 9, 3, 8
    cost = np.random.default_rng(0).random((steps, reach + 1, reach + 1))

    def total(mask):
        computed, found = [], 0.0
        for step, runs in enumerate(mask):
            if runs:
                computed.append(step)
            else:
                found += cost[step, step - computed[-1], computed[-1] - computed[-2]]
        return found

    for runs in range(warmup, steps + 1):
        choices = itertools.combinations(range(warmup, steps), runs - warmup)
        every = [[step < warmup or step in chosen for step in range(steps)] for chosen in choices]
        mask = masks.place(cost, runs, warmup)
        assert sum(mask) == runs and abs(total(mask) - min(map(total, every))) < 1e-12
    with pytest.raises(ValueError, match="no mask of 9 steps"):
        masks.place(cost, 10, warmup)


def test_the_search_benchmark_goes_through_and_keeps_what_it_measured(tmp_path):
    model, pipeline = models.model("miniature"), load_pipeline()
    options = argparse.Namespace(
        heldout=2,
        first=0,
        draw=3,
        draw_only=False,
        prompts=[1, 4],
        repeats=1,
        seed=7,
        label="ours",
        others=[],
        ratios=[1.3],
    )
    ledger = search.Ledger(Bench(model, pipeline, steps=6, folder=tmp_path))
    result = search.compare(ledger, 1.3, options)
    methods = [search.Choice(*row) for row in result["choices"]]
    assert [row.method for row in methods] == ["ours, 1 prompt, a", "ours, 4 prompts, a", "two-stage loop, 1 prompt"]
    assert all(row.generations <= 6 for row in methods[:2])
    assert all(Candidate(*row.candidate).speed_up(12, 6) >= 1.3 for row in methods)
    text = search.table([result])
    assert "1.3x: 3 of" in text and "on 2 held-out videos" in text and "best typical, drawn" in text
    again = search.Ledger(Bench(model, pipeline, steps=6, folder=tmp_path))
    assert search.compare(again, 1.3, options) == result and not again._replays


# The library that commands share -------------------------------------------------------------------------------------

CASES = MODEL.heldout_cases(3)


def close(first, second, tolerance=1e-4):
    return float((first - second).norm()) <= tolerance * float(second.norm())


def imported(path):
    """The modules that a file imports, names taken from packages included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("folder, below", [("lib", ["lib"]), ("competitors", ["lib", "competitors"])])
def test_no_import_points_up(folder, below):
    for path in Path(caches.__file__).parent.glob(f"{folder}/*.py"):
        rooms = [name.split(".")[1] for name in imported(path) if name.startswith("benchmarks.")]
        assert set(rooms) <= set(below), path


def test_a_video_has_its_noise_in_every_batch_and_it_is_the_seed_s(bench):
    together = Bench(MODEL, bench.pipeline, STEPS, batch=3).run(Arm(), CASES)
    for case, sample in zip(CASES, together):
        torch.manual_seed(case.seed)
        arguments = {**MODEL.arguments(), "output_type": "latent", "num_inference_steps": STEPS}
        alone = bench.pipeline(case.prompt, **arguments).images
        assert torch.equal(bench.sample(Arm(), *case).latents, alone)
        assert close(sample.latents, alone) and sample.computed == STEPS * BLOCKS


def test_levels_filled_in_leave_the_motion_as_it_was():
    plain, between = [16.0, 4.0, 1.0, 0.25], [16.0, 3.0, 2.0, 0.25]
    whole, filled = motion.Motion(plain, (40000,), 1), motion.Motion(plain, (40000,), 1, between)
    torch.manual_seed(1)
    assert torch.equal(filled.initial(), torch.randn(40000))
    drawn = [torch.randn(40000) for _ in plain[1:]]
    for sigma, noise in zip(plain[1:], drawn):
        assert torch.allclose(whole.until(motion.snr_of(sigma)), noise, atol=1e-5)
        assert torch.allclose(filled.until(motion.snr_of(sigma)), noise, atol=1e-5)
    again = motion.Motion(plain, (40000,), 1, between)
    steps = torch.stack([again.until(motion.snr_of(sigma)) for sigma in between[1:]])
    assert torch.allclose(torch.cov(steps), torch.eye(3), atol=0.03)
    merged = motion.Motion(plain, (40000,), 1).until(motion.snr_of(0.25))
    widths = torch.tensor([1 / b**2 - 1 / a**2 for a, b in zip(plain, plain[1:])])
    expected = sum(w.sqrt() * noise for w, noise in zip(widths, drawn)) / widths.sum().sqrt()
    assert torch.allclose(merged, expected, atol=1e-5)
    with pytest.raises(ValueError, match="must lie between"):
        motion.Motion(plain, (1,), 1, [17.0])


def test_fewer_steps_of_deterministic_samplers_and_of_those_that_cannot_be_coupled():
    for sampler in ("EulerDiscrete", "DDIM"):
        own = Bench(MODEL, load_pipeline(sampler), STEPS)
        few, plain = (own.run(arm, CASES[:1])[0] for arm in (fewer_steps.of(8, STEPS), Arm()))
        assert few.computed == 8 * BLOCKS and 0 < quality.errors([few], [plain])[0] < 1
    own = Bench(MODEL, load_pipeline("DDPM"), 4)
    assert own.run(Arm(), CASES[:1])[0].computed == 4 * BLOCKS
    with pytest.raises(ValueError, match="DDPMScheduler draws noise"):
        own.run(fewer_steps.of(3, 4), CASES[:1])


def test_what_an_arm_says_it_costs_is_what_is_counted(bench, calibration):
    found = [competitor.at(calibration, 0.75) for competitor in (cfg_gate.COMPETITOR, fewer_steps.COMPETITOR)]
    if "diffusers" not in packages.missing():
        found.append(taylor_seer.COMPETITOR.at(calibration, 0.75))
    found.append(planned(bench, masked(Region(1, BLOCKS), MASK, True)))
    for arm in found:
        assert bench.sample(arm, PROMPT, SEED).computed / bench.plain_blocks == pytest.approx(arm.work), arm.name
        assert 0.6 < arm.work <= 0.75
    with pytest.raises(ValueError, match="out of its reach"):
        cfg_gate.at(calibration, 0.5)


def test_the_cfg_gate_freezes_the_difference(bench):
    """Against both halves computed at every step, the unconditional one then thrown away."""

    def slow(pipeline, gate=5):
        net, seen = pipeline.transformer, []
        original = net.forward

        def forward(*args, **kwargs):
            unconditional, conditional = original(*args, **kwargs)[0].chunk(2)
            seen.append(conditional - unconditional)
            return (torch.cat([conditional - seen[min(len(seen), gate) - 1], conditional]),)

        net.forward = forward
        return contextlib.nullcontext()

    wanted, found = sampled(bench, slow), sampled(bench, lambda own: cfg_gate.attach(own, 5))
    assert close(found.latents, wanted.latents) and wanted.computed == STEPS * BLOCKS
    assert found.computed == (5 + 7 / 2) * BLOCKS
    plain = sampled(bench, lambda own: cfg_gate.attach(own, STEPS))
    assert torch.equal(plain.latents, bench.sample(Arm(), PROMPT, SEED).latents)


def test_plain_runs_and_rows_are_kept(bench, tmp_path):
    arm = fewer_steps.of(8, STEPS)
    first = Bench(MODEL, bench.pipeline, STEPS, batch=2, folder=tmp_path)
    row = compare.measure(first, arm, CASES)
    assert row.work == pytest.approx(8 / STEPS) and len(row.errors) == len(row.psnr) == 3
    again = Bench(MODEL, bench.pipeline, STEPS, folder=tmp_path)
    again.run = again._together = None  # nothing may be sampled
    assert compare.measure(again, arm, CASES) == row
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(again.plain(CASES), first.plain(CASES)))
    other = Bench(MODEL, bench.pipeline, STEPS - 1, folder=tmp_path)
    assert other.kept.folder != first.kept.folder and not list(other.kept.folder.glob("plain*"))


def test_statistics_of_errors():
    errors = [0.01] * 8 + [0.2] * 10 + [0.6, 0.9]
    found = quality.summary(errors)
    assert found["mean"][0] == pytest.approx(0.179) and found["typical"][0] == pytest.approx(0.2)
    assert found["worst tenth"][0] == pytest.approx(0.75) and found["turned"][0] == pytest.approx(0.1)
    assert all(low <= value <= high for value, low, high in found.values())
    assert quality.worst_tenth([1.0, 3.0]) == 3.0
    assert quality.over([2 * error for error in errors], errors) == pytest.approx([1, 1, 1])


def test_rows_make_a_table_and_a_plot(tmp_path):
    rows = [
        compare.Row(f"{family} {work}", family, work, 1.0, [error, 2 * error, 0.7], [40.0, 41.0, 42.0])
        for family, error in (("osaccel plan", 0.01), ("fewer steps", 0.02))
        for work in (0.5, 0.6)
    ]
    text = compare.table(rows, against="osaccel plan 0.5")
    assert len(text.splitlines()) == 6 and "50.0%" in text and "33.3% [0.0%, 100.0%]" in text and "-" in text
    assert json.loads(json.dumps(compare.summaries(rows)))[0]["summary"]["turned"][0] == pytest.approx(1 / 3)
    compare.plot(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
