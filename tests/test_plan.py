# SPDX-License-Identifier: Apache-2.0
"""Plans: every action against loops written out here, and one message for everything a plan file can get wrong."""

import gc
import json
import math
import re
import weakref

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
)
from tiny import SEQUENCE_FIRST, TARGET, Block, Pipeline, needs_compile

from osaccel import settings
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.formats import SettingsError, parse_plan, read_plan, write_plan
from osaccel.generation import Generation
from osaccel.plan import Correction, Plan, Region, for_steps, of_dit_cache
from osaccel.sampling import UnsupportedScheduler

STEPS = 12
EVERYTHING = Plan(
    steps=STEPS,
    skip=(4, 8, 9),
    conditional_only=(2, 3, 6, 10),
    regions=(Region(0, 2, (3, 5, 10), 1), Region(3, 6, (5, 6, 7), 0)),
)
PLANS = {
    "skip": Plan(steps=STEPS, skip=(1, 3, 5, 6, 7, 9, 11)),
    "conditional only": Plan(steps=STEPS, conditional_only=(1, 2, 4, 7, 8, 9, 11)),
    "reuse": Plan(steps=STEPS, regions=(Region(1, 4, (2, 3, 5, 9)),)),
    "forecast": Plan(steps=STEPS, regions=(Region(1, 4, (1, 3, 5, 6, 9), 1), Region(4, 6, (2, 3, 7), 1))),
    "region at conditional-only steps": Plan(
        steps=STEPS, conditional_only=(2, 3, 5, 6, 8), regions=(Region(1, 5, (3, 4, 6, 7, 9), 1),)
    ),
    "everything": EVERYTHING,
    "corrected": Plan(steps=STEPS, skip=(2, 4, 5, 8, 9, 10), correction=Correction(0.5, 0.75)),
    "corrected by steps": Plan(
        steps=STEPS, skip=(2, 4, 5, 8, 9, 10), correction=Correction((1.0,) * 6 + (0.0,) * 6, (0.0, 0.5, 1.0) * 4)
    ),
}


def accelerated(plan, target=TARGET, pipeline=None, **arguments):
    pipeline = pipeline or Pipeline()
    with Generation(pipeline, plan, target) as generation:
        return pipeline(num_inference_steps=plan.steps or STEPS, **arguments), generation, pipeline


