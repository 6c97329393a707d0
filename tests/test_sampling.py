# SPDX-License-Identifier: Apache-2.0
"""Timestep lists in the real diffusers schedulers, against an exactly solvable Gaussian target."""

import contextlib
import inspect
import math
import weakref

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from osaccel.sampling import UnsupportedScheduler, adapter_for  # noqa: E402
from osaccel.sampling.lists import _adams_bashforth  # noqa: E402

# diffusers hands tensors to NumPy functions, thousands of times per test under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

# As the upstream scripts construct them.
ARGUMENTS = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "PNDMScheduler": {},
}
ALL = sorted(ARGUMENTS)
STOCHASTIC = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
DETERMINISTIC = [name for name in ALL if name not in STOCHASTIC]
# These end at s(0) instead of 0.
ENDS_AT_S0 = ("DEISMultistepScheduler", "PNDMScheduler")
# Model evaluations of a list of n entries.
CALLS = {"HeunDiscreteScheduler": lambda n: 2 * n - 1, "KDPM2AncestralDiscreteScheduler": lambda n: 2 * n - 1}
CALLS["PNDMScheduler"] = lambda n: n + 9

# Data ~ N(MEAN, SPREAD^2) per channel, independent coordinates.
MEAN = torch.tensor([0.7, -0.4]).view(1, 2, 1)
SPREAD = torch.tensor([0.3, 1.0]).view(1, 2, 1)

# What no number of steps removes: rounding of latents near sigma 157, and the estimate from a finite sample.
FLOAT32_FLOOR = 1e-4
STOCHASTIC_SIZE = 200_000
SAMPLE_FLOOR = 3 / math.sqrt(STOCHASTIC_SIZE)


def make(name, **arguments):
    return getattr(diffusers, name)(**{**ARGUMENTS[name], **arguments})


def sigma_of(scheduler, timestep):
    """s(t) in float64, linear between the training timesteps."""
    abar = scheduler.alphas_cumprod.double().numpy()
    return float(np.interp(float(timestep), np.arange(len(abar)), np.sqrt((1 - abar) / abar)))


def exact_epsilon(scheduler, x, timestep):
    """The noise prediction that a perfect model makes for variance-preserving x at a fractional timestep."""
    s = sigma_of(scheduler, timestep)
    return (s / (SPREAD**2 + s**2) * (x.double() * math.sqrt(1 + s * s) - MEAN)).to(x.dtype)


