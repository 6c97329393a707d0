# SPDX-License-Identifier: Apache-2.0
"""What the cache search predicts from one generation, and what it makes of a few verified candidates."""

import numpy as np
import pytest
import tiny
import torch

from osaccel.network.forwards import HiddenStates
from osaccel.search.dit_cache.candidates import Belief, Candidate, Goal, Search, candidates, cost
from osaccel.search.dit_cache.error_model import EARLY, TURNS, Gains, predictions
from osaccel.search.dit_cache.probes import BUDGET, lasting, measure, places, region_steps, whole_steps
from osaccel.search.dit_cache.region_errors import RegionErrors
from osaccel.search.evaluation import Evaluation
from osaccel.search.recording.boundaries import Boundaries
from osaccel.search.recording.observe import watch_blocks
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.team import Team

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


def log_gain(step, start, stop):
    """Nothing of it is linear, so a table that holds it is read where it should be."""
    late = (step > 36) * (1 + start / BLOCKS)
    return -3 + np.sin(5 * step / STEPS) - late - np.cos(stop) * step / STEPS + 0.3 * np.sin(start)


def table_of(gain):
    """(block + 1, step) of gain(step, block), against all blocks."""
    return np.array(
        [[gain(n, block) - log_gain(n, 0, BLOCKS) for n in range(STEPS)] for block in range(BLOCKS + 1)]
    )  # fmt: skip


GAINS = Gains(
    np.array([log_gain(step, 0, BLOCKS) for step in range(STEPS)]),
    table_of(lambda step, start: log_gain(step, start, BLOCKS)),
    table_of(lambda step, stop: log_gain(step, 0, stop)),
)


def test_predictions_are_what_the_reused_steps_change_times_what_stays_of_it():
    grams, pool = made_up_grams(), candidates(BLOCKS, STEPS, 1.5)
    wanted, early = np.zeros(len(pool)), np.zeros(len(pool))
    for row, (start, stop, first, interval) in enumerate(pool):
        for step in range(first, STEPS):
            gap = (step - first) % interval
            if gap:
                change = grams[gap - 1, step, start:stop, start:stop].sum() ** 0.5
                wanted[row] += np.exp(log_gain(step, start, stop)) * change
                early[row] += np.exp(log_gain(step, start, stop)) * change * (step < EARLY * STEPS)
    found = predictions(pool, grams, GAINS)
    assert found.errors == pytest.approx(wanted, rel=1e-6)
    assert found.turned == pytest.approx(np.minimum(TURNS * early, 1), rel=1e-6) and found.turned.min() == 0
    assert not predictions(pool, grams).turned.any(), "nothing is known without probes"


def searched(pool, scores, errors, turned=None, calls=1):
    """A search whose candidates have these errors, to its end."""
    search = Search(pool, scores, BLOCKS, STEPS, Goal(1.5), turned=turned, calls=calls)
    while search.next_round():
        candidate = search.next_round()[0]
        error = float(errors[pool.index(candidate)])
        search.add(Evaluation(candidate.config.to_dict(), error, cost(candidate, BLOCKS, STEPS)))
    return search


def test_a_few_verified_candidates_correct_predictions_that_are_off_by_halves():
    """What a prediction misses varies smoothly over the family, here with where regions stop and reuse begins."""
    pool = candidates(BLOCKS, STEPS, 1.5)
    scores = np.exp(0.1 * np.random.default_rng(0).normal(size=len(pool)))
    missed = [0.5 * np.sin(6 * c.stop / BLOCKS + c.first / STEPS) for c in pool]
    errors = scores * np.exp(missed)
    search = searched(pool, scores, errors)
    assert errors[pool.index(search.choice())] <= 1.05 * errors.min() < errors[scores.argmin()]
    expected = np.array([search.expected()[candidate]["expected_error"] for candidate in pool])
    unit = np.log(errors / scores).mean()
    assert np.std(np.log(errors / expected)) < 0.7 * np.std(np.log(errors / scores) - unit)


def test_of_near_equal_candidates_the_one_that_was_predicted_better_wins():
    """Two per cent are within what one call differs from the next, though not on average over many; a half is not."""
    pool = candidates(BLOCKS, STEPS, 1.5)[:2]
    assert pool[0].first != pool[1].first or pool[0].start != pool[1].start
    for measured, calls, winner in ((0.98, 1, 0), (0.98, 100, 1), (0.5, 1, 1)):
        search = searched(pool, np.array([1.0, 1.2]), np.array([1.0, measured]), calls=calls)
        assert search.choice() == pool[winner]
        assert search.best() == pool[1]