class WrittenOut:
    """The same generation by hand: one branch of guidance at a time, the rules of docs/plan.md as plain loops."""

    def __init__(self, plan, scheduler=None, guidance_scale=7.5):
        self.plan, self.pipeline, self.guidance_scale = plan, Pipeline(scheduler=scheduler), guidance_scale
        self.deltas, self.outputs, self.block_calls = {}, {"unconditional": {}, "conditional": {}}, 0.0
        self.taken, self.full = {}, []

    @torch.no_grad()
    def run(self, seed=1, batch=1):
        scheduler = self.pipeline.scheduler
        generator = torch.Generator().manual_seed(seed)
        scheduler.set_timesteps(self.plan.steps)
        latents = torch.randn(batch, 5, 8, generator=generator) * scheduler.init_noise_sigma
        sigmas, computed, used = scheduler.sigmas.double().tolist(), [], {}
        for k, t in enumerate(scheduler.timesteps):
            if k in self.plan.skip:
                used[k] = self.stand_in(k, computed, sigmas)
                noise = (latents - used[k]) / sigmas[k]
            else:
                noise, conditional = self.guided(k, scheduler.scale_model_input(latents, t), t)
                denoised = latents - sigmas[k] * noise
                latents = latents + self.put_right(k, noise - conditional, denoised, sigmas)
                latents = latents + self.correction(k, denoised, computed, used, sigmas)
                noise = (latents - denoised) / sigmas[k]
                computed.append((k, denoised))
                used[k] = denoised
            latents = scheduler.step(noise, t, latents, generator=generator, return_dict=False)[0]
        return latents

    def stand_in(self, k, computed, sigmas):
        (i, newest), strength = computed[-1], self.plan.correction.at(k)[0]
        if len(computed) == 1 or not strength:
            return newest
        p, before = computed[-2]
        far = min((sigmas[i] - sigmas[k]) / (sigmas[p] - sigmas[i]), sigmas[i] / sigmas[p])
        return newest + strength * far * self.persistence(computed) * (newest - before)

    @staticmethod
    def persistence(computed):
        """In [0, 1], of the newest change of D against the one before; a video at a time."""
        if len(computed) < 3:
            return 1.0
        (_, oldest), (_, before), (_, newest) = computed[-3:]
        found = []
        for last, first in zip((newest - before).flatten(1), (before - oldest).flatten(1)):
            r = float(last @ first) / math.sqrt(float(last @ last) * float(first @ first))
            found.append(min(1.0, max(0.0, 2 + 4 * r)))
        return torch.tensor(found).reshape(-1, 1, 1)

    def correction(self, j, denoised, computed, used, sigmas):
        strength = self.plan.correction.at(j)[1]
        if not strength or not computed:
            return 0.0
        i, start = computed[-1]
        total = torch.zeros_like(denoised)
        for k in range(i, j):
            share = math.log(sigmas[i] / sigmas[k]) / math.log(sigmas[i] / sigmas[j])
            weight = 1 / sigmas[k + 1] ** 2 - 1 / sigmas[k] ** 2
            total += weight * ((1 - share) * start + share * denoised - used[k])
        return strength * self.persistence([*computed, (j, denoised)]) * sigmas[j] ** 2 * total

    def put_right(self, e, added, denoised, sigmas):
        """What x lacks at a full step as guidance added something else at the conditional-only steps before it."""
        if e in self.plan.conditional_only:
            self.taken[e] = added
            return 0.0
        taken, self.taken = self.taken, {}
        self.full.append((e, added, denoised))
        if not taken:
            return 0.0
        (p, first, _), called = self.full[-2], [k for k in range(e + 1) if k not in self.plan.skip]
        lost = dict.fromkeys(called, 0.0)
        for k, forecast in taken.items():
            share = math.log(sigmas[p] / sigmas[k]) / math.log(sigmas[p] / sigmas[e])
            lost[k] = -sigmas[k] * ((1 - share) * first + share * added - forecast)
        total = 0.0
        for k in range(p, e):
            i, j = max(step for step in called if step <= k), min(step for step in called if step > k)
            moved = self.plan.correction.at(j)[1] * math.log(sigmas[i] / sigmas[k]) / math.log(sigmas[i] / sigmas[j])
            total = total + (1 / sigmas[k + 1] ** 2 - 1 / sigmas[k] ** 2) * ((1 - moved) * lost[i] + moved * lost[j])
        return self.persistence([(step, d) for step, _, d in self.full]) * sigmas[e] ** 2 * total

    def guided(self, k, latents, t):
        conditional = self.branch("conditional", k, latents, t)
        if k in self.plan.conditional_only:
            unconditional = conditional - self.ahead(k, self.outputs["conditional"], self.outputs["unconditional"])
        else:
            unconditional = self.branch("unconditional", k, -latents, t)
            self.outputs["unconditional"][k], self.outputs["conditional"][k] = unconditional, conditional
        return unconditional + self.guidance_scale * (conditional - unconditional), conditional

    @staticmethod
    def ahead(k, ups, downs):
        """The difference of the branches, on by its last move as far as that agrees with the one before it."""
        steps = sorted(ups)[-3:]
        differences = [ups[step] - downs[step] for step in steps]
        if len(steps) < 3:
            return differences[-1]
        found = []
        for oldest, before, newest in zip(*differences):
            earlier, move = (before - oldest) / (steps[1] - steps[0]), (newest - before) / (steps[2] - steps[1])
            slope = float((earlier * move).sum()) / float((earlier * earlier).sum())
            found.append(newest + (k - steps[2]) * min(1.0, max(0.0, slope)) * move)
        return torch.stack(found)

    def branch(self, name, k, hidden, t):
        entered, index = {}, 0
        blocks = self.pipeline.transformer.transformer_blocks
        while index < len(blocks):
            region = next((region for region in self.plan.regions if region.start == index), None)
            if region is not None and k in region.reuse:
                hidden, index = hidden + self.delta(name, region, k), region.stop
                continue
            if region is not None:
                entered[region] = hidden
            hidden, index = Block.forward(blocks[index], hidden, timestep=t), index + 1
            self.block_calls += 0.5
            for region in list(entered):
                if region.stop == index:
                    self.deltas.setdefault((name, region), []).append((k, hidden - entered.pop(region)))
        return hidden

    def delta(self, name, region, k):
        stored = self.deltas[name, region]
        newest, delta = stored[-1]
        if region.order == 0 or len(stored) == 1:
            return delta
        before, older = stored[-2]
        return delta + (k - newest) / (newest - before) * (delta - older)


