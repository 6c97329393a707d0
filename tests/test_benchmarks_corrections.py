# SPDX-License-Identifier: Apache-2.0
"""The correction's benchmarks: guided mixtures, arms that are what their names say, samplers of diffusers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from benchmarks import corrections, oracle  # noqa: E402
from benchmarks.competitors import samplers  # noqa: E402
from benchmarks.lib import models  # noqa: E402
from benchmarks.lib.bench import PLAIN, Bench  # noqa: E402
from osaccel.plan import Correction  # noqa: E402
from osaccel.settings import DEFAULT_CORRECTION  # noqa: E402

MODEL = models.model("miniature")


@pytest.fixture(scope="module")
def bench():
    return Bench(MODEL, MODEL.load(), 6, batch=2)


@pytest.mark.parametrize("name", samplers.MAKERS)
def test_other_samplers_take_the_users_place_for_one_generation(bench, name):
    original, case = bench.pipeline.scheduler, MODEL.heldout_cases(1)
    with_spacing = [bench.run(samplers.of(name, spacing, 4, 6), case)[0] for spacing in samplers.SPACINGS]
    assert bench.pipeline.scheduler is original
    for sample in with_spacing:
        assert torch.isfinite(sample.latents).all() and sample.computed == 4 * bench.num_blocks
    again = bench.run(samplers.of(name, "linspace", 4, 6), case)[0]
    assert torch.equal(again.latents, with_spacing[0].latents)


def test_skipping_computes_what_it_says_and_uncorrected_is_uncorrected(bench, tmp_path):
    kept = Bench(MODEL, bench.pipeline, 6, batch=2, folder=tmp_path)
    cases = MODEL.heldout_cases(2)
    sampled = corrections.Sampled(kept, cases, math.inf)
    rows = corrections.same_videos(sampled, [3])
    assert set(rows) == {"3 computed, uncorrected", "3 computed, corrector", "3 computed, corrector and response"}
    assert len({tuple(row["errors"]) for row in rows.values()}) == 3
    arm = corrections.skipping(kept, 3, "uncorrected")
    assert arm.work == 0.5 and bench.run(arm, cases)[0].computed == 3 * bench.num_blocks
    # What is kept is not sampled again, and time that is over begins nothing.
    over = corrections.Sampled(kept, cases, 0.0)
    assert len(over.of(PLAIN._replace(key="plain"))) == 2
    assert over.of(corrections.fewer(kept, 2, "plain", Correction())) == []


def test_a_guided_mixture_is_the_unguided_one_at_guidance_one_towards_all():
    mixture, guided = oracle.Mixture(seed=3), oracle.Guided(7.5, seed=3)
    x = torch.randn(2, *oracle.SHAPE)
    named = oracle.Guided(1.0, seed=3)
    named.NAMED = 8
    torch.testing.assert_close(named.denoise(x, 0.7), mixture.denoise(x, 0.7))
    only = mixture.from_coefficients(mixture.expected(mixture.to_coefficients(x), 0.7, mixture.means[:2]))
    plain = mixture.denoise(x, 0.7)
    torch.testing.assert_close(guided.denoise(x, 0.7), plain + 7.5 * (only - plain), rtol=1e-4, atol=1e-4)


def test_the_oracles_arms_differ_by_their_timesteps_and_correction_alone():
    pipeline = oracle.Pipeline(oracle.Mixture(seed=3))
    statistics = oracle.search_statistics(pipeline, 1, seed=1, steps=20)
    arms = oracle.corrected_arms(statistics, [8])
    assert arms["plain 8"].times == arms["default 8"].times and arms["default 8"].correction == DEFAULT_CORRECTION
    assert arms["searched 8"].times == arms["searched, default 8"].times
    finals = oracle.sample_all(pipeline, {name: arms[name] for name in ("plain 8", "default 8")}, 4, 2)
    assert finals["plain 8"].shape == (4, *oracle.SHAPE)
    assert not torch.equal(finals["plain 8"], finals["default 8"])
    assert ("default 25", "plain 100") in oracle.goals([50, 25, 15])


def test_the_best_spacing_is_that_of_the_least_distance():
    arms = {f"{name}, {spacing} 25": {"energy distance": [number]}
            for name in samplers.MAKERS for number, spacing in enumerate(samplers.SPACINGS)}  # fmt: skip
    arms["UniPC, karras 25"] = {"energy distance": [-1.0]}
    found = corrections.best_spacings({"arms": arms}, 25)
    assert found["UniPC"] == "karras" and found["SASolver"] == "linspace"


def test_what_lies_between_two_steps_is_fitted_as_least_squares_does():
    generator = torch.Generator().manual_seed(0)
    walks = [torch.randn(8, 500, generator=generator).cumsum(0) for _ in range(3)]
    found = corrections.between_shares(walks, [2, 4])
    for place, step in enumerate((2, 4)):
        moves = np.hstack([np.stack([w[step] - w[step - 2], w[step + 2] - w[step]]) for w in walks])
        wanted = np.hstack([w[step + 1] - w[step] for w in walks])
        (_, left, *_), whole = np.linalg.lstsq(moves.T, wanted, rcond=None), float(wanted @ wanted)
        line, best = found["line"][place], found["best weights"][place]
        assert best == pytest.approx(1 - left[0] / whole, abs=1e-4)
        assert line == pytest.approx(1 - np.square(wanted - moves[1] / 2).sum() / whole, abs=1e-4)
        # Of a random walk half is known, and nothing says more than the line.
        assert line == pytest.approx(0.5, abs=0.05) and best - line < 0.01


def test_a_line_per_arm():
    row = {"errors": [0.1], **{name: [0.1, 0.0, 0.2] for name in corrections.STATISTICS}}
    other = {**row, "over": {"typical": [-0.2, -0.3, -0.1], "mean": [-0.1, -0.2, 0.0]}}
    text = corrections.text({"3 computed, uncorrected": row, "3 computed, corrector": other})
    assert "-20% [-30%, -10%]" in text and len(text.splitlines()) == 3


def test_the_corrections_own_cost_is_small():
    from benchmarks import overhead

    found = SimpleNamespace(**overhead.correction_cost(10))
    assert found.added_s < 0.01 * found.network_s