def denoise(scheduler, latents, generator=None):
    """The upstream pipeline's loop, after its set_timesteps."""
    parameters = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in parameters else {}
    if "eta" in parameters:
        extra["eta"] = 0.0
    for t in scheduler.timesteps:
        noise = exact_epsilon(scheduler, scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(noise, t, latents, **extra, return_dict=False)[0]
    return latents


@contextlib.contextmanager
def accelerated(scheduler, timesteps):
    """What a generation does around one pipeline call."""
    adapter, original = adapter_for(scheduler), scheduler.set_timesteps
    scheduler.set_timesteps = lambda n, device=None: adapter.set_timesteps(timesteps, device, original)
    if adapter.step is not None:
        scheduler.step = adapter.step
    try:
        yield adapter
    finally:
        vars(scheduler).pop("step", None)
        del scheduler.set_timesteps
        adapter.restore()


def run_list(scheduler, timesteps, size=2000, seed=0):
    """Initial latents and result, both in variance-exploding coordinates."""
    generator = torch.Generator().manual_seed(seed)
    with accelerated(scheduler, timesteps):
        scheduler.set_timesteps(7)
        s = sigma_of(scheduler, scheduler.timesteps[0])
        start = MEAN + (SPREAD**2 + s * s).sqrt() * torch.randn(1, 2, size, generator=generator)
        sigma_scaled = float(scheduler.init_noise_sigma) > 1
        latents = start if sigma_scaled else start / math.sqrt(1 + s * s)
        end = denoise(scheduler, latents, generator)
    return start, end


def searched_list(n):
    """Descending, fractional, unevenly dense, with irregular gaps, as a search leaves them."""
    t = 998.3 * (1 - np.linspace(0, 1, n)) ** 1.3 + 0.4
    gap = np.minimum(t[:-2] - t[1:-1], t[1:-1] - t[2:])
    t[1:-1] += np.random.default_rng(n).uniform(-0.3, 0.3, n - 2) * gap
    return t.tolist()


def exact_end(name, scheduler, start, timesteps):
    """The probability flow along the list, then the sampler's own last jump: D(x) to zero, or the flow to s(0).

    The flow shrinks a Gaussian about its mean with its standard deviation, D with its variance.
    """
    first, last = sigma_of(scheduler, timesteps[0]), sigma_of(scheduler, timesteps[-1])
    final = sigma_of(scheduler, 0) if name in ENDS_AT_S0 else last
    end = MEAN + (start - MEAN) * ((SPREAD**2 + final**2) / (SPREAD**2 + first**2)).sqrt()
    if name in ENDS_AT_S0:
        return end / math.sqrt(1 + final**2)
    return MEAN + (end - MEAN) * SPREAD**2 / (SPREAD**2 + last**2)


def deterministic_error(name, timesteps):
    """Root mean square distance to the exact result, in units of the data's spread."""
    scheduler = make(name)
    start, end = run_list(scheduler, timesteps)
    return float((((end - exact_end(name, scheduler, start, timesteps)) / SPREAD) ** 2).mean().sqrt())


def stochastic_error(name, timesteps):
    """Wasserstein-2 distance to the exact distribution, in units of the data's spread."""
    scheduler = make(name)
    _, end = run_list(scheduler, timesteps, size=STOCHASTIC_SIZE)
    due = SPREAD**2 / (SPREAD**2 + sigma_of(scheduler, timesteps[-1]) ** 2).sqrt()
    mean, spread = end.mean(dim=-1, keepdim=True), end.std(dim=-1, keepdim=True)
    return float(((((mean - MEAN) / SPREAD) ** 2 + ((spread - due) / SPREAD) ** 2).mean()).sqrt())


def report(name, coarse, fine, floor):
    print(f"{name}: {coarse:.2e} at 50, {fine:.2e} at 400, ratio {fine / coarse:.3f}, floor {floor:.1e}")
    return fine < coarse / 4 or fine < floor


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_converges_to_the_exact_flow(name):
    coarse, fine = (deterministic_error(name, searched_list(n)) for n in (50, 400))
    assert report(name, coarse, fine, FLOAT32_FLOOR)


def test_pndm_weights():
    even = _adams_bashforth(np.array([4.0, 5.0, 6.0, 7.0]), 3.0)
    np.testing.assert_allclose(even, np.array([55, -59, 37, -9]) / 24, rtol=1e-12)
    nodes, end = np.array([10.0, 12.0, 13.0, 17.0]), 7.5
    uneven = _adams_bashforth(nodes, end)
    assert uneven @ nodes**3 == pytest.approx((end**4 - nodes[0] ** 4) / (4 * (end - nodes[0])))
    # A gap a hundred times the ones before it: lower orders, down to the newest value alone.
    assert _adams_bashforth(np.array([100.0, 101.0, 102.0, 103.0]), 0.0).tolist() == [1.0]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_converges_to_the_exact_distribution(name):
    coarse, fine = (stochastic_error(name, searched_list(n)) for n in (50, 400))
    assert report(name, coarse, fine, SAMPLE_FLOOR)


VARIANTS = [(name, {}) for name in ALL] + [
    ("DDIMScheduler", {"clip_sample": True}),
    ("DDIMScheduler", {"set_alpha_to_one": False, "prediction_type": "v_prediction"}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "lower_order_final": False}),
    ("DPMSolverSinglestepScheduler", {"solver_type": "heun"}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}),
    ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
]


def own_list(scheduler, n):
    """The list by which the scheduler itself would make n steps."""
    scheduler.set_timesteps(n)
    if hasattr(scheduler, "_timesteps"):
        return [float(t) for t in scheduler._timesteps[::-1]]
    return scheduler.timesteps[:: scheduler.order].tolist()