@pytest.mark.parametrize("name", PLANS)
def test_each_action_and_all_together_equal_a_loop_written_out(name):
    plan = PLANS[name]
    written = WrittenOut(plan)
    expected = written.run()
    output, generation, _ = accelerated(plan)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert generation.computed_blocks == pytest.approx(written.block_calls)
    assert generation.total_blocks == pytest.approx(6 * STEPS)
    assert plan.work(6) == pytest.approx(written.block_calls / (6 * STEPS))


@pytest.mark.parametrize("options", [{"batch": 3}, {"sequence_first": True}, {"dtype": torch.bfloat16}], ids=str)
def test_every_way_the_batch_runs(options):
    batch, target = options.pop("batch", 1), SEQUENCE_FIRST if options.get("sequence_first") else TARGET
    expected = WrittenOut(EVERYTHING).run(batch=batch)
    output, _, _ = accelerated(EVERYTHING, target, Pipeline(**options), batch=batch)
    # bfloat16 draws other noise, so only that it runs and stays finite shows there.
    assert torch.isfinite(output).all() and output.dtype == options.get("dtype", torch.float32)
    if "dtype" not in options:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_an_empty_plan_is_the_plain_run_bit_for_bit():
    expected = Pipeline()(num_inference_steps=STEPS)
    for plan in (Plan(), Plan(steps=STEPS), Plan(steps=STEPS, regions=(Region(1, 3),))):
        assert plan.is_plain and torch.equal(accelerated(plan)[0], expected)


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_four_keys_and_the_plan_that_says_the_same_are_bit_identical(interval):
    rule = of_dit_cache(DitCacheConfig(3, interval, 1, 4))
    named = for_steps(rule, STEPS)
    assert torch.equal(accelerated(rule)[0], accelerated(named)[0])
    assert named.work(6) == rule.work(6, STEPS)


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_conditional_only_step_is_the_full_one_where_the_branches_do_not_differ(scheduler, zero_snr):
    """Then the difference is zero at every step, and halving the batch must change nothing but rounding."""
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    clip = {"clip_sample": False} if scheduler is DDPMScheduler else {}
    pipeline = Pipeline(scheduler=scheduler(**clip, **(options if zero_snr else {})))
    pipeline.predict = lambda latents, t, scale: pipeline.transformer(torch.cat([latents] * 2), timestep=t).chunk(2)[0]
    expected = pipeline(num_inference_steps=STEPS)
    output, _, _ = accelerated(PLANS["conditional only"], pipeline=pipeline)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_without_guidance_conditional_only_has_no_effect_and_says_so_once(caplog):
    caplog.set_level("INFO", "osaccel")
    expected = Pipeline()(num_inference_steps=STEPS, guidance_scale=1.0)
    output, generation, _ = accelerated(PLANS["conditional only"], guidance_scale=1.0)
    assert torch.equal(output, expected) and generation.computed_blocks == generation.total_blocks == 6 * STEPS
    assert caplog.text.count("conditional-only steps compute in full") == 1
    two, _, _ = accelerated(PLANS["conditional only"], pipeline=Pipeline(forwards=2))
    assert torch.equal(two, Pipeline(forwards=2)(num_inference_steps=STEPS))


