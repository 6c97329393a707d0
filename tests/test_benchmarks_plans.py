# SPDX-License-Identifier: Apache-2.0
"""The benchmark of plans: even patterns, the mask search, rivals of equal work, the whole comparison on few steps."""

import json

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from benchmarks import goals, placement, plans  # noqa: E402
from benchmarks.competitors import budcache  # noqa: E402
from benchmarks.lib import compare, models, patterns, plan_search  # noqa: E402
from benchmarks.lib.bench import Arm, Bench, NotKept  # noqa: E402
from benchmarks.lib.calibration import Calibration  # noqa: E402
from benchmarks.lib.own import planned  # noqa: E402
from benchmarks.reference.load import load_pipeline  # noqa: E402
from osaccel import formats  # noqa: E402
from osaccel.plan import Plan, Region  # noqa: E402
from osaccel.search.plan.actions import FORECAST, HALF, SKIP, Windows, actions_for, plan_of  # noqa: E402
from osaccel.settings import Goal  # noqa: E402

MODEL = models.model("miniature")
STEPS, BLOCKS = 12, 12
CASES = MODEL.heldout_cases(3)
ABSENT = {"cache-dit": "cache-dit left out", "diffusers": "diffusers left out"}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture
def bench(pipeline):
    return Bench(MODEL, pipeline, STEPS, batch=3)


@pytest.mark.parametrize(
    "name, reach", [("conditional only", 0.55), ("skipped, corrected", 0.3), ("region forecast", 0.3)]
)
def test_even_patterns_cost_what_they_may_and_begin_in_full(name, reach):
    for steps, work in ((100, 0.75), (100, reach), (30, 0.7)):
        found = patterns.plans(patterns.FAMILIES[name], work, BLOCKS, steps)
        assert len({plan.work_of(1, BLOCKS) for plan in found}) == 1
        for plan in found:
            assert work - 1 / steps < plan.work(BLOCKS) <= work + 1e-9
            assert plan.work_of(0, BLOCKS) == plan.work_of(1, BLOCKS) == plan.work_of(steps - 1, BLOCKS) == BLOCKS
    with pytest.raises(ValueError, match="would have to be saved"):
        patterns.plans(patterns.FAMILIES["conditional only"], 0.5, BLOCKS, 100)


def test_the_best_even_pattern_is_that_of_calibration_calls(bench):
    calibration = Calibration(bench)
    best = patterns.best(calibration, "skipped, corrected", 0.7)
    every = [planned(bench, plan) for plan in patterns.plans(patterns.skipped, 0.7, BLOCKS, STEPS)]
    squares = {arm.key: patterns.mean_square(calibration, arm) for arm in every}
    assert len(squares) > 1 and squares[best.key] == min(squares.values())


def test_both_ways_to_reuse_leave_the_network_alone_where_the_mask_is_not_set(bench):
    mask = budcache.even(7, STEPS, 2)
    assert sum(mask) == 7 and mask[:2] == (True, True)
    for reuse in (budcache.OUTPUT, budcache.DENOISED):
        found = bench.run(budcache.arm(mask, reuse), CASES[:1])[0]
        assert found.computed == 7 * BLOCKS
        whole = bench.run(budcache.arm((True,) * STEPS, reuse), CASES[:1])[0]
        assert bool((whole.latents == bench.plain(CASES[:1])[0].latents).all())


def test_the_mask_search_keeps_its_work_and_budget_and_goes_on_where_it_stopped(pipeline, tmp_path):
    def calibration(only_kept=False):
        return Calibration(Bench(MODEL, pipeline, STEPS, batch=2, folder=tmp_path, only_kept=only_kept), warmup=3)

    first = calibration()
    arm = budcache.search(first, 0.5, budget=5.0)
    assert arm.work == 0.5
    kept = len(list(first.bench.kept.folder.glob("learned-*")))
    assert 4 < kept <= 8  # (5 - 1) / 0.5
    starts = [budcache.arm(budcache.even(6, STEPS, 1), reuse) for reuse in (budcache.OUTPUT, budcache.DENOISED)]
    assert patterns.mean_square(first, arm) <= min(patterns.mean_square(first, start) for start in starts)
    assert budcache.search(calibration(only_kept=True), 0.5, budget=5.0).key == arm.key
    with pytest.raises(ValueError, match="nothing to search"):
        budcache.search(first, 1.0)


