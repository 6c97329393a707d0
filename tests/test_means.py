# SPDX-License-Identifier: Apache-2.0
"""Skipped steps for which the network is asked at their mean: against loops written out; what that is worth."""

import math

import pytest
import torch
from test_correction import SAMPLERS, TRAP, Denoiser, Sampler, near, parts_of, persists, sampled
from tiny import TARGET, Watch
from torch import nn

from osaccel.generation import Generation
from osaccel.plan import UNDER_SKIP, Correction, Plan
from osaccel.sampling.levels import NoiseLevels

SHAPE = (2, 3, 2, 6, 5)  # videos, channels, frames, height, width
SKIP = (1, 3, 4, 6, 8, 9, 11)


class Network(nn.Module):
    """Says for every row what an exact denoiser of its branch does, by the row's own time; channels may follow."""

    def __init__(self, sampler, branches, variances=0):
        super().__init__()
        self.transformer_blocks, self.times = nn.ModuleList([nn.Identity()]), []
        self.sampler, self.branches, self.variances = [sampler], branches, variances

    def forward(self, hidden_states, timestep=None, return_dict=True):
        times = timestep.expand(len(hidden_states)).double()
        self.times.append(timestep)
        # At conditional-only steps the second branch runs alone.
        branches = self.branches[-(len(hidden_states) // self.sampler[0].shape[0]) :]
        parts = zip(branches, hidden_states.chunk(len(branches)), times.chunk(len(branches)))
        told = torch.cat([self._told(branch, part, float(time[0])) for branch, part, time in parts])
        output = torch.cat([told, torch.zeros_like(told[:, : self.variances])], 1)
        return (output,) if not return_dict else output

    def _told(self, branch, hidden, time):
        (sampler,) = self.sampler
        sampler.denoiser, kept = branch, sampler.denoiser
        try:
            return Sampler.predict(sampler, hidden, time)
        finally:
            sampler.denoiser = kept


class Asked(Sampler):
    """As `Sampler`, through a transformer that is called with both branches of guidance as diffusers' are."""

    def __init__(self, scheduler, denoiser, *args, way="keywords", variances=0, **options):
        super().__init__(scheduler, denoiser, *args, **options)
        branches = [Denoiser(denoiser.width, denoiser.mean, guidance) for guidance in (0.0, 1.0)]
        self.transformer, self.way = Network(self, branches, variances), way

    def predict(self, latents, t):
        both, times = torch.cat([latents] * 2), t.expand(2 * len(latents))
        output = {
            "keywords": lambda: self.transformer(hidden_states=both, timestep=times),
            "by position": lambda: self.transformer(both, times),
            "one time": lambda: self.transformer(both, timestep=t, return_dict=False)[0],
            "one time in thousandths": lambda: self.transformer(both, timestep=t / 1000),
        }[self.way]()
        unconditional, conditional = output[:, : latents.shape[1]].chunk(2)
        return unconditional + self.denoiser.guidance * (conditional - unconditional)


def damped(change, before):
    r = (change * before).flatten(1).sum(1) / (change.flatten(1).norm(dim=1) * before.flatten(1).norm(dim=1))
    return (2 + 2 * r).clamp(0, 1).reshape(-1, *[1] * (change.dim() - 1))


def written_out(sigmas, denoiser, first, noises, power, skip, correction, rounded=lambda level: level):
    """By hand, in y = x / s^q and lam = s^-q; `path` is the noise alone, which nothing here has to find out."""
    y, path, known, group, slope = first.double() * sigmas[0] ** -power, 0.0, [], [], None
    for k in range(len(sigmas) - 1):
        s, t = sigmas[k], sigmas[k + 1]
        lam, mass = s**-power, (t**-power if t > 0 else math.inf) - s**-power
        _, corrector, response = correction.at(k)
        if k in skip:
            told, level, then = known[-1][0], known[-1][1], known[-1][2]
            if slope is not None and power == 2:
                kept = (s / level) ** 2
                told = told + response * slope / (kept + (1 - kept) * slope) * s**2 * (path - then)
            group.append((mass, lam, y, told, path))
        else:
            at, level, then = y * s**power, s, path
            if group and t > 0 and corrector and power == 2:
                points = [*group, (mass, lam, y, None, path)]
                total = sum(m for m, *_ in points)
                mean = sum(m * at_ for m, at_, *_ in points) / total
                level, then = mean ** (-1 / power), sum(m * z for m, _, _, _, z in points) / total
                at = sum(m * y_ for m, _, y_, *_ in points) / total / mean
                variance = sum(m * n * min(a, b) for m, a, *_ in points for n, b, *_ in points) / total**2
                scale = math.sqrt(mean / variance) * rounded(level) / level
                at, level = known[-1][0] + (at - known[-1][0]) * scale, rounded(level)
            told = denoiser(at, level)
            change = told - known[-1][0] if known else None
            if group and corrector:
                before = known[-1][3]
                if t > 0 and power == 2:
                    allowed = 1.0 if before is None else damped(change, before)
                    lost = sum(m * (told - stood) for m, _, _, stood, _ in group)
                else:
                    allowed = 1.0 if before is None else persists(change, before)
                    start, foreseen = known[-1][1], 0.0
                    if slope is not None and power == 2:
                        kept = (s / start) ** 2
                        strength = correction.at(k - 1)[2]
                        foreseen = strength * slope / (kept + (1 - kept) * slope) * s**2 * (path - known[-1][2])
                    lost = sum(m * math.log(start * at_ ** (1 / power)) / math.log(start / s)
                               for m, at_, *_ in group) * (change - foreseen)  # fmt: skip
                y = y + corrector * allowed * lost
            if known and power == 2 and k + 1 in skip:
                noise, kept = level**2 * (then - known[-1][2]), (level / known[-1][1]) ** 2
                made = (near(change * noise) / near(noise**2)).clamp(0, 1)
                at_p = kept * made / (1 - (1 - kept) * made)
                slope = at_p / (at_p + (1 - at_p) * kept)
            known.append((told, level, then, change))
            group = []
        if t <= 0:
            return told
        added = math.sqrt(1 - (t / s) ** 2) / t * noises[k] if power == 2 else 0.0
        y, path = y + told * mass + added, path + added


def case(name, guidance, **options):
    make, power = SAMPLERS[name]
    denoiser = Denoiser(torch.linspace(0.05, 1.5, 30).reshape(6, 5), guidance=guidance)
    pipeline = Asked(make(), denoiser, shape=SHAPE, **options)
    return pipeline, power


@pytest.mark.parametrize(
    "correction", [UNDER_SKIP, Correction(0.0, 1.0), Correction(0.0, (0.5, 0.0, 1.0, 0.75) * 4, 0.5)], ids=str
)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_skipped_steps_equal_a_loop_written_out(name, guidance, correction):
    pipeline, power = case(name, guidance)
    sigmas, first, noises = parts_of(pipeline, 16)
    levels = NoiseLevels(pipeline.scheduler)

    def rounded(level):
        return levels.sigma(round(levels.timestep(level))) if "DDPM" in name else level

    for skip in (SKIP, (2, 3, 12, 13, 14)):
        expected = written_out(sigmas, pipeline.denoiser, first, noises, power, skip, correction, rounded)
        output = sampled(pipeline, 16, correction, skip=skip)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        effect = (expected - sampled(pipeline, 16, skip=skip)).abs().max()
        assert (output - expected).abs().max() < 0.02 * effect


@pytest.mark.parametrize("way, variances", [("by position", 0), ("one time", 0), ("keywords", 3)])
def test_however_the_network_is_called(way, variances):
    expected, output = (
        sampled(case("EulerAncestral", 4.0, **options)[0], 16, UNDER_SKIP, skip=SKIP)
        for options in ({}, {"way": way, "variances": variances})
    )
    assert torch.equal(output, expected)


def test_whole_timesteps_stay_whole():
    """DDPM counts time in whole numbers, and a network may look something up by them; a mean lies between."""
    pipeline, _ = case("DDPM", 4.0)
    sampled(pipeline, 16, UNDER_SKIP, skip=SKIP)
    times = pipeline.transformer.times
    assert {time.dtype for time in times} == {torch.int64}
    assert not {int(time[0]) for time in times} <= set(pipeline.scheduler.timesteps.tolist())
    levels = NoiseLevels(pipeline.scheduler)
    assert levels.sigma(levels.timestep(2.5)) == pytest.approx(2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_keep_their_dtype(dtype):
    pipeline, _ = case("EulerAncestral", 4.0, dtype=dtype)
    watch = Watch()
    both = sampled(pipeline, 16, UNDER_SKIP, watch, skip=SKIP)
    assert {call.sample.dtype for call in watch.calls} == {call.model_output.dtype for call in watch.calls} == {dtype}
    assert {part.dtype for part in pipeline.transformer.times} == {torch.float32}
    assert torch.isfinite(both).all() and both.dtype == dtype


def test_a_network_that_does_not_get_the_sample_is_asked_where_it_stands():
    """Then D is taken to have moved evenly between computed steps, as where no network is known of."""
    pipeline, _ = case("EulerAncestral", 4.0)
    expected = sampled(Sampler(pipeline.scheduler, pipeline.denoiser, shape=SHAPE), 16, UNDER_SKIP, skip=SKIP)
    forward = pipeline.transformer.forward

    def shifted(hidden_states, timestep=None):
        return forward(hidden_states - 1, timestep=timestep)

    def unnamed(*args, **kwargs):
        return forward(*args, **kwargs)

    def in_thousandths(hidden_states, timestep=None):
        return forward(hidden_states, timestep=timestep * 1000)

    predict, way = pipeline.predict, pipeline.way
    for change in ("shifted", "in thousandths", "unnamed"):
        pipeline.way, pipeline.predict = way, predict
        pipeline.transformer = Network(pipeline, pipeline.transformer.branches)
        forward = pipeline.transformer.forward
        if change == "shifted":
            pipeline.transformer.forward = shifted
            pipeline.predict = lambda latents, t: predict(latents + 1, t)
        elif change == "in thousandths":
            pipeline.transformer.forward = in_thousandths
            pipeline.way = "one time in thousandths"
        else:
            pipeline.transformer.forward = unnamed
            pipeline.way = "by position"
        output = sampled(pipeline, 16, UNDER_SKIP, skip=SKIP)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class TwoModes(Denoiser):
    """Every number of the data is near 1 or near -1: no prediction is linear in x."""

    def __call__(self, x, sigma):
        variance = 0.5**2
        return (x * variance + sigma**2 * torch.tanh(x / (variance + sigma**2))) / (variance + sigma**2)


def error(pipeline, steps, skip, correction):
    plain = sampled(pipeline, steps)
    return (sampled(pipeline, steps, correction, skip=skip) - plain).abs()


@pytest.mark.parametrize("name", ["EulerAncestral", "DDPM"])
@pytest.mark.parametrize("interval", [2, 4])
def test_the_noise_that_a_line_cannot_foresee_is_in_the_mean(name, interval):
    """Well below half the typical error of a line through the computed steps or less; no prediction is linear in x."""
    skip = tuple(step for step in range(1, 60) if step % interval)
    shape = (2, 4, 2, 8, 8)
    found = []
    for kind in (Sampler, Asked):
        pipeline = kind(SAMPLERS[name][0](), TwoModes(), torch.float32, shape)
        if kind is Asked:
            pipeline.transformer.branches = [TwoModes(), TwoModes()]
        found.append(error(pipeline, 100, skip, Correction(0.0, 1.0)).median())
    assert found[1] < 0.4 * found[0]


@pytest.mark.parametrize("guidance, width, steps", TRAP)
def test_where_predictions_swing_back_nothing_grows(guidance, width, steps):
    """Where the plain run itself is about to swing over, means stay near what comes of making nothing good."""
    skip = tuple(range(1, 2 * steps - 1, 2))
    found = []
    for correction in (Correction(), UNDER_SKIP):
        denoiser = Denoiser(width, guidance=guidance)
        pipeline = Asked(SAMPLERS["EulerAncestral"][0](), denoiser, torch.float32, (2, 8, 2, 8, 8))
        found.append(error(pipeline, 2 * steps, skip, correction).norm())
    assert found[1] < 2 * found[0]


def test_the_plain_run_is_left_alone_and_noise_is_the_runs_own():
    pipeline, _ = case("EulerAncestral", 4.0)
    expected = pipeline(16)
    drawn = pipeline.state
    with Generation(pipeline, Plan(steps=16, skip=SKIP, correction=UNDER_SKIP), TARGET):
        assert not torch.equal(pipeline(16), expected) and torch.equal(pipeline.state, drawn)
    assert torch.equal(pipeline(16), expected)


def test_a_video_is_as_it_is_alone():
    both, _ = case("EulerAncestral", 4.0)
    expected = sampled(both, 16, UNDER_SKIP, skip=SKIP)
    alone = Asked(both.scheduler, both.denoiser, shape=(1, *SHAPE[1:]))
    draw = torch.randn

    def of_the_first(shape, *args, **kwargs):
        return draw((2, *shape[1:]), *args, **kwargs)[:1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "randn", of_the_first)
        output = sampled(alone, 16, UNDER_SKIP, skip=SKIP)
    torch.testing.assert_close(output, expected[:1], rtol=1e-4, atol=1e-4)


def test_an_exact_forecast_of_the_branches_difference_moves_nothing():
    """The branches differ by the same at all levels: conditional-only steps beside skipped ones cost nothing."""
    found = []
    for half in ((), (4, 7, 10, 13)):
        pipeline, _ = case("EulerAncestral", 4.0)

        def apart(x, sigma, denoiser=pipeline.transformer.branches[1]):
            return denoiser(x, sigma) + 0.05 * sigma

        pipeline.transformer.branches[0] = apart
        plan = Plan(steps=16, skip=(2, 5, 8, 11), conditional_only=half, correction=UNDER_SKIP)
        with Generation(pipeline, plan, TARGET):
            found.append(pipeline(16))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_forwards_with_other_latents_than_the_sample_are_not_asked_at_means():
    """As a pipeline that also asks for degraded latents does."""
    pipeline, _ = case("EulerAncestral", 4.0)
    line = Sampler(pipeline.scheduler, pipeline.denoiser, shape=SHAPE)
    expected, predict = sampled(line, 16, UNDER_SKIP, skip=SKIP), pipeline.predict

    def with_another(latents, t):
        predict(0.5 * latents, t)
        return predict(latents, t)

    def behind_it(latents, t):
        told = predict(latents, t)
        predict(0.5 * latents, t)
        return told

    for pipeline.predict in (with_another, behind_it):
        torch.testing.assert_close(sampled(pipeline, 16, UNDER_SKIP, skip=SKIP), expected, rtol=1e-4, atol=1e-3)