def test_arguments_that_are_halved_are_those_the_target_names():
    seen = []

    class Transformer(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.transformer_blocks = inner, inner.transformer_blocks

        def forward(self, hidden_states, timestep, text=None, masks=None, table=None):
            seen.append([len(hidden_states), timestep.dim(), len(text), [len(mask) for mask in masks[0]], len(table)])
            return (self.inner(hidden_states, timestep=timestep[0] if timestep.dim() else timestep),)

    pipeline = Pipeline()
    pipeline.transformer = Transformer(pipeline.transformer)
    guidance = TARGET.guidance._replace(batch_first=("hidden_states", "timestep", "text", "masks"))

    def predict(latents, t, scale):
        args = torch.cat([-latents, latents]), t
        text = {"text": torch.zeros(2, 7), "masks": ([torch.zeros(2), torch.zeros(1, 3)],), "table": torch.zeros(2)}
        low, high = pipeline.transformer(*args, **text)[0].chunk(2)
        return low + scale * (high - low)

    pipeline.predict = predict
    accelerated(Plan(steps=3, conditional_only=(1,)), TARGET._replace(guidance=guidance), pipeline)
    assert seen[0] == seen[2] == [2, 0, 2, [2, 1], 2] and seen[1] == [1, 0, 1, [1, 1], 2]


# Skipped steps ------------------------------------------------------------------------------------------------------


def noise_table(scheduler):
    """s at every training timestep."""
    abar = scheduler.alphas_cumprod.double()
    return ((1 - abar) / abar) ** 0.5


class Exact(Pipeline):
    """Predicts noise as the exact denoiser of unit Gaussian data of mean 1 does; nothing but the sampler is tested."""

    def predict(self, latents, t, guidance_scale):
        calls = self.block_calls()[0]
        # Called so that skipped steps show as steps without a forward; what it says is not used.
        self.transformer(torch.zeros(2, 5, 8, dtype=self.dtype), timestep=t)
        table = noise_table(self.scheduler)
        low = int(t)
        sigma = float(table[low] + (float(t) - low) * (table[min(low + 1, 999)] - table[low]))
        self.seen += [sigma] * (self.block_calls()[0] - calls)
        # scale_model_input has brought Euler's samples to unit variance; the others are there already.
        x = latents.double() * (1 + sigma**2) ** 0.5
        denoised = 1 + (x - 1) / (1 + sigma**2)
        return ((x - denoised) / sigma).to(latents.dtype)

    def __call__(self, **arguments):
        self.seen = []
        return super().__call__(**arguments)


def coarse_with_merged_noise(kind, sigmas, skip, first, noises):
    """The frozen-D solver over the kept steps only, its noise merged from the native steps'."""
    ends = [k for k in range(len(sigmas) - 1) if k not in skip] + [len(sigmas) - 1]
    x = first.double()
    for i, j in zip(ends, ends[1:]):
        s, t = sigmas[i], sigmas[j]
        denoised = 1 + (x - 1) / (1 + s**2)
        if kind == "flow":
            x = denoised + (x - denoised) * t / s
        elif t == 0:
            x = denoised
        else:
            gain = [1 / sigmas[k + 1] ** 2 - 1 / sigmas[k] ** 2 for k in range(i, j)]
            merged = sum(math.sqrt(g) * noises[k].double() for g, k in zip(gain, range(i, j)))
            x = t**2 * (x / s**2 + denoised * (1 / t**2 - 1 / s**2) + merged)
    return x


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize(
    "make, kind",
    [
        (EulerAncestralDiscreteScheduler, "ancestral"),
        (lambda: EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), "ancestral"),
        (lambda: DDPMScheduler(clip_sample=False), "ancestral"),
        (EulerDiscreteScheduler, "flow"),
        (lambda: DDIMScheduler(clip_sample=False), "flow"),
    ],
    ids=["EulerAncestral", "trailing", "DDPM", "Euler", "DDIM"],
)
def test_skipping_equals_the_coarse_run_with_the_merged_noise(make, kind, every):
    skip = tuple(k for k in range(1, 20) if k % every)
    pipeline = Exact(scheduler=make(), dtype=torch.float64)
    with Generation(pipeline, Plan(steps=20, skip=skip), TARGET):
        output = pipeline(num_inference_steps=20)
    assert len(pipeline.seen) == 20 - len(skip)
    scheduler = pipeline.scheduler
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
    noises = [torch.randn(1, 5, 8, generator=generator, dtype=torch.float64) for _ in range(20)]
    if hasattr(scheduler, "sigmas"):
        sigmas, first = scheduler.sigmas.double().tolist(), first * scheduler.init_noise_sigma
    else:
        sigmas = noise_table(scheduler)[scheduler.timesteps].tolist() + [0.0]
        first = first * (1 + sigmas[0] ** 2) ** 0.5
    assert pipeline.seen == pytest.approx([sigmas[k] for k in range(20) if k not in skip], rel=1e-5)
    expected = coarse_with_merged_noise(kind, sigmas, skip, first, noises)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make, reason",
    [
        (
            HeunDiscreteScheduler,
            "HeunDiscreteScheduler cannot skip or correct steps: it evaluates",
        ),
        (KDPM2AncestralDiscreteScheduler, "evaluates every interval twice"),
        (DPMSolverMultistepScheduler, "DPMSolverMultistepScheduler .* extrapolates along earlier predictions"),
        (DPMSolverSinglestepScheduler, "extrapolates along earlier predictions"),
        (DEISMultistepScheduler, "extrapolates along earlier predictions"),
        (PNDMScheduler, "extrapolates along earlier predictions"),
        (DDIMScheduler, "with clip_sample=True it changes the prediction; clip_sample=False is allowed"),
        (lambda: DDPMScheduler(clip_sample=False, variance_type="fixed_large"), "'fixed_small' is allowed"),
    ],
)
def test_samplers_that_cannot_skip_are_refused_before_the_first_forward(make, reason):
    try:
        make().set_timesteps(12)
    except ValueError as error:  # DPMSolverSinglestepScheduler of diffusers 0.28 to 0.32 with numpy 2
        pytest.skip(f"without osaccel this diffusers' sampler cannot run with this numpy: {error}")
    pipeline = Pipeline(scheduler=make())
    for plan in (Plan(steps=None, correction=Correction(0, 1)), Plan(steps=12, skip=(3,))):
        with pytest.raises((UnsupportedScheduler, SettingsError), match=f"{reason}|the plan is for 12 steps"):
            with Generation(pipeline, plan, TARGET):
                pipeline(num_inference_steps=12)
        assert pipeline.block_calls() == [0] * 6