def test_moves_keep_the_number_of_computed_steps():
    mask, generator = budcache.even(6, STEPS, 1), np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        mask = budcache.moved(mask, generator)
        assert sum(mask) == 6 and mask[0]
        seen.add(mask)
    assert len(seen) > 100


def test_rivals_cost_what_the_found_plan_does():
    windows = Windows.of(100, BLOCKS)
    actions = actions_for(windows.length, (HALF, SKIP, FORECAST))
    half = next(action for action in actions if action.name == "s2")
    own = plan_of([half] * windows.count, windows)
    draw, generator = plan_search.Draw(actions, windows, own.work(BLOCKS)), np.random.default_rng(0)
    structured, random = draw.structured(20, generator), draw.random(20, generator)
    assert len(structured) == len(random) == 20 and all(len(set(chosen)) <= 2 for chosen in structured)
    for chosen in (*structured, *random):
        assert (
            own.work(BLOCKS) - plan_search.NEAR - 1e-6
            <= plan_of(chosen, windows).work(BLOCKS)
            <= own.work(BLOCKS) + 1e-6
        )
    assert plan_search.Draw(actions, windows, 0.01).random(2, generator) == []


def test_a_row_in_parts_is_the_row(bench):
    arm = Arm(name="half", steps=6)
    whole, parts = compare.measure(bench, arm, CASES), compare.in_parts(bench, arm, CASES, 2)
    assert parts.work == whole.work and len(parts.psnr) == 3
    assert parts.errors == pytest.approx(whole.errors, rel=1e-3)


def test_the_whole_comparison_on_few_steps(pipeline, tmp_path):
    def comparison(only, only_kept=False):
        own = Bench(MODEL, pipeline, 20, batch=3, folder=tmp_path, only_kept=only_kept)
        return plans.Comparison(own, (1.6,), 2, 1, ABSENT, only, rivals=(2, 1))

    first = comparison(["ours", "alone", "even", "fewer", "gate", "taylor", "rivals"])
    lines = list(first.run())
    assert len(lines) == sum(map(len, first.rows.values())) + len(first.among[1.6]) and not first.not_run
    names = [row.name for row in first.rows[1.6]]
    assert names[0] == plans.OURS and "skipped, corrected, searched" in names and "plain 12" in names
    assert all(row.work <= 1 / speed + 1e-6 for speed, rows in first.rows.items() for row in rows)
    assert first.left_out[1.6]["diffusers TaylorSeer"] == "diffusers left out"
    ranked, *again = first.among[1.6]
    assert (ranked.drawn, ranked.videos) == (2, 1) and set(ranked.over) == {"mean", "typical"}
    assert [(one.drawn, one.videos) for one in again] == ([(max(ranked.better.values()), 1)] if again else [])
    assert bool(again) == any(ranked.better.values())
    text = first.text()
    assert "1.6x: network work at most 62.5%" in text and "best other row" in text and "among 2 plans" in text
    plans.write(first, {"command": "test"}, text, tmp_path / "result")
    written = json.loads((tmp_path / "result.json").read_text())
    assert len(written["works"]["1.6x"]["rows"][0]["errors"]) == 2 and written["search"]["generations"] <= 8
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    # Nothing of it is sampled again; what was never run is said to be missing.
    again = comparison(["ours", "alone", "even", "fewer", "gate", "tea"], only_kept=True)
    list(again.run())
    assert [row.errors for row in again.rows[1.6]] == [row.errors for row in first.rows[1.6]]
    assert again.not_run == ["tea at 1.6x (plain)"]


def test_only_what_is_kept_is_not_sampled(pipeline):
    with pytest.raises(NotKept):
        Bench(MODEL, pipeline, STEPS, only_kept=True).plain(CASES[:1])


def test_groups_are_known_by_name():
    assert plans._groups("ours,sea") == ["ours", "sea"]
    with pytest.raises(plans.argparse.ArgumentTypeError, match="no group 'seas'"):
        plans._groups("seas")


def test_found_plans_of_a_family_alone_hold_nothing_else(pipeline):
    own = Bench(MODEL, pipeline, 26, batch=1)
    found = plan_search.search(own, MODEL.calibration_cases(1, 7), (50.0, 1.3, 2.1))
    assert found.generations <= 9 and found.plans[0] is None and found.rivals[0] == []
    halves, skips = (found.families[name] for name in ("conditional only", "skipped, corrected"))
    assert halves[0] is halves[2] is skips[0] is None and not formats.parse_plan(halves[1], "halves").skip
    for content, speed in zip(skips[1:], (1.3, 2.1)):
        plan = formats.parse_plan(content, "skips")
        assert not plan.conditional_only and plan.skip and plan.work(BLOCKS) <= 1 / speed + 1e-9
    assert isinstance(formats.parse_plan(found.rivals[1][0][1], "rival"), Plan)