def test_what_is_peculiar_to_a_call_is_not_taken_for_noise_between_neighbours():
    """Of two neighbours predicted alike, what is measured tells as much as of two that are far apart."""
    near, far = Candidate(0, 11, 2, 2), Candidate(0, 12, 32, 2)
    for other in (near, far):
        belief = Belief([Candidate(0, 11, 1, 2), other], np.ones(2), 12, 100)
        expected, _ = belief.estimate({belief.pool[0]: 0.95, other: 1.0})
        assert expected[1] - expected[0] > 0.3 * -np.log(0.95)


def test_a_candidate_that_turns_videos_into_others_loses_to_one_with_a_little_more_error():
    pool, scores = candidates(BLOCKS, STEPS, 1.5)[:2], np.array([0.05, 0.06])
    assert searched(pool, scores, scores).choice() == pool[0]
    search = searched(pool, scores, scores, turned=np.array([0.02, 0.0]))
    assert search.choice() == pool[1] and search.best() == pool[0]
    assert search.expected()[pool[0]]["expected_turned"] == 0.02


def test_a_candidate_without_any_error_wins():
    pool = candidates(BLOCKS, STEPS, 1.5)[:3]
    assert searched(pool, np.array([1.0, 1.1, 1.2]), np.array([0.1, 0.1, 0.0])).choice() == pool[2]


@pytest.mark.parametrize("num_blocks,num_steps", [(12, 100), (32, 100), (32, 20), (2, 4)])
def test_probing_regions_stays_within_its_budget(num_blocks, num_steps):
    pool = candidates(num_blocks, num_steps, 1.3)
    starts = [start for start in places([candidate.start for candidate in pool]) if start > 0]
    stops = [stop for stop in places([candidate.stop for candidate in pool]) if stop < num_blocks]
    steps = region_steps(num_steps, num_blocks, starts, stops)
    spent = len(steps) * (sum(starts) + sum(num_blocks - stop for stop in stops))
    assert len(steps) == 1 or spent <= BUDGET * num_blocks * num_steps
    assert {*starts} <= {candidate.start for candidate in pool}
    assert max(stops, default=num_blocks) <= num_blocks and {*steps} <= {*whole_steps(num_steps)}


def test_probes_count_their_block_calls_and_tell_where_a_change_matters():
    pipeline = tiny.UnseededPipeline(num_blocks=4)
    blocks = pipeline.transformer.transformer_blocks
    replay = Replay(Call(type(pipeline).__call__, pipeline, (pipeline,), {"num_inference_steps": 12}))
    errors, replay.boundaries = RegionErrors(4, 5), Boundaries()
    watch = (errors.observe, replay.boundaries.observe)
    replay.record(lambda generation: watch_blocks(blocks, generation.clock, HiddenStates(), *watch))
    before = sum(pipeline.block_calls())
    gains, spent = measure(replay, errors.tensor(12).numpy(), [0, 1, 2], [2, 3, 4], Team())
    assert spent == sum(pipeline.block_calls()) - before > 0
    assert all(np.isfinite(table).all() for table in gains)
    assert (gains.starts[0] == 0).all() and (gains.stops[4] == 0).all()
    assert np.ptp(gains.steps) > 0.1 and np.ptp(gains.starts) > 0.01 and np.ptp(gains.stops) > 0.01


def test_what_stays_of_a_change_are_the_means_of_frames_and_of_quarters_over_the_video():
    change = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    stays = lasting(change)
    assert stays.mean((-2, -1)) == pytest.approx(change.mean((-2, -1)), abs=1e-6)
    for rows in (slice(3), slice(3, 5)):
        for columns in (slice(3), slice(3, 6)):
            wanted = change[..., rows, columns].mean((2, 3, 4))
            assert stays[..., rows, columns].mean((2, 3, 4)) == pytest.approx(wanted, abs=1e-6)
            assert stays[..., rows, columns].std((-2, -1)).max() < 1e-6
    assert ((change - stays) * stays).sum().abs() < 1e-3, "orthogonal"
    image = change[:, :, 0]
    assert lasting(image)[1, 2, :3, :3] == pytest.approx(image[1, 2, :3, :3].mean().expand(3, 3), abs=1e-6)