def test_ddim_between_flow_and_ancestral_is_refused():
    from osaccel.interceptors import StepCall
    from osaccel.sampling.powers import power_of

    scheduler, tensor = DDIMScheduler(clip_sample=False), torch.zeros(1)
    call = {"model_output": tensor, "timestep": 1, "sample": tensor}
    assert [power_of(scheduler, StepCall((), {**call, "eta": eta})) for eta in (0.0, 1.0)] == [1.0, 2.0]
    with pytest.raises(UnsupportedScheduler, match="eta=0.5: 0 and 1 are allowed"):
        power_of(scheduler, StepCall((), {**call, "eta": 0.5}))


# What is left behind ------------------------------------------------------------------------------------------------


def test_memory_is_one_tensor_per_order_and_branch_and_none_after():
    held, alive = [], []
    pipeline = Pipeline()
    with Generation(pipeline, EVERYTHING, TARGET) as generation:

        def look(i, *_):
            for cache in generation.cache.regions:
                tensors = [t for lane in cache.lanes.values() for _, delta in lane.deltas for t in delta]
                held.append(sum(t.untyped_storage().nbytes() for t in tensors) / (cache.region.order + 1))
                alive.extend(weakref.ref(tensor) for tensor in tensors)
            halves, branches = generation.interceptors[2], generation.interceptors[0]
            assert len(halves.differences) <= 3
            alive.extend(weakref.ref(tensor) for _, tensor in halves.differences)
            alive.extend(weakref.ref(tensor) for tensor in (branches._newest.difference, branches._newest.denoised))

        pipeline(num_inference_steps=STEPS, callback=look)
    # The hidden states of both branches are (2, 5, 8) float32; a delta of each branch is as much.
    assert max(held) <= 2 * 5 * 8 * 4
    gc.collect()
    assert alive and not any(reference() is not None for reference in alive)
    assert not {"step", "set_timesteps"} & set(vars(pipeline.scheduler)) and "forward" not in vars(pipeline.transformer)


