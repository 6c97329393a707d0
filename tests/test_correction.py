# SPDX-License-Identifier: Apache-2.0
"""The second-order correction: against loops written out with numerical integrals; what it does to distributions."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from tiny import TARGET, Pipeline, Watch

from osaccel import settings
from osaccel.generation import Generation
from osaccel.plan import Correction, Plan
from osaccel.sampling.corrected import mean_share, mean_sigma, persistence, reach
from osaccel.sampling.response import gain, slope_of

BOTH = Correction(1.0, 1.0)


class Denoiser:
    """Guided prediction for Gaussian data N(mean, width^2) told apart from N(0, 1); guidance 1 is the data alone."""

    def __init__(self, width=0.5, mean=1.0, guidance=1.0):
        self.width, self.mean, self.guidance = torch.as_tensor(width, dtype=torch.float64), mean, guidance

    def __call__(self, x, sigma):
        conditional = self.mean + (x - self.mean) * self.width**2 / (self.width**2 + sigma**2)
        unconditional = x / (1 + sigma**2)
        return unconditional + self.guidance * (conditional - unconditional)


class Sampler:
    """The upstream's loop around a real scheduler and an exact denoiser; float64 unless told."""

    def __init__(self, scheduler, denoiser, dtype=torch.float64, shape=(2, 3, 8)):
        self.scheduler, self.denoiser, self.dtype, self.shape = scheduler, denoiser, dtype, shape
        self.transformer = Pipeline(1).transformer

    def sigma(self, t):
        abar = self.scheduler.alphas_cumprod.double()
        table = (((1 - abar) / abar) ** 0.5).numpy()
        return float(np.interp(float(t), np.arange(1000), table))

    def predict(self, latents, t):
        sigma = self.sigma(t)
        signal = 0.0 if math.isinf(sigma) else 1 / math.sqrt(1 + sigma**2)
        # scale_model_input has brought every sample to unit variance.
        if signal == 0.0:
            x, denoised = None, torch.full_like(latents, float(self.denoiser.mean) * self.denoiser.guidance)
        else:
            x = latents.double() / signal
            denoised = self.denoiser(x, sigma)
        if self.scheduler.config.prediction_type == "v_prediction":
            noise_share = math.sqrt(1 - signal**2)
            return ((latents.double() * signal - denoised) / noise_share).to(latents.dtype)
        return ((x - denoised) / sigma).to(latents.dtype)

    @torch.no_grad()
    def __call__(self, num_inference_steps, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(self.shape, generator=generator, dtype=self.dtype) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            output = self.predict(self.scheduler.scale_model_input(latents, t), t)
            known = {} if isinstance(self.scheduler, DDIMScheduler) else {"generator": generator}
            latents = self.scheduler.step(output, t, latents, **known, return_dict=False)[0]
        self.state = generator.get_state()
        return latents


def sampled(pipeline, steps, correction=None, *watchers, skip=(), seed=1):
    plan = Plan(steps=steps, skip=skip, correction=correction or Correction())
    with Generation(pipeline, plan, TARGET, watchers):
        return pipeline(steps, seed=seed)


# Against loops written out -------------------------------------------------------------------------------------------


def mean_by_weight(function, start, end, power):
    """The mean of a function of s over [end, start] by the weight of d(s^-power), by the midpoint rule."""
    edges = np.linspace(start**-power, end**-power, 4001)
    return float(np.mean(function(((edges[1:] + edges[:-1]) / 2) ** (-1 / power))))


def persists(last, first):
    r = (last * first).flatten(1).sum(1) / (last.flatten(1).norm(dim=1) * first.flatten(1).norm(dim=1))
    return (2 + 4 * r).clamp(0, 1).reshape(-1, *[1] * (last.dim() - 1))


def followed_at(k, sigmas, power):
    p, s, t = sigmas[k - 1 : k + 2]
    if t == 0:
        return 0.0
    moved, most = (s - mean_by_weight(lambda x: x, s, end, power) for end in (t, s * s / p))
    return min(moved, most) / (p - s)


def written_out(sigmas, denoiser, first, noises, power, correction):
    """Native correction by hand, in x = x0 + s z."""
    x, history, followed = first.double(), [], [0.0]
    for k in range(len(sigmas) - 1):
        s, t = sigmas[k], sigmas[k + 1]
        predictor, corrector, _ = correction.at(k)
        denoised = denoiser(x, s)
        history.append(denoised)
        damped = persists(history[-1] - history[-2], history[-2] - history[-3]) if k > 1 else 1.0
        assumed, far = denoised, 0.0
        if k:
            before = sigmas[k - 1]
            share = mean_by_weight(lambda y, p=before, e=s: np.log(p / y) / np.log(p / e), before, s, power)
            wanted = history[-2] + share * (denoised - history[-2])
            used = history[-2] + (followed[-1] * (history[-2] - history[-3]) if k > 1 else 0.0)
            x = x + corrector * damped * (1 - (s / before) ** power) * (wanted - used)
            far = predictor * damped * followed_at(k, sigmas, power)
            assumed = denoised + far * (denoised - history[-2])
        followed.append(far)
        kept = (t / s) ** power
        x = kept * x + (1 - kept) * assumed
        if power == 2:
            x = x + t * math.sqrt(1 - kept) * noises[k]
    return x


def parts_of(pipeline, steps, seed=1):
    """The sigmas, initial and later noises of the run that `pipeline` makes."""
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(pipeline.shape, generator=generator, dtype=torch.float64)
    noises = [torch.randn(pipeline.shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas.double().tolist(), first * scheduler.init_noise_sigma, noises
    sigmas = [pipeline.sigma(t) for t in scheduler.timesteps] + [0.0]
    return sigmas, first * (1 + sigmas[0] ** 2) ** 0.5, noises


SAMPLERS = {
    "EulerAncestral": (EulerAncestralDiscreteScheduler, 2),
    "EulerAncestral, v": (lambda: EulerAncestralDiscreteScheduler(prediction_type="v_prediction"), 2),
    "DDPM": (lambda: DDPMScheduler(clip_sample=False), 2),
    "DDPM, v": (lambda: DDPMScheduler(clip_sample=False, prediction_type="v_prediction"), 2),
    "Euler": (EulerDiscreteScheduler, 1),
    "DDIM": (lambda: DDIMScheduler(clip_sample=False), 1),
    "DDIM, v": (lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), 1),
}
PER_STEP = Correction((1.0, 0.0, 0.5) * 4, (0.0, 1.0, 0.5, 0.25) * 3)


@pytest.mark.parametrize(
    "correction, guidance",
    [(Correction(0, 1), 1.0), (Correction(1, 0), 1.0), (BOTH, 1.0), (BOTH, 7.5), (PER_STEP, 7.5)],
    ids=str,
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_native_correction_equals_a_loop_written_out(name, correction, guidance):
    make, power = SAMPLERS[name]
    pipeline = Sampler(make(), Denoiser(torch.linspace(0.2, 1.5, 8), guidance=guidance))
    sigmas, first, noises = parts_of(pipeline, 12)
    expected = written_out(sigmas, pipeline.denoiser, first, noises, power, correction)
    output = sampled(pipeline, 12, correction)
    torch.testing.assert_close(output, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))
    assert (output - sampled(pipeline, 12)).abs().max() > 1e-2


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_closed_forms_are_the_integrals(power):
    for p, s, t in ((3.0, 2.0, 1.5), (2.0, 1.9, 0.4), (1.0, 0.99, 0.98)):
        share = mean_by_weight(lambda y, p=p, s=s: np.log(p / y) / np.log(p / s), p, s, power)
        assert mean_share(math.log(p / s), power) == pytest.approx(share, rel=1e-4)
        assert mean_sigma(p, s, power) == pytest.approx(mean_by_weight(lambda y: y, p, s, power), rel=1e-4)
        assert reach(p, s, t, power) <= reach(p, s, s * s / p, power) * (1 + 1e-12)
    assert reach(3.0, 2.0, 0.0, power) == 0.0 and reach(math.inf, 2.0, 1.0, power) == 0.0


def test_the_last_step_is_first_order_and_strengths_are_those_of_the_step():
    pipeline, plain = Sampler(EulerAncestralDiscreteScheduler(), Denoiser()), Watch()
    sampled(pipeline, 12, None, plain)
    for step, correction in ((11, Correction((0.0,) * 11 + (1.0,), 0.0)), (7, Correction(0.0, (0.0,) * 7 + (1.0,) * 5)),
                             (5, Correction((0.0,) * 5 + (1.0,) * 7, 0.0))):  # fmt: skip
        seen = Watch()
        sampled(pipeline, 12, correction, seen)
        same = [torch.equal(a.model_output, b.model_output) and torch.equal(a.sample, b.sample)
                for a, b in zip(plain.calls, seen.calls)]  # fmt: skip
        assert all(same[:step]) and same[step] == (step == 11)


@pytest.mark.parametrize("name", ["EulerAncestral", "DDPM", "Euler", "DDIM"])
def test_strengths_of_zero_and_what_a_correction_leaves_alone(name):
    pipeline = Sampler(SAMPLERS[name][0](), Denoiser())
    torch.manual_seed(3)
    expected, state = pipeline(12), torch.get_rng_state()
    for correction in (Correction(), Correction((0.0,) * 12, 0.0), Correction((0.0,) * 12, (0.0,) * 12)):
        torch.manual_seed(3)
        assert torch.equal(sampled(pipeline, 12, correction), expected)
    torch.manual_seed(3)
    watch, drawn = Watch(), pipeline.state
    corrected = sampled(pipeline, 12, BOTH, watch)
    assert not torch.equal(corrected, expected) and len(watch.calls) == 12
    assert torch.equal(pipeline.state, drawn) and torch.equal(torch.get_rng_state(), state)
    assert not {"step", "set_timesteps"} & set(vars(pipeline.scheduler))
    assert torch.equal(pipeline(12), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_samples_and_outputs_keep_their_dtype(dtype):
    watch = Watch()
    pipeline = Sampler(EulerAncestralDiscreteScheduler(), Denoiser(), dtype)
    output = sampled(pipeline, 12, BOTH, watch)
    assert torch.isfinite(output).all() and output.dtype == dtype
    assert {call.model_output.dtype for call in watch.calls} == {call.sample.dtype for call in watch.calls} == {dtype}


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: DDIMScheduler(clip_sample=False, **options),
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
    ],
    ids=["DDIM", "Euler", "EulerAncestral"],
)
@pytest.mark.parametrize("skip", [(), (1, 3, 4)], ids=["native", "skip"])
def test_a_first_step_without_signal_is_left_apart(make, skip):
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    pipeline, plain, seen = Sampler(make(**options), Denoiser()), Watch(), Watch()
    expected = sampled(pipeline, 12, None, plain, skip=skip)
    output = sampled(pipeline, 12, BOTH, seen, skip=skip)
    assert torch.isfinite(expected).all() and torch.isfinite(output).all()
    second = next(step for step in range(1, 12) if step not in skip)
    for step in range(second + 1):
        assert torch.equal(plain.calls[step].sample, seen.calls[step].sample)
    assert not torch.equal(output, expected)


def test_a_video_is_corrected_as_it_is_alone():
    """What damps a correction is measured video by video."""
    scheduler = EulerAncestralDiscreteScheduler()
    width = torch.tensor([0.05, 0.9])[:, None, None]
    together = Sampler(scheduler, Denoiser(width, guidance=7.5), shape=(2, 16, 16))
    sigmas, first, noises = parts_of(together, 15)
    both = written_out(sigmas, together.denoiser, first, noises, 2, BOTH)
    for row in range(2):
        alone = Denoiser(width[row : row + 1], guidance=7.5)
        expected = written_out(sigmas, alone, first[row : row + 1], [n[row : row + 1] for n in noises], 2, BOTH)
        torch.testing.assert_close(both[row : row + 1], expected)
    torch.testing.assert_close(sampled(together, 15, BOTH), both, rtol=1e-3, atol=1e-3 * float(both.abs().max()))


def test_persistence_follows_the_correlation_of_successive_changes():
    change, other = torch.randn(2, 1, 5000, generator=torch.Generator().manual_seed(0)).unbind()
    other = other - change * (change * other).sum() / change.square().sum()
    other = other / other.norm() * change.norm()
    for r, expected in ((0.5, 1.0), (0.0, 1.0), (-0.25, 1.0), (-0.375, 0.5), (-0.5, 0.0), (-1.0, 0.0)):
        mixed = r * change + math.sqrt(1 - r**2) * other
        assert float(persistence(mixed, change)) == pytest.approx(expected, abs=1e-4)
    assert persistence(change, None) == 1.0 and float(persistence(change, 0 * change)) == 1.0


# The response to noise, at skipped steps ------------------------------------------------------------------------------

# Guidance, width, steps; fewer steps than these and the plain run itself swings over and grows without bound.
TRAP = [(4.0, 0.3, 25), (4.0, 0.7, 15), (7.5, 0.3, 25), (7.5, 0.3, 50), (7.5, 0.7, 25), (7.5, 0.14, 100)]
PLACES = (2, 3, 2, 6, 5)  # videos, channels, frames, height, width


def near(values):
    """Sums over channels and the neighbours in a frame, by hand."""
    summed, found = values.sum(1, keepdim=True), torch.zeros_like(values[:, :1])
    height, width = summed.shape[-2:]
    for i in range(height):
        for j in range(width):
            box = summed[..., max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            found[..., i, j] = box.sum((-1, -2))
    return found


def responding(sigmas, denoiser, first, noises, skip, strength):
    """Skipped steps with corrector and response by hand, in x = x0 + s z; ancestral."""
    x, computed, slope, drift = first.double(), [], None, 0.0
    for k in range(len(sigmas) - 1):
        s, t = sigmas[k], sigmas[k + 1]
        if computed:
            p, left, D_p, _ = computed[-1]
            kept = (s / sigmas[p]) ** 2
            noise = x - kept * left - s**2 * drift
            answer = 0.0 if slope is None else strength * slope / (kept + (1 - kept) * slope) * noise
        if k in skip:
            assumed = D_p + answer
        else:
            assumed = denoised = denoiser(x, s)
            if computed:
                change = denoised - D_p
                before = computed[-1][3]
                damped = persists(change, before) if before is not None else 1.0
                between = range(p, k)
                moved = sum(s**2 * (sigmas[i + 1] ** -2 - sigmas[i] ** -2) * math.log(sigmas[p] / sigmas[i])
                            for i in between) / math.log(sigmas[p] / s)  # fmt: skip
                x = x + moved * damped * (change - answer)
                made = (near(change * noise) / near(noise**2)).clamp(0, 1)
                at_p = kept * made / (1 - (1 - kept) * made)
                variance = at_p * sigmas[p] ** 2 / (1 - at_p)
                slope = torch.where(at_p < 1, variance / (variance + s**2), torch.ones_like(at_p))
            computed.append((k, x, denoised, change if computed else None))
            drift = 0.0
        if t > 0:
            drift = drift + assumed * (t**-2 - s**-2)
        kept = (t / s) ** 2
        x = kept * x + (1 - kept) * assumed + t * math.sqrt(1 - kept) * noises[k]
    return x


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", ["EulerAncestral", "EulerAncestral, v", "DDPM"])
def test_the_response_equals_a_loop_written_out(name, strength):
    width = torch.linspace(0.05, 1.5, 30).reshape(6, 5)
    pipeline = Sampler(SAMPLERS[name][0](), Denoiser(width), shape=PLACES)
    sigmas, first, noises = parts_of(pipeline, 14)
    skip = (1, 3, 4, 6, 8, 9, 11)
    expected = responding(sigmas, pipeline.denoiser, first, noises, skip, strength)
    output = sampled(pipeline, 14, Correction(0.0, 1.0, strength), skip=skip)
    torch.testing.assert_close(output, expected, rtol=5e-4, atol=5e-4 * float(expected.abs().max()))
    assert (output - sampled(pipeline, 14, Correction(0.0, 1.0), skip=skip)).abs().max() > 1e-2


def against_plain(pipeline, steps, skip, *corrections):
    """Relative errors against the plain run of the same noise."""
    plain = sampled(pipeline, steps)
    errors = (sampled(pipeline, steps, correction, skip=skip) - plain for correction in corrections)
    return [float(error.norm() / plain.norm()) for error in errors]


def test_where_predictions_answer_to_noise_skipped_steps_do():
    """Narrow and wide places side by side, each told by its own answer. No step is like the next."""
    width = torch.tensor([0.03] * 12 + [1.0] * 12)
    pipeline = Sampler(EulerAncestralDiscreteScheduler(), Denoiser(width, 0.0), torch.float32, (2, 4, 2, 12, 24))
    skip = tuple(range(1, 49, 2))
    corrector, response = against_plain(pipeline, 50, skip, Correction(0.0, 1.0), settings.UNDER_SKIP)
    assert response < 0.5 * corrector


@pytest.mark.parametrize("guidance, width, steps", TRAP)
def test_where_predictions_swing_back_the_response_does_nothing_worse(guidance, width, steps):
    pipeline = Sampler(
        EulerAncestralDiscreteScheduler(), Denoiser(width, guidance=guidance), torch.float32, (2, 8, 8, 8)
    )
    skip = tuple(range(1, 2 * steps - 1, 2))
    corrector, response = against_plain(pipeline, 2 * steps, skip, Correction(0.0, 1.0), settings.UNDER_SKIP)
    assert response < 1.05 * corrector


def test_a_responses_strength_is_that_of_the_skipped_step():
    width, skip = torch.linspace(0.05, 1.5, 30).reshape(6, 5), (2, 4, 6, 7, 9)
    pipeline = Sampler(EulerAncestralDiscreteScheduler(), Denoiser(width), shape=PLACES)
    some, at_skipped, elsewhere, none = (
        sampled(pipeline, 12, Correction(0.0, 1.0, strength), skip=skip)
        for strength in (1.0, *(tuple(float((k in skip) == is_so) for k in range(12)) for is_so in (True, False)), 0.0)
    )
    assert torch.equal(some, at_skipped) and torch.equal(elsewhere, none) and not torch.equal(some, none)


@pytest.mark.parametrize("kept", [0.9, 1e-3, 1e-9])
def test_a_slope_is_that_whose_gain_was_measured(kept):
    noise = torch.randn(1, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    # Between them a gain is no longer told from 1 where nothing is kept.
    for slope in (0.0, 0.25, 1.0) if kept > 1e-6 else (0.0, 1.0):
        change = gain(torch.tensor(slope), kept) * noise
        torch.testing.assert_close(
            slope_of(change, noise, kept), torch.full((1, 1, 1, 4, 4), slope), rtol=2e-2, atol=1e-6
        )
    assert not slope_of(-noise, noise, kept).any()


@pytest.mark.parametrize("name", ["Euler", "DDIM"])
def test_without_noise_there_is_no_response(name):
    pipeline = Sampler(SAMPLERS[name][0](), Denoiser(), shape=PLACES)
    without, response = (sampled(pipeline, 12, Correction(0.0, 1.0, strength), skip=(3, 5)) for strength in (0.0, 1.0))
    assert torch.equal(without, response)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_video_is_answered_as_it_is_alone_and_keeps_its_dtype(dtype):
    width = torch.linspace(0.05, 1.5, 30).reshape(6, 5)
    skip, watch = (2, 4, 6, 7, 9), Watch()
    both = sampled(Sampler(EulerAncestralDiscreteScheduler(), Denoiser(width), dtype, PLACES), 12,
                   settings.UNDER_SKIP, watch, skip=skip)  # fmt: skip
    assert {call.sample.dtype for call in watch.calls} == {dtype}
    first = Sampler(EulerAncestralDiscreteScheduler(), Denoiser(width), dtype, (1, *PLACES[1:]))
    draw = torch.randn

    def of_the_first(shape, *args, **kwargs):
        return draw((2, *shape[1:]), *args, **kwargs)[:1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "randn", of_the_first)
        alone = sampled(first, 12, settings.UNDER_SKIP, skip=skip)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4 if dtype == torch.float32 else 0.1, atol=1e-2)


# What it does to distributions ---------------------------------------------------------------------------------------


def moments(pipeline, steps, correction=None, limit=None):
    """Offset of the mean in deviations, and log of the deviation, against the limit of many plain steps."""
    found, limit = sampled(pipeline, steps, correction), limit_of(pipeline) if limit is None else limit
    return float((found.mean() - limit.mean()) / limit.std()), float((found.std() / limit.std()).log())


def limit_of(pipeline):
    return sampled(pipeline, 800)


@pytest.mark.parametrize("width", [0.4, 1.0, 2.0])
def test_half_the_steps_or_fewer_lose_less_variance(width):
    """Gaussian data, whose prediction is exact. Data as narrow as the last noise levels are another matter."""
    pipeline = Sampler(EulerAncestralDiscreteScheduler(), Denoiser(width, 0.0), torch.float32, (32, 8, 8, 8))
    limit = torch.randn(pipeline.shape, generator=torch.Generator().manual_seed(5)) * width
    missing = {}
    for steps in (15, 25, 50, 100):
        for name, correction in (("plain", None), ("corrected", settings.DEFAULT_CORRECTION)):
            missing[steps, name] = abs(moments(pipeline, steps, correction, limit)[1])
    noise = 0.02
    assert missing[50, "corrected"] < missing[100, "plain"] + noise
    assert missing[25, "corrected"] < missing[100, "plain"] + noise
    assert missing[15, "corrected"] < missing[50, "plain"] + noise


@pytest.mark.parametrize("guidance, width, steps", TRAP)
def test_guidance_towards_a_narrow_mode_is_made_no_worse(guidance, width, steps):
    """There a correction swings over before the plain steps do."""
    denoiser = Denoiser(width, guidance=guidance)
    pipeline = Sampler(EulerAncestralDiscreteScheduler(), denoiser, torch.float32, (8, 8, 8, 8))
    limit = limit_of(pipeline)
    plain, default = (moments(pipeline, steps, used, limit) for used in (None, settings.DEFAULT_CORRECTION))
    for ours, theirs in zip(default, plain):
        assert abs(ours) < abs(theirs) * 1.05 + 0.05


def test_without_damping_the_trap_closes(monkeypatch):
    monkeypatch.setattr("osaccel.sampling.corrected.allowed", lambda agreement, bound: 1.0)
    pipeline = Sampler(EulerAncestralDiscreteScheduler(), Denoiser(0.3, guidance=7.5), torch.float32, (8, 8, 8, 8))
    assert moments(pipeline, 50, BOTH)[1] > abs(moments(pipeline, 50)[1]) + 1


def test_narrow_and_wide_directions_together():
    """The narrow ones would swing over and must damp the whole."""
    width = torch.tensor([0.14, 0.7]).repeat(4)
    pipeline = Sampler(EulerAncestralDiscreteScheduler(), Denoiser(width, guidance=4.0), torch.float32, (16, 8, 8, 8))
    end = limit_of(pipeline)
    for steps in (25, 50, 100):
        results = [end, sampled(pipeline, steps), sampled(pipeline, steps, BOTH)]
        for part in (slice(0, None, 2), slice(1, None, 2)):
            limit, plain, ours = (x[..., part] for x in results)
            offsets = [abs(float((x.mean() - limit.mean()) / limit.std())) for x in (plain, ours)]
            losses = [abs(float((x.std() / limit.std()).log())) for x in (plain, ours)]
            assert offsets[1] < offsets[0] * 1.05 + 0.05 and losses[1] < losses[0] * 1.05 + 0.05


# What the user asks for ----------------------------------------------------------------------------------------------


def test_one_word_is_enough_and_the_line_says_what_is_done():
    loaded = settings.load({"OSACCEL_CORRECTION": "1"})
    assert loaded.accelerates and loaded.generation_plan().correction == settings.DEFAULT_CORRECTION
    said, pipeline = [], Sampler(EulerAncestralDiscreteScheduler(), Denoiser())
    with Generation(pipeline, loaded.generation_plan(), TARGET, announce=said.append):
        pipeline(6)
    assert said == [
        "generation of 6 steps (default timesteps) begins: corrected (predictor 1, corrector 1)"
    ]  # the network is left alone, so there is no line about its work
    assert str(Correction((0.0, 0.5), 1.0)) == "predictor 0 to 0.5, corrector 1"
    assert str(Correction(0.0, 1.0, 0.5)) == "predictor 0, corrector 1, response 0.5"
    assert not settings.load({"OSACCEL_CORRECTION": "0"}).accelerates
    assert not settings.load({"OSACCEL_CORRECTION": "0,0"}).accelerates


def test_beside_a_plan_that_skips_the_default_is_corrector_and_response(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text('{"format": "osaccel.plan/1", "steps": 8, "skip": [3, 5]}')
    found = {given: settings.load({"OSACCEL_PLAN": str(plan), "OSACCEL_CORRECTION": given}).generation_plan().correction
             for given in ("1", "1,1", "0,1,0.5", "0")}  # fmt: skip
    assert found == {
        "1": Correction(0.0, 1.0, 1.0),
        "1,1": BOTH,
        "0,1,0.5": Correction(0.0, 1.0, 0.5),
        "0": Correction(),
    }
    same = '"correction": {"corrector": 1, "response": 1}'
    plan.write_text('{"format": "osaccel.plan/1", "steps": 8, "skip": [3], ' + same + "}")
    loaded = settings.load({"OSACCEL_PLAN": str(plan), "OSACCEL_CORRECTION": "1"})
    assert loaded.generation_plan().correction == settings.UNDER_SKIP
    plan.write_text('{"format": "osaccel.plan/1", "steps": 8, "regions": []}')
    loaded = settings.load({"OSACCEL_PLAN": str(plan), "OSACCEL_CORRECTION": "1"})
    assert loaded.generation_plan().correction == settings.DEFAULT_CORRECTION


def test_a_correction_alone_leaves_the_network_alone():
    pipeline = Sampler(EulerAncestralDiscreteScheduler(), Denoiser())
    with Generation(pipeline, Plan(correction=BOTH), TARGET):
        assert "forward" not in vars(pipeline.transformer)
