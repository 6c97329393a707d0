# SPDX-License-Identifier: Apache-2.0
"""The error model of the cache search: what a few verified candidates teach it about the rest of the family."""

import numpy as np
import pytest

from osaccel.search.cache_search import candidates
from osaccel.search.error_model import PRIOR, ErrorModel, Gains

BLOCKS, STEPS = 12, 40


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


def curves(grams, pool, carry, gain, correlation=0.4):
    """The errors written out: what a step leaves of an earlier error, and what it adds itself."""
    found = np.zeros((len(pool), STEPS))
    for row, (start, stop, first, interval) in enumerate(pool):
        error = 0.0
        for step in range(STEPS):
            gap = (step - first) % interval if step >= first else 0
            change = grams[gap - 1, step, start:stop, start:stop].sum() ** 0.5 if gap else 0.0
            old, new = carry(step) * error, gain(step, stop) * change
            error = (old**2 + 2 * correlation * old * new + new**2) ** 0.5
            found[row, step] = error
    return found


def log_gain(step, stop):
    return -3 + np.sin(5 * step / STEPS) - (step > 36) - np.cos(stop)


GAINS = Gains(
    np.array([log_gain(step, BLOCKS) for step in range(STEPS)]),
    np.array([log_gain(0, stop) - log_gain(0, BLOCKS) for stop in range(BLOCKS + 1)]),
)


@pytest.fixture(scope="module")
def family():
    """Errors grow in the middle and fade at the ends, as a sampler makes them."""
    grams, pool = made_up_grams(), candidates(BLOCKS, STEPS, 1.5)
    truth = curves(grams, pool, lambda n: np.exp(0.3 * np.sin(7 * n / STEPS - 1)), lambda *at: np.exp(log_gain(*at)))
    return grams, pool, truth


def test_the_errors_of_single_steps_add_up_as_written(family):
    grams, pool, _ = family
    model = ErrorModel(pool, grams, GAINS)
    wanted = curves(grams, pool, lambda n: 1.0, lambda *at: np.exp(log_gain(*at)))
    assert model.scores({}) == pytest.approx(wanted[:, -1], rel=1e-6)
    assert model.weights() == pytest.approx(np.ones(STEPS))


def test_a_few_verified_candidates_rank_the_family_and_give_it_their_unit(family):
    grams, pool, truth = family
    rng = np.random.default_rng(1)
    done = {}
    for index in rng.permutation(len(pool))[:6]:
        noisy = truth[index] * np.exp(0.1 * rng.normal(size=STEPS))
        # One of them was given up half way.
        curve = noisy[: STEPS // 2] if not done else noisy
        done[pool[index]] = {"config": pool[index].config.to_dict(), "curves": [[float(value) for value in curve]]}
    scores = ErrorModel(pool, grams, GAINS).scores(done)
    assert np.abs(np.log(scores / truth[:, -1])).mean() < 0.15
    assert truth[scores.argmin(), -1] <= 1.05 * truth[:, -1].min()
    untaught = ErrorModel(pool, grams, GAINS).scores({})
    assert np.std(np.log(scores / truth[:, -1])) < 0.7 * np.std(np.log(untaught / truth[:, -1]))


def test_curves_that_broke_off_or_are_empty_teach_nothing_wrong(family):
    grams, pool, truth = family
    config = pool[0].config.to_dict()
    for curve in ([], [0.0] * 5, [0.0, None], [None] * STEPS):
        model = ErrorModel(pool, grams)
        assert np.isfinite(model.scores({pool[0]: {"config": config, "curves": [curve]}})).all()
        assert (model.parameters == PRIOR).all()