def test_a_second_generation_starts_anew():
    first, _, pipeline = accelerated(EVERYTHING)
    accelerated(EVERYTHING, pipeline=pipeline, seed=7)
    assert torch.equal(accelerated(EVERYTHING, pipeline=pipeline)[0], first)


@needs_compile
def test_a_compiled_transformer_gives_the_same():
    expected, _, _ = accelerated(EVERYTHING)
    pipeline = Pipeline(block=Block)
    compiled = pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    output, _, _ = accelerated(EVERYTHING, pipeline=pipeline)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    assert pipeline.transformer is compiled


def test_the_lines_say_what_is_expected_and_what_was_done():
    said = []
    pipeline = Pipeline()
    with Generation(pipeline, EVERYTHING, TARGET, announce=said.append) as generation:
        pipeline(num_inference_steps=STEPS)
    work = 100 * EVERYTHING.work(6)
    assert said == [
        "generation of 12 steps (default timesteps) begins: 3 steps skipped, 4 conditional only, blocks 0 to 1 "
        f"forecast at 3 steps, blocks 3 to 5 reused at 3 steps; network work {work:.1f} %, ideal speed-up "
        f"{100 / work:.3f}x"
    ]
    assert f"network work {work:.1f} %" in generation.summary() and "measured" in generation.summary()


def test_one_step_and_one_block_are_said_so():
    one = Plan(steps=8, skip=(2,), regions=(Region(3, 4, (5,)), Region(0, 2, (1, 3), order=1)))
    assert one.describe() == "1 step skipped, block 3 reused at 1 step, blocks 0 to 1 forecast at 2 steps"


# Files --------------------------------------------------------------------------------------------------------------

GOOD = {
    "format": "osaccel.plan/1",
    "steps": 100,
    "skip": [31, 33],
    "conditional_only": [11, 13, 15],
    "regions": [{"start": 1, "stop": 12, "reuse": [40, 42], "order": 1}],
    "correction": {"predictor": 0.0, "corrector": 0.0},
    "made_for": {},
    "measured": {},
}


def test_the_example_of_the_documentation_loads_and_comes_back(tmp_path):
    plan = parse_plan(GOOD, "here")
    assert plan == Plan(100, (31, 33), (11, 13, 15), (Region(1, 12, (40, 42), 1),))
    write_plan(str(tmp_path / "plan.json"), plan)
    assert read_plan(str(tmp_path / "plan.json")) == plan
    (tmp_path / "plan.yaml").write_text(json.dumps(GOOD))
    assert read_plan(str(tmp_path / "plan.yaml")) == plan
    minimal = parse_plan({"format": "osaccel.plan/1", "steps": 4}, "here")
    assert minimal == Plan(steps=4) and minimal.is_plain