def test_a_goal_s_line_says_what_its_plan_costs_and_leaves_on_other_videos(pipeline, tmp_path):
    bench, goal = Bench(MODEL, pipeline, 24, batch=2, folder=tmp_path), Goal("error", 0.1)
    calls, videos = MODEL.calibration_cases(1, 7), CASES[:2]
    said = goals.line(bench, calls, videos, goal)
    found = plan_search.reached(bench, calls, goal)
    plan = formats.parse_plan(found["plan"], "a found plan")
    name, work, error, psnr, generations, mean, *_ = said.split()
    assert (name, psnr) == ("error:0.1", "-") and float(generations) <= 6
    assert work == f"{plan.work(BLOCKS):.1%}" != "100.0%" and float(error) <= 0.1
    errors = compare.measure(bench, planned(bench, plan), videos).errors
    assert float(mean) == pytest.approx(np.mean(errors), abs=1e-4)
    # What is finished is kept.
    assert goals.line(Bench(MODEL, pipeline, 24, folder=tmp_path, only_kept=True), calls, videos, goal) == said


def test_moved_steps_take_the_same_work_and_err_less_on_the_calls_that_decide(bench, tmp_path):
    plan = Plan(STEPS, skip=(5, 7, 9), conditional_only=(3, 6), regions=(Region(1, BLOCKS, (10,), order=1),))
    swapped = placement.exchanged(plan, 6, 7)
    assert (swapped.skip, swapped.conditional_only, swapped.regions) == ((5, 6, 9), (3, 7), plan.regions)
    assert placement.exchanged(plan, 10, 2).regions[0].reuse == (2,) and placement.exchanged(plan, 1, 2) == plan
    bench.kept, generator = Bench(MODEL, bench.pipeline, STEPS, folder=tmp_path).kept, np.random.default_rng(1)
    for _ in range(50):
        other = placement.moved(plan, generator)
        assert other != plan and other.work(BLOCKS) == plan.work(BLOCKS) and other.work_of(0, BLOCKS) == BLOCKS
    lines = list(placement.lines(bench, plan, CASES[:1], CASES[1:2], 12))
    tried, kept, on_calls = zip(*(line.split()[:3] for line in lines))
    assert tried == ("0", "4", "8", "12") and int(kept[-1]) > 0 == int(kept[0])
    assert list(map(float, on_calls)) == sorted(map(float, on_calls), reverse=True) and on_calls[-1] < on_calls[0]
    # What is finished is kept.
    again = Bench(MODEL, bench.pipeline, STEPS, folder=tmp_path, only_kept=True)
    assert list(placement.lines(again, plan, CASES[:1], CASES[1:2], 12)) == lines


def test_choices_from_few_calls_lose_nothing_where_all_calls_are_alike():
    bench_windows = pytest.importorskip("benchmarks.windows")
    names, count = ["full", "c2", "s2", "f2", "s3"], 8
    generator = np.random.default_rng(0)
    kinds = {"c2": 0, "s2": 1, "s3": 1, "f2": 2}
    sizes = np.zeros((12, count, len(names), 4))
    for place, name in enumerate(names[1:], 1):
        sizes[:, :, place, kinds[name]] = generator.random(count) * (3 if name == "s3" else 1)
    # The early window, the first, has the gain of the next.
    gain = np.exp(np.maximum(0, np.linspace(-1 / 3, 2, count)))[:, None]
    alike = bench_windows.Measured(Windows.of(100, BLOCKS), names, sizes.sum(-1) * gain, sizes)
    rule = bench_windows.by_groups(count)
    assert bench_windows.excess(alike, 0.6, 4, 5, rule) == pytest.approx([1.0, 1.0, 1.0])
    # One call in twelve is another matter: what few calls show is then not what all do.
    odd = alike._replace(
        squares=np.where(np.arange(12)[:, None, None] == 3, 1e3 * alike.squares[:, ::-1], alike.squares)
    )
    assert max(bench_windows.excess(odd, 0.6, 4, 20, rule)) > 1.01