def plain_run(scheduler, n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(n)
    start = (torch.randn(1, 2, 16, generator=generator) * scheduler.init_noise_sigma).to(dtype)
    return denoise(scheduler, start, generator)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


# Counts for which 1000 / n is even: PNDM itself rounds its midpoints down to whole timesteps, ours are exact.
@pytest.mark.parametrize("n", [10, 50])
@pytest.mark.parametrize("name, arguments", VARIANTS)
def test_own_list_gives_the_own_result_to_the_last_bit(name, arguments, n):
    timesteps = own_list(make(name, **arguments), n)
    assert len(timesteps) == n
    for dtype in (torch.float32, torch.bfloat16):
        plain = plain_run(make(name, **arguments), n, dtype)
        scheduler = make(name, **arguments)
        with accelerated(scheduler, timesteps):
            assert same_bits(plain_run(scheduler, n, dtype), plain)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
def test_the_list_decides_whatever_spacing_is_configured(name, spacing):
    timesteps = searched_list(12)
    scheduler = make(name, timestep_spacing=spacing, steps_offset=1)
    assert torch.equal(run_list(scheduler, timesteps, size=8)[1], run_list(make(name), timesteps, size=8)[1])


@pytest.mark.parametrize("name", ALL)
def test_counts_and_signature_stay_what_a_pipeline_expects(name):
    timesteps, plain, scheduler = searched_list(20), make(name), make(name)
    plain.set_timesteps(20)
    with accelerated(scheduler, timesteps) as adapter:
        scheduler.set_timesteps(7, device="cpu")
        assert adapter.num_inference_steps(timesteps) == scheduler.num_inference_steps == 20
        assert len(scheduler.timesteps) == len(plain.timesteps) == CALLS.get(name, lambda n: n)(20)
        assert scheduler.timesteps.dtype == torch.float32
        assert set(np.float32(timesteps)) <= set(scheduler.timesteps.numpy())
        assert inspect.signature(scheduler.step) == inspect.signature(plain.step)
        if hasattr(plain, "sigmas"):
            assert scheduler.sigmas.dtype == plain.sigmas.dtype and scheduler.sigmas.shape == plain.sigmas.shape
            assert scheduler.sigmas[-1] == plain.sigmas[-1]


@pytest.mark.parametrize("name", ALL)
def test_generator_decides_the_noise(name):
    start = torch.ones(1, 2, 8)
    results = []
    for seed in (1, 1, 2):
        scheduler = make(name)
        with accelerated(scheduler, searched_list(10)):
            scheduler.set_timesteps(7)
            results.append(denoise(scheduler, start, torch.Generator().manual_seed(seed)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) == (name in DETERMINISTIC)


def test_ddim_eta_draws_from_the_generator():
    scheduler = make("DDIMScheduler")
    x = torch.ones(1, 2, 8)
    with accelerated(scheduler, [900.5, 300.25]):
        scheduler.set_timesteps(7)
        results = [
            scheduler.step(x, scheduler.timesteps[0], sample=x, eta=1.0, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        ]
    assert torch.equal(results[0].prev_sample, results[1].prev_sample)
    assert not torch.equal(results[0].prev_sample, results[2].prev_sample)


@pytest.mark.parametrize("aborted", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_afterwards_the_scheduler_is_as_before(name, aborted):
    scheduler, fresh = make(name), make(name)
    before, config = dict(vars(scheduler)), dict(scheduler.config)
    with accelerated(scheduler, searched_list(9)):
        scheduler.set_timesteps(7)
        scheduler.set_timesteps(7)
        latents = torch.randn(1, 2, 16)
        for t in scheduler.timesteps[: 4 if aborted else None]:
            latents = scheduler.step(latents, t, scheduler.scale_model_input(latents, t), return_dict=False)[0]
    assert vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[name] is value for name, value in before.items())
    assert dict(scheduler.config) == config
    assert same_bits(plain_run(scheduler, 9), plain_run(fresh, 9))
    assert dict(scheduler.config) == dict(fresh.config)


@pytest.mark.parametrize("name", ALL)
def test_no_tensor_of_an_aborted_run_stays_alive(name):
    scheduler, alive = make(name), []
    with accelerated(scheduler, searched_list(9)) as adapter:
        scheduler.set_timesteps(7)
        latents = torch.randn(1, 2, 16)
        for t in scheduler.timesteps[:6]:
            noise = torch.randn(1, 2, 16)
            alive += [weakref.ref(latents), weakref.ref(noise)]
            latents = scheduler.step(noise, t, scheduler.scale_model_input(latents, t), return_dict=False)[0]
        del latents, noise
    assert adapter is not None and not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("name", ALL)
def test_two_lists_in_one_generation_do_not_meet(name):
    first, second, results = searched_list(9), searched_list(14), []
    for lists in ([first, second], [second]):
        scheduler = make(name)
        with accelerated(scheduler, first) as adapter:
            for timesteps in lists:
                adapter.set_timesteps(timesteps)
                results.append(denoise(scheduler, torch.ones(1, 2, 8), torch.Generator().manual_seed(0)))
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("name", [name for name in ALL if name != "PNDMScheduler"])
def test_shortest_list(name):
    assert torch.isfinite(run_list(make(name), [700.5], size=8)[1]).all()


def test_pndm_needs_four_timesteps_or_two_without_runge_kutta():
    with pytest.raises(ValueError, match="^The timestep list has 3 entries, but this sampler needs at least 4\\.$"):
        adapter_for(make("PNDMScheduler")).set_timesteps([900, 500, 10])
    assert torch.isfinite(run_list(make("PNDMScheduler"), [900, 500, 100, 10], size=8)[1]).all()
    assert torch.isfinite(run_list(make("PNDMScheduler", skip_prk_steps=True), [900.5, 10], size=8)[1]).all()


@pytest.mark.parametrize("name", ALL)
def test_timesteps_are_clipped_to_the_trained_range(name):
    rest = searched_list(8)[1:]
    scheduler = make(name)
    with accelerated(scheduler, [1000.0] + rest):
        scheduler.set_timesteps(7)
        assert scheduler.timesteps[0] == 999
    assert torch.equal(*(run_list(scheduler, [first] + rest, size=8)[1] for first in (1000.0, 999.0)))


@pytest.mark.parametrize("name", ALL)
def test_entries_that_clipping_or_rounding_makes_equal_are_refused(name):
    scheduler = make(name)
    before = dict(vars(scheduler))
    adapter = adapter_for(scheduler)
    with pytest.raises(ValueError) as error:
        adapter.set_timesteps([1000.0, 999.5, 400, 300, 20])
    assert str(error.value) == (
        "Timesteps 0 and 1 of the list, 1000 and 999.5, become 999 and 999 after clipping to [0, 999] in float32; "
        "the list must be strictly descending."
    )
    with pytest.raises(ValueError, match="Timesteps 2 and 3 of the list, 400.000001 and 400, become 400 and 400 "):
        adapter.set_timesteps([900, 800, 400.000001, 400, 20])
    with pytest.raises(ValueError, match="must be strictly descending"):
        adapter.set_timesteps([20, 300, 400, 500])
    with pytest.raises(ValueError, match="^The timestep list holds a value that is not finite; "):
        adapter.set_timesteps([900, float("nan"), 400, 300])
    with pytest.raises(ValueError, match="^The timestep list has 0 entries, but this sampler needs at least"):
        adapter.set_timesteps([])
    assert vars(scheduler) == before


def test_foreign_timestep_in_a_replaced_step_is_an_error():
    adapter = adapter_for(make("DDIMScheduler"))
    adapter.set_timesteps([900.5, 300.25])
    x = torch.ones(1, 2, 4)
    with pytest.raises(ValueError, match="^Timestep 500 is not one of the scheduler's timesteps\\.$"):
        adapter.step(x, 500, x)


def test_subclasses_are_recognised():
    class Mine(diffusers.DDIMScheduler):
        pass

    assert type(adapter_for(Mine())) is type(adapter_for(make("DDIMScheduler")))


def refusal(scheduler):
    with pytest.raises(UnsupportedScheduler) as error:
        adapter_for(scheduler)
    return str(error.value)


def test_unknown_scheduler_is_refused_by_name():
    assert refusal(diffusers.LCMScheduler()) == (
        "LCMScheduler cannot follow a timestep list: it is not one of the known schedulers, which are "
        f"{', '.join(ALL)}."
    )


def test_continuous_v_prediction_is_refused():
    scheduler = make("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction")
    assert refusal(scheduler) == (
        "EulerDiscreteScheduler cannot follow a timestep list: with timestep_type='continuous' and "
        "prediction_type='v_prediction' its timesteps are logarithms of sigma, not training timesteps; "
        "timestep_type='discrete' is allowed."
    )


def test_infinite_sigma_is_refused():
    assert refusal(make("DDIMScheduler", rescale_betas_zero_snr=True)) == (
        "DDIMScheduler cannot follow a timestep list: its training schedule ends at zero signal "
        "(rescale_betas_zero_snr=True), where sigma is infinite; rescale_betas_zero_snr=False is allowed."
    )


@pytest.mark.parametrize("arguments", [{"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}])
def test_flow_matching_is_refused(arguments):
    scheduler = make("DPMSolverMultistepScheduler")
    scheduler.register_to_config(**arguments)
    assert refusal(scheduler) == (
        "DPMSolverMultistepScheduler cannot follow a timestep list: with use_flow_sigmas or "
        "prediction_type='flow_prediction' its noise levels do not come from the training betas; "
        "prediction_type='epsilon' and 'v_prediction' without use_flow_sigmas are allowed."
    )