def test_four_keys_are_a_plan_too():
    keys = {"cache_block_start": 2, "cache_num_blocks": 3, "cache_step_start": 4, "cache_step_interval": 2}
    assert parse_plan(keys, "here") == of_dit_cache(DitCacheConfig(4, 2, 2, 3))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": None}, "here: format must be 'osaccel.plan/1', got None (nothing)."),
        ({"format": "osaccel.plan/2"}, "here: format must be 'osaccel.plan/1', got 'osaccel.plan/2' (text)."),
        ({"steps": "100"}, "here: steps must be an integer of at least 1, got '100' (text)."),
        ({"steps": 10**20}, "here: steps must be at most 10000, got 100000000000000000000."),
        ({"steps": True}, "here: steps must be an integer of at least 1, got True (a boolean)."),
        ({"stepss": 3}, "here: unknown key 'stepss'. Did you mean 'steps'?"),
        ({"skip": 31}, "here: skip must be a list of step indices, got 31 (a number of type int)."),
        ({"skip": [31.0]}, "here: skip: a step must be an integer, got 31.0 (a number of type float)."),
        ({"skip": [100]}, "here: skip: step 100 is not one of the run's steps, 0 to 99."),
        ({"skip": [-1]}, "here: skip: step -1 is not one of the run's steps, 0 to 99."),
        ({"skip": [5, 5]}, "here: skip names step 5 twice."),
        ({"skip": [0]}, "here: skip: the first step, 0, must be computed in full; nothing can stand in for it yet."),
        ({"skip": [13]}, "here: skip and conditional_only both name step 13; a skipped step computes nothing."),
        ({"skip": [40]}, "here: skip and regions[0].reuse both name step 40; a skipped step calls no block."),
        ({"conditional_only": [0]}, "here: conditional_only: the first step, 0, must be computed in full; nothing can "
                                    "stand in for it yet."),
        ({"regions": {}}, "here: regions must be a list of regions, got {} (a mapping)."),
        ({"regions": [{"start": 1, "stop": 1}]}, "here: regions[0]: start 1 and stop 1 name no blocks; 0 <= start "
                                                 "< stop is allowed."),
        ({"regions": [{"start": 1}]}, "here: regions[0]: missing key stop."),
        ({"regions": [{"start": 1, "stop": 3, "order": 2}]}, "here: regions[0].order must be 0 (reuse) or 1 "
                                                             "(forecast), got 2."),
        ({"regions": [{"start": 1, "stop": 3, "re_use": []}]}, "here: regions[0]: unknown key 're_use'. Did you mean "
                                                               "'reuse'?"),
        ({"regions": [{"start": 1, "stop": 4}, {"start": 3, "stop": 6}]}, "here: regions[0] and regions[1] both hold "
                                                                          "block 3."),
        ({"correction": {"predictor": 2}}, "here: correction.predictor must be a number in [0, 1], got 2."),
        ({"correction": {"corrector": [1.0, 0.5]}}, "here: correction.corrector has 2 values, but the plan has 100 "
                                                    "steps; one each, or one number."),
        ({"correction": 1}, "here: correction: expected a mapping with predictor, corrector, response, "
                            "got a number of type int."),
        ({"made_for": []}, "here: made_for must be a mapping, got [] (a list)."),
    ],
    ids=str,
)  # fmt: skip
def test_one_exact_message_for_everything_a_plan_can_get_wrong(change, message):
    with pytest.raises(SettingsError) as caught:
        parse_plan({**GOOD, **change}, "here")
    assert str(caught.value) == message


def test_settings_make_one_plan_of_all_sources(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(GOOD))
    steps = tmp_path / "steps.txt"
    steps.write_text(json.dumps([i / 100 for i in range(100)]))
    loaded = settings.load({"OSACCEL_PLAN": str(path), "OSACCEL_TIMESTEPS": str(steps), "OSACCEL_CORRECTION": "0,.5"})
    plan = loaded.generation_plan()
    assert loaded.accelerates and plan.skip == (31, 33) and len(plan.timesteps) == 100
    assert plan.correction == Correction(0.0, 0.5)
    everything = tmp_path / "all.yaml"
    everything.write_text("plan: plan.json\n")
    assert settings.load({"OSACCEL_CONFIG": str(everything)}).plan == loaded.plan


