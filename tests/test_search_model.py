# SPDX-License-Identifier: Apache-2.0
"""What the cache search expects of candidates from one generation, and what it makes of a few measured ones."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from osaccel.sampling.levels import NoiseLevels
from osaccel.search.dit_cache.candidates import Candidate, Goal, candidates
from osaccel.search.dit_cache.choice import Expectation, Search
from osaccel.search.dit_cache.weights import step_weights
from osaccel.search.evaluation import Evaluation
from osaccel.search.planned import doubt

BLOCKS, STEPS = 12, 40
WEIGHTS = np.linspace(3, 1, STEPS)


def made_up_grams():
    """Of deltas that change smoothly over the steps, faster at the beginning."""
    rng = np.random.default_rng(0)
    time = np.arange(STEPS)[:, None] / STEPS

    def delta():
        waves = [rng.normal(size=(1, 30)) * np.sin(time * speed + rng.normal()) for speed in (2, 5, 9)]
        return np.exp(-2 * time) * sum(waves)

    deltas = np.stack([delta() for _ in range(BLOCKS)], axis=1)
    grams = np.zeros((5, STEPS, BLOCKS, BLOCKS))
    for gap in range(1, 6):
        for step in range(gap, STEPS):
            change = deltas[step] - deltas[step - gap]
            grams[gap - 1, step] = change @ change.T
    return grams


GRAMS = made_up_grams()


def test_what_is_expected_is_what_the_reused_steps_change_times_what_the_sampler_leaves_of_it():
    pool = candidates(BLOCKS, STEPS, 1.5)
    wanted = np.zeros(len(pool))
    for row, (start, stop, first, interval) in enumerate(pool):
        for step in range(first, STEPS):
            gap = (step - first) % interval
            if gap:
                wanted[row] += WEIGHTS[step] ** 2 * GRAMS[gap - 1, step, start:stop, start:stop].sum()
    assert np.exp(Expectation(pool, GRAMS, WEIGHTS).logs) == pytest.approx(wanted**0.5, rel=1e-6)


@pytest.mark.parametrize(
    "scheduler, eta",
    ((EulerAncestralDiscreteScheduler, 0), (EulerDiscreteScheduler, 0), (DDIMScheduler, 0)),
    ids=("ancestral", "flow", "ddim"),
)
@pytest.mark.parametrize("kind", ("epsilon", "v_prediction"))
def test_of_gaussian_latents_the_weights_say_what_is_left_of_a_change(scheduler, eta, kind):
    """A denoiser that knows the latents to be Gaussian is sampled twice, its output changed at one step."""
    variance, steps = 0.5, 200
    clip = {"clip_sample": False} if scheduler is DDIMScheduler else {}

    def final(changed=None):
        sampler = scheduler(prediction_type=kind, **clip)
        sampler.set_timesteps(steps)
        levels = NoiseLevels(sampler)
        x = torch.full((1,), 2.0, dtype=torch.float64) * sampler.init_noise_sigma
        for step, (time, sigma) in enumerate(zip(sampler.timesteps, levels.of_steps())):
            given = sampler.scale_model_input(x, time)
            clean = x * (1 if hasattr(sampler, "sigmas") else (1 + sigma**2) ** 0.5)
            denoised = clean * variance / (variance + sigma**2)
            output = levels.model_output(denoised.float(), sigma, x.float()).double() + (1e-2 if step == changed else 0)
            drawn = {"generator": torch.Generator().manual_seed(step)} if "Ancestral" in scheduler.__name__ else {}
            x = sampler.step(output, time, x, **drawn).prev_sample
            assert given.shape == x.shape
        return float(x), step_weights(sampler, steps, variance)

    plain, weights = final()
    for step in (60, 120, 160, 190):
        assert abs(final(step)[0] - plain) / 1e-2 == pytest.approx(weights[step], rel=0.15)


def test_where_nothing_is_known_of_the_scheduler_every_step_counts_the_same():
    assert (step_weights(None, 7, 1.0) == 1).all()
    sampler = DPMSolverMultistepScheduler()
    sampler.set_timesteps(9)
    assert len(step_weights(sampler, 9, 1.0)) == 9 and (step_weights(sampler, 12, 1.0) == 1).all()


def measured(candidate, error, **more):
    return Evaluation(candidate.config.to_dict(), error, 1.0, **more)


def searched(errors_of, count=8, goal=None):
    """A search among candidates that have these errors, after so many of them were measured."""
    search = Search(candidates(BLOCKS, STEPS, 1.5), GRAMS, WEIGHTS, goal or Goal(1.5))
    for _ in range(count):
        candidate = search.order(count)[0]
        search.add(measured(candidate, errors_of(candidate)))
    return search


def test_gains_that_differ_over_steps_and_blocks_are_found_by_a_few_measurements():
    """What a prediction misses varies over the family, here with where regions stop and reuse begins."""
    pool = candidates(BLOCKS, STEPS, 1.5)
    expectation = Expectation(pool, GRAMS, WEIGHTS)
    for slopes in ((4, 0, 0), (0, -1, 1), (-3, 1, -1.5)):
        errors = np.exp(expectation.logs + expectation.places @ np.array(slopes) - 3)
        search = searched(lambda candidate, errors=errors: errors[pool.index(candidate)])
        judged = errors * [doubt(candidate.first, STEPS) for candidate in pool]
        assert judged[pool.index(search.choice())] <= 1.1 * judged.min()
        found = np.array([search.expected()[candidate] for candidate in pool])
        assert np.std(np.log(errors / found)) < 0.7 * np.std(np.log(errors) - expectation.logs)


def test_the_first_look_is_at_different_steps_and_leaves_half_to_what_was_learned():
    search = searched(lambda candidate: 1.0, count=8)
    firsts = sorted(candidate.first for candidate in list(search.done)[:4])
    assert all(after - before >= 3 for before, after in zip(firsts, firsts[1:]))
    fresh = Search(search.pool, GRAMS, WEIGHTS, Goal(1.5))
    logs = fresh.expectation.logs + np.log([1.25 if candidate.first < 4 else 1 for candidate in fresh.pool])
    assert fresh.order(1)[0] == fresh.pool[int(np.argmin(logs))]


def test_what_reuses_among_the_first_steps_must_be_better_by_a_quarter():
    pool = candidates(BLOCKS, STEPS, 1.5)
    early, late = (next(c for c in pool if is_early == (c.first < 4)) for is_early in (True, False))
    for error, winner in ((0.9, late), (0.7, early)):
        search = Search(pool, GRAMS, WEIGHTS, Goal(1.5))
        search.add(measured(early, error))
        search.add(measured(late, 1.0))
        assert search.choice() == winner


def test_what_is_not_finite_loses_and_no_error_at_all_wins():
    pool = candidates(BLOCKS, STEPS, 1.5)[-3:]
    search = Search(pool, GRAMS, WEIGHTS, Goal(1.5))
    search.add(measured(pool[0], None))
    assert search.choice() is None and pool[0] not in search.order(9)
    search.add(measured(pool[1], 0.5))
    assert search.choice() == pool[1]
    search.add(measured(pool[2], 0.0))
    assert search.choice() == pool[2] and np.isfinite(list(search.expected().values())).all()
    grams = np.full_like(GRAMS, np.nan)
    assert Search(pool, grams, WEIGHTS, Goal(1.5)).order(9) == []


def test_the_fastest_that_keeps_a_psnr_is_found_in_a_few_measurements():
    pool = sorted({c for ratio in (1.1, 1.2, 1.3, 1.4, 1.5, 1.7) for c in candidates(BLOCKS, STEPS, ratio)})
    truth = np.exp(Expectation(pool, GRAMS, WEIGHTS).logs)
    psnr = dict(zip(pool, -20 * np.log10(truth / truth.max()) + 20))
    wish = float(np.median(list(psnr.values())))
    search = Search(pool, GRAMS, WEIGHTS, Goal(1.5, wish))
    for _ in range(8):
        for candidate in search.order(8)[:1]:
            search.add(measured(candidate, 1.0, psnr=psnr[candidate]))
    fastest = max(c.speed_up(BLOCKS, STEPS) for c in pool if psnr[c] >= wish)
    assert psnr[search.choice()] >= wish and search.choice().speed_up(BLOCKS, STEPS) > 0.98 * fastest
    assert isinstance(search.choice(), Candidate)