def test_sources_that_contradict_each_other_are_refused(tmp_path):
    path, cache, steps = tmp_path / "plan.json", tmp_path / "cache.json", tmp_path / "steps.txt"
    path.write_text(json.dumps({**GOOD, "correction": {"predictor": 1.0}}))
    keys = {"cache_block_start": 2, "cache_num_blocks": 3, "cache_step_start": 4, "cache_step_interval": 2}
    cache.write_text(json.dumps(keys))
    steps.write_text("[0.1, 0.9]")
    for more, message in (
        ({"OSACCEL_CACHE_CONFIG": str(cache)}, "OSACCEL_PLAN and OSACCEL_CACHE_CONFIG both say which blocks compute"),
        ({"OSACCEL_TIMESTEPS": str(steps)}, "the plan is for 100 steps, but OSACCEL_TIMESTEPS lists 2"),
        ({"OSACCEL_CORRECTION": "0,1"}, "OSACCEL_PLAN and OSACCEL_CORRECTION ask for different corrections"),
    ):
        with pytest.raises(SettingsError, match=message):
            settings.load({"OSACCEL_PLAN": str(path), **more})


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"steps": "8"}, "steps must be an integer from 1 on, or None for any number, got '8'."),
        ({"steps": 0}, "steps must be an integer from 1 on"),
        ({"steps": True}, "steps must be an integer from 1 on"),
        ({"steps": 8, "skip": 3}, "skip must be a sequence of steps, got 3."),
        ({"steps": 8, "conditional_only": "3"}, "conditional_only must be a sequence of steps, got '3'."),
    ],
)
def test_a_plan_made_in_python_is_checked_as_one_of_a_file(parts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Plan(**parts)


class Words(Pipeline):
    """Gives the transformer a text first, one row for both halves; guides at some of the steps."""

    guided = range(10)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        own = self.transformer.forward
        self.transformer.forward = lambda words=None, hidden_states=None, timestep=None: own(hidden_states, timestep)

    def predict(self, latents, t, scale):
        step = self.scheduler.index_for_timestep(float(t))
        if step not in self.guided:
            return self.transformer(words=torch.ones(1, 3, 8), hidden_states=latents, timestep=t)
        both = torch.cat([-latents, latents])
        low, high = self.transformer(words=torch.ones(1, 3, 8), hidden_states=both, timestep=t).chunk(2)
        return low + scale * (high - low)


@pytest.mark.parametrize("plan", [Plan(steps=10, skip=(3, 5)), Plan(steps=10, conditional_only=(3, 5))])
def test_a_text_of_one_row_before_the_latents_is_not_taken_for_them(plan):
    plain, pipeline = Words(), Words()
    plain()
    with Generation(pipeline, plan, TARGET) as generation:
        pipeline()
    assert generation.summary() and sum(pipeline.block_calls()) <= sum(plain.block_calls())
    work = generation.cache.computed_blocks / (6 * 10)
    assert work == pytest.approx(plan.work(6))


@pytest.mark.parametrize("guided", [range(1, 10), (0, 1, 4, 5, 6, 7, 8, 9), range(5), range(5, 10)])
def test_where_guidance_pauses_steps_compute_what_they_can(guided):
    """A conditional-only step without a known difference, or without guidance, is a whole one."""
    pipeline = Words()
    pipeline.guided = guided
    with Generation(pipeline, Plan(steps=10, skip=(7,), conditional_only=(4, 6, 8)), TARGET):
        latents = pipeline()
    assert torch.isfinite(latents).all() and pipeline.block_calls() == [9] * 6


def test_conditional_only_steps_that_compute_both_branches_change_nothing():
    """Guidance that begins late is not known to be guidance."""
    plain, pipeline = Words(), Words()
    plain.guided = pipeline.guided = range(1, 10)
    expected = plain()
    with Generation(pipeline, Plan(steps=10, conditional_only=(4, 6, 8)), TARGET):
        assert torch.equal(pipeline(), expected)
