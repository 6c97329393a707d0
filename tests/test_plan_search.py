# SPDX-License-Identifier: Apache-2.0
"""The plan search: exact costs and choices, local errors that predict, budgets, targets, and what it writes."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from osaccel import settings
from osaccel.formats import SettingsError, parse_plan, read_file, read_plan, report_path
from osaccel.generation import Generation
from osaccel.plan import Plan
from osaccel.report import page
from osaccel.search import planned
from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation
from osaccel.search.frames import frames_of, thinned
from osaccel.search.measure import price_of
from osaccel.search.plan import judge, observation, runner
from osaccel.search.plan.actions import (
    ACTIONS,
    BY_NAME,
    FAMILIES,
    FORECAST,
    FULL,
    HALF,
    PLAIN,
    REUSE,
    SKIP,
    Windows,
    actions_for,
    alone,
    plan_of,
    units,
)
from osaccel.search.plan.choice import Choice, at_error, at_work, curve, least
from osaccel.search.plan.deltas import DeltaLog
from osaccel.search.plan.gains import Expectation, gains, probes
from osaccel.search.plan.local import Record, predictor_moments, squared_sizes
from osaccel.search.plan.observation import DenoisedLog
from osaccel.search.plan.sample import sample
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.session import Session
from osaccel.settings import Goal, Settings
from osaccel.targets import target_of

STEPS = 30
# What one plan may mix.
MIXED = (HALF, SKIP, FORECAST)


class Pipeline(tiny.UnseededPipeline):
    """Smooth in the step, as trained models are, so that stand-ins are close."""

    def predict(self, latents, t, scale):
        return 0.2 * super().predict(latents, t, scale) + latents


def search(tmp_path, goals=("2x",), steps=STEPS, prompts=1, pipeline=None, probed=8, **arguments):
    """Search on `prompts` calls as OSACCEL_SEARCH_THEN=continue does; the pipeline, the plan, the report."""
    pipeline, output = pipeline or Pipeline(), str(tmp_path / "plan.json")
    targets = settings.load({"OSACCEL_TARGET": ",".join(goals)}).target
    asked = Settings(
        search="plan", plan_output=output, search_prompts=prompts, search_then="continue", target=targets,
        search_probed=probed,
    )  # fmt: skip
    known = target_of(pipeline)
    session = Session(asked, known if known.guidance else tiny.TARGET)
    torch.manual_seed(5)
    try:
        for number in range(prompts):
            call = {"prompt": f"prompt {number}", "num_inference_steps": steps, "guidance_scale": 4.0, **arguments}
            session.on_call(type(pipeline).__call__, pipeline, (pipeline,), call)
    finally:
        session.abandon()
    return pipeline, read_plan(output), json.loads((tmp_path / "plan.json.report.json").read_text())


def relative(one, other):
    return float((one - other).norm() / other.norm())


# Costs and choices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [20, 25, 50, 100])
def test_an_action_costs_what_its_plan_does(steps):
    windows = Windows.of(steps, 7)
    assert windows.first >= 1 and windows.total == steps
    for action in actions_for(windows.length, FAMILIES):
        plan = plan_of([action] * windows.count, windows)
        spent = 2 * 7 + sum(units(action, windows, window) for window in range(windows.count))
        assert plan.work(7) == pytest.approx(spent / (2 * 7 * steps))


def test_before_the_first_window_steps_are_skipped_as_its_cycle_goes_on_backwards():
    windows = Windows.of(100, 7)
    assert (windows.first, windows.early, windows.settled) == (4, 1, 16)
    for name, skip in (
        ("s2", [1, 3]),
        ("s3", [2, 3]),
        ("s4", [1, 2, 3]),
        ("s6", [1, 2, 3]),
        ("s2c2", []),
        ("full", []),
    ):
        chosen = [BY_NAME[name]] + [PLAIN] * 7
        assert [step for step in plan_of(chosen, windows).skip if step < windows.first] == skip


def test_the_choice_is_the_best_of_all_there_are():
    windows, generator = Windows(2, 6, 3, 4), np.random.default_rng(0)
    actions = actions_for(6, MIXED)
    squares = generator.random((3, 3, len(actions))) ** 4 * np.array([1.0, 4.0, 25.0])[:, None, None]
    squares[:, :, 0] = 0.0
    choices = curve(actions, squares, windows)
    is_better = []
    for work in (0.33, 0.41, 0.5, 0.8, 1.0):
        every = [
            np.sqrt(squares[:, range(3), numbers].sum(axis=1))
            for numbers in itertools.product(range(len(actions)), repeat=3)
            if plan_of([actions[n] for n in numbers], windows).work(4) <= work + 1e-9
        ]
        chosen = at_work(choices, work)
        assert np.square(chosen.errors).mean() == pytest.approx(min(np.square(errors).mean() for errors in every))
        assert plan_of(chosen.actions, windows).work(4) == pytest.approx(chosen.work) and chosen.work <= work + 1e-9
        assert at_error(choices, chosen.error).work <= chosen.work
        # By way of weights the mean error, too, comes near the least there is.
        found = least(actions, squares, windows, work)
        lowest = min(errors.mean() for errors in every)
        assert found.work <= work + 1e-9 and lowest - 1e-9 <= found.error <= min(1.1 * lowest, chosen.error) + 1e-9
        is_better.append(found.error < chosen.error - 1e-9)
    assert any(is_better)
    assert choices[-1].error == 0.0 and at_work(choices, 0.0) is None


def test_what_a_run_cannot_do_is_not_among_its_actions():
    for family in FAMILIES:
        others = [other for other in FAMILIES if other != family]
        assert all(family not in action.cycle for action in actions_for(12, others))
        chosen = [ACTIONS[place] for place in alone(ACTIONS, family)]
        assert chosen[0] is PLAIN and chosen == actions_for(12, [family])
    assert actions_for(12, []) == [PLAIN] and len(actions_for(12, FAMILIES)) == len(ACTIONS)


# Local errors -------------------------------------------------------------------------------------------------------


def test_local_errors_vanish_where_the_stand_ins_are_exact():
    """D and the difference of the branches linear in log s between computed steps; deltas of the blocks in the step."""
    windows = Windows(2, 6, 2, 4)
    sigmas = [float(10 * 0.7**k) for k in range(14)] + [0.0]
    logs = torch.tensor(sigmas[:-1]).log()[:, None]
    steps, slopes = torch.arange(14.0)[:, None], [-sigma for sigma in sigmas[:-1]]
    shown = {"power": 2.0, "forecast": [0.0, 0.0]}
    denoised, guidance = logs[..., None] * torch.ones(1, 1, 5), logs * torch.tensor(slopes)[:, None] * torch.ones(1, 5)
    record = Record(denoised, guidance, sigmas, gram_of(steps), slopes, **shown)
    for action in actions_for(6, MIXED):
        for sizes in squared_sizes(record, action, windows):
            assert max(sizes.values()) < 1e-8
    record = record._replace(forecast=[1.0, 1.0], gram=gram_of(steps**2))
    still = record._replace(gram=gram_of(torch.ones(14, 1)))
    for action in actions_for(6, FAMILIES):
        for one, is_still in ((record, False), (still, True)):
            sizes = squared_sizes(one, action, windows)
            assert (max(size[REUSE] for size in sizes) < 1e-8) == (is_still or REUSE not in action.cycle)
    # Where nothing is put right, the difference goes on along a line in the step.
    never = record._replace(is_corrected=False)
    for one, is_exact in ((never, True), (never._replace(guidance=guidance * logs), False)):
        sizes = squared_sizes(one, BY_NAME["c3"], windows)
        assert (max(size[HALF] for size in sizes) < 1e-6) == is_exact
    bent = record._replace(denoised=denoised**2, guidance=record.guidance * logs, gram=gram_of(steps**2))
    by_name = {action.name: squared_sizes(bent, action, windows) for action in actions_for(6, FAMILIES)}
    for window in range(2):
        assert not any(by_name["full"][window].values())
        for family, mild, strong in (
            (HALF, "c2", "c3"),
            (SKIP, "s2", "s3"),
            (FORECAST, "f2", "f3"),
            (REUSE, "r2", "r3"),
        ):
            assert 0 < by_name[mild][window][family] < by_name[strong][window][family]
            assert not any(size for other, size in by_name[mild][window].items() if other != family)


def test_regions_change_what_the_tried_forecasts_did_scaled_by_what_deltas_say():
    windows, steps = Windows(2, 6, 2, 4), torch.arange(14.0)[:, None]
    sigmas, slopes = [float(10 * 0.7**k) for k in range(14)] + [0.0], [-1.0] * 14
    empty = torch.zeros(14, 1)
    record = Record(empty, empty, sigmas, gram_of(steps**2), slopes, 2.0, [0.25, 9.0])
    changes = {name: squared_sizes(record, BY_NAME[name], windows) for name in ("f2", "f3", "r2")}
    assert [size[FORECAST] for size in changes["f2"]] == pytest.approx([0.25, 9.0])
    twice = squared_sizes(record._replace(forecast=[0.5, 9.0]), BY_NAME["r2"], windows)
    assert twice[0][REUSE] == pytest.approx(2 * changes["r2"][0][REUSE]) and twice[1] == changes["r2"][1]
    for unknown in ([], [math.inf, math.nan]):
        assert not any(squared_sizes(record._replace(forecast=unknown), BY_NAME["f3"], windows)[1].values())


def gram_of(deltas):
    deltas = deltas.double()
    return deltas @ deltas.T


@pytest.mark.parametrize("action", ["f2", "f3", "s2f2", "r3", "s2r2"])
def test_a_forecasts_local_change_is_that_of_the_deltas_themselves(action):
    """Against a loop over hidden states, guidance included, from what watched real blocks saw."""
    generator = torch.Generator().manual_seed(0)
    watched = torch.randn(14, 3, 2, 5, 4, generator=generator).cumsum(0)  # step, edge, batch, token, channel
    log = DeltaLog(num_blocks=2)
    log.steps = 14
    for step, (first, second, third) in enumerate(watched):
        log.observe(step, 0, 0, (first,), (second,))
        log.observe(step, 0, 1, (second,), (third,))
    sigmas, slopes = [float(10 * 0.7**k) for k in range(14)] + [0.0], [-float(k) for k in range(14)]
    empty = torch.zeros(14, 1)
    windows = Windows(2, 6, 2, 2)
    chosen = next(one for one in ACTIONS if one.name == action)
    family = FORECAST if FORECAST in chosen.cycle else REUSE
    record = Record(empty, empty, sigmas, log.gram(3.0), slopes, power=2.0, forecast=[1.0, 1.0])
    mildest = squared_sizes(record, BY_NAME["f2"], windows)[0][FORECAST]
    assert mildest == pytest.approx(1.0)
    found = squared_sizes(record, chosen, windows)[0][family]

    unconditional, conditional = (watched[:, 2] - watched[:, 1]).unbind(1)
    deltas = unconditional + 3.0 * (conditional - unconditional)
    # In the unit of the mildest forecasts.
    unit = square_of_deltas(BY_NAME["f2"], FORECAST, deltas, slopes, sigmas)
    total = square_of_deltas(chosen, family, deltas, slopes, sigmas)
    assert found == pytest.approx(total / unit, rel=1e-4)


def square_of_deltas(action, family, deltas, slopes, sigmas):
    """By a loop over the steps of the window from 2 to 7."""
    full, wrong = [0, 1], {8: 0.0 * deltas[0]}
    for step in range(2, 8):
        kind = action.cycle[(step - 2) % len(action.cycle)]
        if kind == family:
            before, newest = full[-2:]
            ahead = (step - newest) / (newest - before) if kind == FORECAST else 0.0
            guess = deltas[newest] + ahead * (deltas[newest] - deltas[before])
            wrong[step] = slopes[step] * (guess - deltas[step])
        elif kind == FULL:
            full.append(step)
            wrong[step] = 0.0 * deltas[0]
    total = 0.0
    for step in range(2, 8):
        # The next computed step says what D was at a skipped one.
        error = wrong[min(k for k in wrong if k >= step)]
        total = total + sigmas[8] ** 2 * (sigmas[step + 1] ** -2 - sigmas[step] ** -2) * error
    return float(total.square().sum())


class Told:
    """A pipeline whose denoised predictions are told beforehand, whatever its latents are."""

    def __init__(self, scheduler, predictions):
        self.scheduler, self.predictions, self.transformer = scheduler, predictions, Pipeline(1).transformer

    def __call__(self, steps):
        generator = torch.Generator().manual_seed(1)
        self.scheduler.set_timesteps(steps)
        latents = torch.randn(SHAPE, generator=generator) * self.scheduler.init_noise_sigma
        for step, t in enumerate(self.scheduler.timesteps):
            sigma = float(self.scheduler.sigmas[step])
            self.scheduler.scale_model_input(latents, t)
            output = (latents - self.predictions(step, latents, sigma)) / sigma
            latents = self.scheduler.step(output, t, latents, generator=generator, return_dict=False)[0]
        return latents


SHAPE = (2, 3, 2, 8, 6)


@pytest.mark.parametrize("action", ["s2", "s3", "s6"])
@pytest.mark.parametrize("sampler", [EulerAncestralDiscreteScheduler, EulerDiscreteScheduler])
def test_the_local_change_of_skipped_steps_is_that_of_a_network_that_does_not_answer_to_it(sampler, action):
    """Against a generation with the very same predictions in which one window skips, with corrector and response."""
    width = torch.linspace(0.05, 1.5, 48).reshape(8, 6)
    pipeline, log, plain = (
        Told(sampler(), lambda step, x, s: x * width**2 / (width**2 + s**2)),
        DenoisedLog(),
        tiny.Watch(),
    )
    with Generation(pipeline, Plan(), tiny.TARGET, [log, plain]):
        pipeline(14)
    windows, noise = Windows(2, 6, 2, 1), torch.stack(log.noise) if log.noise else torch.zeros(0)
    empty, slopes = torch.zeros(14, 1), [0.0] * 14
    record = Record(torch.stack(log.rows), empty, log.sigmas, torch.zeros(0), slopes, log.power, noise=noise)
    expected = squared_sizes(record, BY_NAME[action], windows)[0][SKIP]

    told, changed = Told(sampler(), lambda step, x, s: log.rows[step]), tiny.Watch()
    plan = plan_of([BY_NAME[action], PLAIN], windows)
    plan = replace(plan, skip=tuple(step for step in plan.skip if step >= windows.first))
    with Generation(told, plan, tiny.TARGET, [changed]):
        told(14)
    found = float((changed.calls[8].sample - plain.calls[8].sample).double().square().sum())
    assert found == pytest.approx(expected, rel=1e-2) and found > 0


class Branches(torch.nn.Module):
    """A transformer whose predictions of both branches are told beforehand, whatever its latents are."""

    def __init__(self, told):
        super().__init__()
        self.transformer_blocks, self.told, self.step = Pipeline(1).transformer.transformer_blocks, told, 0

    def forward(self, hidden_states, timestep=None):
        sigma, denoised = self.sigmas[self.step], self.told[self.step]
        parts = hidden_states.split(SHAPE[0])
        return torch.cat([(x - d) / sigma for x, d in zip(parts, denoised[-len(parts) :])])


class Guided(Told):
    """Guides a transformer of two branches."""

    scale = 5.0

    def __call__(self, steps):
        self.transformer.sigmas = [float(sigma) for sigma in self.sigmas(steps)]
        return super().__call__(steps)

    def sigmas(self, steps):
        self.scheduler.set_timesteps(steps)
        return self.scheduler.sigmas

    def predict(self, step, x, sigma):
        self.transformer.step = step
        unconditional, conditional = self.transformer(hidden_states=torch.cat([x, x])).chunk(2)
        return x - sigma * (unconditional + self.scale * (conditional - unconditional))


@pytest.mark.parametrize(
    "sampler, action",
    [(EulerAncestralDiscreteScheduler, "c2"), (EulerAncestralDiscreteScheduler, "c3"), (EulerDiscreteScheduler, "c2"),
     (EulerDiscreteScheduler, "c3"), (EulerDiscreteScheduler, "s2c2")],
)  # fmt: skip
def test_the_local_change_of_conditional_only_steps_is_that_of_a_network_that_does_not_answer_to_it(sampler, action):
    """Against a generation with the very same predictions of both branches in which one window leaves halves out."""
    moves = torch.randn(14, 2, *SHAPE, generator=torch.Generator().manual_seed(2))
    told, windows = moves.cumsum(0) / 10, Windows(2, 6, 2, 1)
    runs, log = [tiny.Watch(), tiny.Watch()], DenoisedLog()
    plan = plan_of([BY_NAME[action], PLAIN], windows)
    # Not along the cycle that goes on before the window.
    plan = replace(plan, skip=tuple(step for step in plan.skip if step >= windows.first))
    for watch, interceptors, own in zip(runs, ([log], []), (Plan(), plan)):
        pipeline = Guided(sampler(), None)
        pipeline.transformer, pipeline.predictions = Branches(told), pipeline.predict
        with Generation(pipeline, own, tiny.TARGET, [*interceptors, watch]):
            pipeline(14)
    unconditional, conditional = told.unbind(1)
    guidance = (Guided.scale - 1) * (conditional - unconditional).flatten(1)
    slopes = [-sigma for sigma in log.sigmas[:-1]]
    record = Record(torch.stack(log.rows), guidance, log.sigmas, torch.zeros(0), slopes, log.power)
    sizes = squared_sizes(record, BY_NAME[action], windows)[0]
    found = float((runs[1].calls[8].sample - runs[0].calls[8].sample).double().square().sum())
    # Two families at once: their squares add up as far as they have nothing in common.
    assert found == pytest.approx(sizes[HALF] + sizes[SKIP], rel=0.35 if sizes[SKIP] else 1e-3) and found > 0


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_what_is_tried_aside_is_the_answer_to_a_forecast_and_changes_nothing(guidance):
    """Against the first block, its forecast and the output layers, by hand at the latents of the plain generation."""
    pipeline = tiny.UnseededPipeline()
    call = {"prompt": "", "num_inference_steps": STEPS, "guidance_scale": guidance}
    torch.manual_seed(5)
    plain = pipeline(**call)
    torch.manual_seed(5)
    target = target_of(pipeline) if target_of(pipeline).guidance else tiny.TARGET
    replay = Replay(Call(type(pipeline).__call__, pipeline, (pipeline,), call, target))
    output, observed = observation.record(replay, list(pipeline.transformer.transformer_blocks))
    assert torch.equal(output, plain) and observed["passes"] == len(tried_by_hand(pipeline, call))
    windows, record = Windows.of(STEPS, 6), observation.record_of(observed)
    errors = tried_by_hand(pipeline, call)
    # The last window ends with the generation, where x becomes D.
    for window in range(windows.count - 1):
        steps, total = windows.steps(window), 0.0
        for step in steps:
            now, following, end = (pipeline.scheduler.sigmas[place].item() for place in (step, step + 1, steps[-1] + 1))
            # The sampler's own step from D, wrong by the noise level times what the network's answer is wrong by.
            total = total - now * errors.get(step, 0.0) * ((end / following) ** 2 - (end / now) ** 2)
        assert record.forecast[window] == pytest.approx(float(total.double().square().sum()), rel=1e-3)
    assert min(record.forecast) > 0


def test_guidance_in_two_forwards_tries_nothing_aside():
    pipeline = tiny.UnseededPipeline(forwards=2)
    call = {"prompt": "", "num_inference_steps": STEPS, "guidance_scale": 4.0}
    torch.manual_seed(5)
    plain = pipeline(**call)
    torch.manual_seed(5)
    replay = Replay(Call(type(pipeline).__call__, pipeline, (pipeline,), call, tiny.TARGET))
    output, observed = observation.record(replay, list(pipeline.transformer.transformer_blocks))
    assert torch.equal(output, plain) and observed["passes"] == 0 and observed["forecast"] == []


def tried_by_hand(pipeline, call):
    """By step: guided output with all blocks but the first forecast along their last two full steps, less the plain."""
    blocks, rows, seen = pipeline.transformer.transformer_blocks, [], {}
    handles = [
        blocks[1].register_forward_pre_hook(lambda module, args: seen.update(before=args[0].clone())),
        blocks[-1].register_forward_hook(lambda module, args, output: seen.update(after=output.clone())),
    ]
    step = pipeline.scheduler.step

    def watched(output, time, sample, **arguments):
        scaled = pipeline.scheduler.scale_model_input(sample, time)
        rows.append((seen["after"] - seen["before"], output.clone(), time, scaled.clone()))
        return step(output, time, sample, **arguments)

    pipeline.scheduler.step = watched
    torch.manual_seed(5)
    try:
        pipeline(**call)
    finally:
        pipeline.scheduler.step = step
        for handle in handles:
            handle.remove()
    windows, errors = Windows.of(STEPS, 6), {}
    for window in range(windows.count):
        steps = list(windows.steps(window))
        for place in range(1, len(steps), 2):
            if steps[place] == STEPS - 1:
                continue
            newest, older = steps[place] - 1, steps[place] - (3 if place > 1 else 2)
            ahead = (steps[place] - newest) / (newest - older)
            delta = rows[newest][0] + ahead * (rows[newest][0] - rows[older][0])
            _, plain, time, sample = rows[steps[place]]
            behind = [block.forward for block in blocks[1:]]
            try:
                for number, block in enumerate(blocks[1:]):
                    add = delta if number == 0 else 0.0
                    block.forward = lambda hidden, *args, add=add, **kwargs: hidden + add
                with torch.no_grad():
                    tried = pipeline.predict(sample, time.float(), call["guidance_scale"])
            finally:
                for block, forward in zip(blocks[1:], behind):
                    block.forward = forward
            errors[steps[place]] = (tried - plain).flatten()
    return errors


def test_a_choice_of_tokens_is_scaled_up_and_two_forwards_a_step_say_nothing():
    tokens = torch.randn(4, 3, 2, 4000, 2, generator=torch.Generator().manual_seed(1))
    every, some = DeltaLog(2), DeltaLog(2, memory=4 * 2 * 1000 * 2 * 4)
    for log in (every, some):
        log.steps = 4
        for step, (first, second, third) in enumerate(tokens):
            log.observe(step, 0, 0, (first,), (second,))
            log.observe(step, 0, 1, (second,), (third,))
    assert some.gram() == pytest.approx(every.gram(), abs=0.1 * float(every.gram().diagonal().min()))
    every.observe(3, 1, 0, (tokens[0, 0],), (tokens[0, 0],))
    assert len(every.gram()) == 0


def test_the_predictor_is_fitted_to_how_predictions_move():
    """All of it where D is linear in s; none where D is a martingale, whose last value is its best forecast."""
    windows, steps = Windows(4, 12, 8, 2), 100
    sigmas = [float(20 * 0.96**k) for k in range(steps)] + [0.0]
    straight = torch.tensor(sigmas[:-1])[:, None] * torch.ones(1, 2000)
    walk = torch.randn(steps, 2000, generator=torch.Generator().manual_seed(3)).cumsum(0)
    s2 = next(action for action in ACTIONS if action.name == "s2")
    for denoised, power, wanted in ((straight, 1.0, 1.0), (straight, 2.0, 1.0), (walk, 2.0, 0.0)):
        record = Record(denoised, torch.zeros(steps, 1), sigmas, torch.zeros(0), [0.0] * steps, power)
        against, along = predictor_moments(record, s2, windows)
        assert -against / along == pytest.approx(wanted, abs=0.06)


def test_a_measured_choice_tells_how_much_more_larger_changes_do():
    skips = np.arange(len(FAMILIES)) == FAMILIES.index(SKIP)
    sizes = {
        name: np.broadcast_to(size * skips, (2, 2, len(FAMILIES))) for name, size in (("full", 0), ("s2", 1), ("s4", 4))
    }
    mild, strong = BY_NAME["s2"], BY_NAME["s4"]
    first = Expectation(sizes, {SKIP: np.array([[1.0, 10.0], [2.0, 3.0]])})
    assert first.squares([PLAIN, mild, strong]).tolist() == [[[0, 1, 4], [0, 10, 40]], [[0, 2, 8], [0, 3, 12]]]
    # Four times the change of the reference was measured to make more than four times its square.
    expected = np.sqrt(first.squares([mild, strong])[:, range(2), range(2)].sum(axis=1))
    told = [first.told([mild, strong], (factor * expected).tolist()) for factor in (1.0, 1.3, 2.0, 4.0)]
    assert told[0] == first and [one.growth for one in told] == sorted({one.growth for one in told})
    for one, factor in zip(told, (1.0, 1.3, 2.0, 4.0)):
        assert one.error([mild, strong]) == pytest.approx(factor * expected.mean()) and 0 <= one.growth <= 1
        # What grows is what is larger than the reference.
        squares = one.squares([mild, strong])[0]
        assert squares[0].tolist() == pytest.approx([one.scale, 4 * one.scale * 4**one.growth])
    # Less than expected scales everything; so do references, which say nothing of growth. What was told last counts.
    for actions, factor, growth in (([mild, strong], 0.5, 0.0), ([mild, mild], 3.0, told[2].growth)):
        expected = np.sqrt(first.squares(actions)[:, range(2), range(2)].sum(axis=1))
        found = told[2].told(actions, (factor * expected).tolist())
        assert (found.growth, found.scale) == (growth, pytest.approx(factor**2))
    assert told[2].told([PLAIN, PLAIN], [0.0, 0.0]) == told[2]


def test_every_call_has_the_gain_that_was_measured_of_it():
    windows, sizes = Windows(4, 6, 4, 6), np.zeros((3, 4, len(FAMILIES)))
    sizes[:, :, FAMILIES.index(SKIP)] = [[1.0, 3.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    early, late = probes([SKIP], windows, 2)
    assert (early.windows, late.windows) == ((0, 1, 2), (3,))
    found = gains({early: [6**0.5, 3.0, 0.0], late: [1.0, math.inf, 0.0]}, {"s2": sizes}, windows)[SKIP]
    assert found[0] == pytest.approx([1.0, 1.0, 0.5**0.5, 0.5])
    # What gave latents that are not finite is never to be done; where nothing was changed nothing is known.
    assert found[1][0] == pytest.approx(3.0) and found[1][-1] > 1e100 and np.isfinite(found).all()
    assert found[2].tolist() == [1.0] * 4


def test_a_probed_call_stands_for_those_whose_changes_are_most_like_its_own():
    # The first window is early: nothing is probed there.
    windows, sizes = Windows(4, 6, 3, 6, 1), np.zeros((7, 3, len(FAMILIES)))
    sizes[:, 0, FAMILIES.index(SKIP)] = [1, 99, 1, 1, 1, 1, 1]
    sizes[:, 1:, FAMILIES.index(SKIP)] = [[5, 1], [1, 1], [7, 7], [3, 1], [2, 1], [6, 6], [0, 4]]
    found = sample({"s2": sizes, "c2": sizes}, windows, 3)
    assert found.calls == [0, 1, 2]
    assert [found.calls[place] for place in found.standing] == [0, 1, 2, 0, 1, 2, 1]
    # Four times the squared change is twice the error; where nothing is changed nothing is lost, whatever the gain.
    changes = np.array([1.0, 1.0, 4.0, 4.0, 9.0, 1.0, 0.0])
    assert found.of_all([0.1, math.inf, 0.4], changes) == pytest.approx([0.1, math.inf, 0.4, 0.2, math.inf, 0.2, 0.0])
    assert found.of_all([0.1, 0.0, 0.4], 0.0 * changes) == [0.0] * 7
    for count in (7, 100):
        assert sample({"s2": sizes}, windows, count) == (list(range(7)), list(range(7)))


# The whole search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probed", [1, 8])
def test_a_search_finds_a_plan_of_the_asked_work_within_its_budget_and_measures_it_truly(tmp_path, probed):
    pipeline, plan, report = search(tmp_path, prompts=2, probed=probed)
    assert 0.4 < plan.work(6) <= 0.5 + 1e-9 and report["cost"]["plain_generations"] <= 6.0
    # The report's error is what sampling with the file gives, on the calls that were recorded.
    errors = []
    torch.manual_seed(5)
    for number in range(2):
        call = {"prompt": f"prompt {number}", "num_inference_steps": STEPS, "guidance_scale": 4.0}
        state = torch.get_rng_state()
        plain = pipeline(**call)
        torch.set_rng_state(state)
        with Generation(pipeline, plan, tiny.TARGET):
            planned = pipeline(**call)
        errors.append(relative(planned, plain))
    assert report["plan"]["measured"] == {} and plan.measured["errors_of_calls"] == pytest.approx(errors, rel=1e-3)
    assert plan.measured["error"] == pytest.approx(np.mean(errors), rel=1e-3)
    assert plan.made_for["steps"] == STEPS and plan.made_for["sampler"] == "EulerAncestralDiscreteScheduler"


def test_probes_run_on_some_calls_and_plans_on_all(tmp_path):
    _, plan, report = search(tmp_path, prompts=5, probed=2)
    probes = [row for row in report["evaluations"] if "calls" in row]
    plans = [row for row in report["evaluations"] if "calls" not in row]
    assert len(probes) > 3 and len({tuple(row["calls"]) for row in probes}) == 1
    assert {len(row["details"]["errors"]) for row in probes} == {2} == {len(row["calls"]) for row in probes}
    assert {len(row["details"]["errors"]) for row in plans} == {5} == {len(plan.measured["errors_of_calls"])}
    for row in report["evaluations"]:
        run = parse_plan(row["config"], "a plan of the report")
        assert row["block_forwards"] == pytest.approx(price_of(run, 6) * len(row["details"]["errors"]) * STEPS * 6)
    # It takes much less than probing all of them and hardly loses by it.
    whole = search(tmp_path / "whole", prompts=5)[2]
    assert report["cost"]["plain_generations"] < 0.75 * whole["cost"]["plain_generations"] <= 4.5
    assert report["error"] < 1.25 * whole["error"]
    shown = page.content_of(page.load(str(tmp_path / "plan.json")))
    assert "Measured on 5 calls" in " ".join(shown.found)
    assert sum("(on 2 calls)" in row[0] for row in shown.tables[0].rows) == len(probes)


class Odd(Pipeline):
    """Its branches are alike, so that conditional-only steps lose nothing; for one prompt they jump to and fro."""

    @torch.no_grad()
    def __call__(self, prompt="", **arguments):
        self.is_odd = prompt == "prompt 4"
        return super().__call__(prompt, **arguments)

    def predict(self, latents, t, scale):
        jump = (-1) ** round((999 - float(t)) / 999 * (STEPS - 1)) if self.is_odd else 0.0
        low, high = self.transformer(torch.cat([latents + jump, latents]), timestep=t).chunk(2)
        return 0.2 * (low + scale * (high - low)) + latents


def test_what_a_call_shows_that_was_not_probed_counts(tmp_path):
    pipeline = Odd()
    _, unaware, report = search(tmp_path / "unaware", ("1.2x",), prompts=4, pipeline=pipeline, probed=1)
    assert report["error"] < 1e-5 and unaware.conditional_only
    _, aware, report = search(tmp_path / "aware", ("1.2x",), prompts=5, pipeline=pipeline, probed=1)
    assert all(row["calls"] != [4] for row in report["evaluations"] if "calls" in row)
    # Nothing of that kind was even tried: what would be lost is known from the recording.
    tried = [parse_plan(row["config"], "a plan") for row in report["evaluations"]]
    tried = [plan for plan in tried if plan.work(6) <= 1 / 1.2 + 1e-9]
    assert aware in [replace(plan, made_for=aware.made_for, measured=aware.measured) for plan in tried]
    assert not any(plan.conditional_only for plan in tried)


def test_the_plan_is_better_than_even_patterns_of_the_same_work(tmp_path):
    pipeline, plan, report = search(tmp_path)
    windows = Windows.of(STEPS, 6)
    call = {"num_inference_steps": STEPS, "guidance_scale": 4.0}
    torch.manual_seed(5)
    plain = pipeline(**call)
    even = []
    for action in ACTIONS:
        if windows.length % len(action.cycle) == 0:
            rival = plan_of([action] * windows.count, windows)
            if plan.work(6) - 0.02 <= rival.work(6):
                torch.manual_seed(5)
                with Generation(pipeline, rival, tiny.TARGET):
                    even.append(
                        (rival.work(6), relative(pipeline(num_inference_steps=STEPS, guidance_scale=4.0), plain))
                    )
    nearest = [error for work, error in even if work <= plan.work(6) + 0.05]
    assert nearest and report["error"] <= 1.05 * min(nearest)


def miniature(sampler):
    """The embedded model's pipeline, and the arguments of a call that it was trained for."""
    from benchmarks.reference import data, load

    call = {
        "prompt": load.calibration_prompts(3)[2], "num_frames": data.FRAMES, "height": data.SIZE, "width": data.SIZE,
        "output_type": "latent", "max_sequence_length": data.CAPTION_WORDS, "guidance_scale": 2.0,
    }  # fmt: skip
    return load.load_pipeline(sampler), call


@pytest.mark.parametrize("share, early", [(0.04, 0), (0.4, 2)])
def test_on_the_miniature_little_depends_on_how_many_windows_are_early(tmp_path, monkeypatch, share, early):
    (pipeline, call), found = miniature("EulerAncestralDiscrete"), {}
    for kept in (planned.SETTLING, share):
        monkeypatch.setattr(planned, "SETTLING", kept)
        found[Windows.of(50, 12).early] = search(tmp_path / str(kept), steps=50, pipeline=pipeline, **call)[2]
    usual, other = found[1], found[early]
    assert max(usual["work"], other["work"]) <= 0.5
    # The same work, saved elsewhere: by how much it matters for one call, without a video that turns.
    assert 1 / 3 < other["error"] / usual["error"] < 3 and max(usual["error"], other["error"]) < 0.1


def test_several_goals_have_a_file_each_and_one_curve(tmp_path):
    _, plan, report = search(tmp_path, ("1.5x", "2.5x", "error:0.05"))
    files = {path.name for path in tmp_path.iterdir()}
    assert {"plan.json", "plan.2.5x.json", "plan.error0.05.json"} <= files
    fast = read_plan(str(tmp_path / "plan.2.5x.json"))
    assert plan.work(6) <= 1 / 1.5 + 1e-9 and fast.work(6) <= 1 / 2.5 + 1e-9
    assert fast.measured["error"] > plan.measured["error"]
    assert read_plan(str(tmp_path / "plan.error0.05.json")).measured["error"] <= 0.05
    works = [work for work, _ in report["curves"]["together"]]
    assert works == sorted(works) and set(report["curves"]) == {"together", "conditional only", "skipped", "reused"}


class Filming(Pipeline):
    """Makes frames of its latents, as a pipeline does that is not asked for latents."""

    def __call__(
        self, prompt="", num_inference_steps=10, guidance_scale=7.5, num_frames=5, height=8, width=8, output_type="pt"
    ):
        latents = super().__call__(prompt, num_inference_steps, guidance_scale, num_frames, height, width)
        return latents if output_type == "latent" else (127 + 40 * latents).reshape(1, 5, 2, 4, 1)


def test_every_goal_s_page_has_the_frames_of_its_own_plan(tmp_path):
    goals, files = ("1.5x", "error:0.0000001", "3x"), ("plan.json", "plan.error1e-07.json", "plan.3x.json")
    # What an earlier search left beside a plan that has no frames of its own.
    np.savez(str(tmp_path / "plan.error1e-07.json.report.npz"), plain=np.zeros((5, 2, 4, 1), np.uint8))
    pipeline, *_ = search(tmp_path, goals, pipeline=Filming())
    call = {"num_inference_steps": STEPS, "guidance_scale": 4.0}
    torch.manual_seed(5)
    plain = thinned(frames_of(pipeline(**call)))
    kept = {}
    for name in files:
        loaded = page.load(str(tmp_path / name))
        assert ("Compare the frames below" in page.content_of(loaded).following) is bool(loaded["frames"])
        if loaded["frames"]:
            torch.manual_seed(5)
            with Generation(pipeline, read_plan(str(tmp_path / name)), tiny.TARGET):
                planned = thinned(frames_of(pipeline(**call))).astype(int)
            assert np.array_equal(loaded["frames"]["plain"], plain)
            assert np.abs(loaded["frames"]["plan"] - planned).max() <= 1
            kept[name] = loaded["frames"]["plan"]
    assert list(kept) == [files[0], files[2]] and not np.array_equal(*kept.values())


@pytest.mark.parametrize("goal, further", [("error:0.0000001", "error:"), ("psnr:150", "psnr:")])
def test_where_nothing_that_saves_keeps_a_goal_that_is_said_with_one_that_is_kept(tmp_path, caplog, goal, further):
    caplog.set_level("INFO", "osaccel")
    _, plan, report = search(tmp_path / "far", (goal,), pipeline=Filming())
    assert plan.is_plain and report["work"] == 1.0 and report["milder"].startswith(further)
    asked = settings.load({"OSACCEL_TARGET": goal}).target[0]
    assert f"nothing that saves work keeps {asked}, so its plan computes every step in full" in caplog.text
    assert f"search again with a milder target, such as OSACCEL_TARGET={report['milder']}; " in caplog.text
    assert "found a plan" not in caplog.text
    assert (
        f"OSACCEL_TARGET={report['milder']}."
        in page.content_of(page.load(str(tmp_path / "far" / "plan.json"))).following
    )
    caplog.clear()
    _, plan, report = search(tmp_path / "near", (report["milder"],), pipeline=Filming())
    assert plan.touches_network and report["keeps"] and f"found a plan for {report['goal']}" in caplog.text


def test_a_psnr_is_kept_by_as_little_work_as_replays_within_the_budget_find(tmp_path):
    pipeline, call = miniature("EulerAncestralDiscrete")
    del call["output_type"]
    _, plan, report = search(tmp_path, ("psnr:45",), steps=50, pipeline=pipeline, **call)
    torch.manual_seed(5)
    plain = frames_of(pipeline(num_inference_steps=50, **call)).astype(np.float64)
    torch.manual_seed(5)
    with Generation(pipeline, plan):
        planned_frames = frames_of(pipeline(num_inference_steps=50, **call)).astype(np.float64)
    kept = 10 * math.log10(255**2 / np.square(planned_frames - plain).mean())
    # Nobody who asks for 45 dB wants to pay for 50.
    assert 45 <= kept < 48 and report["psnr"] == pytest.approx(kept, abs=0.05) and report["work"] < 0.6
    assert report["cost"]["plain_generations"] <= 6


class SteadyBlock(tiny.CountingBlock):
    """Its delta is a line in the step; that of the others follows the noise."""

    def forward(self, hidden_states, timestep=None, attention_mask=None):
        self.calls += 1
        return hidden_states + 0.3 * torch.tanh(self.linear.bias) * (1 + timestep / 1000)


@pytest.mark.parametrize("block, order, name", [(SteadyBlock, 1, "forecast"), (tiny.CountingBlock, 0, "reused")])
def test_blocks_are_forecast_or_reused_whichever_changes_less(tmp_path, block, order, name):
    pipeline = Pipeline(block=block)
    _, plan, report = search(tmp_path, ("1.5x", "2x"), pipeline=pipeline)
    assert name in report["curves"] and {"forecast", "reused"} - {name} - set(report["curves"])
    regions = [region for one in report["evaluations"] for region in one["config"].get("regions", ())]
    assert regions and {region.get("order", 0) for region in regions} == {order}


def test_no_plan_is_clearly_worse_than_one_that_was_measured_for_more_speed(tmp_path):
    """On a model whose errors do not add up as supposed, an even plan for 3x may be the best there is for 2x."""
    goals = ("3x", "2x", "1.5x")
    search(tmp_path, goals, prompts=2)
    files = ["plan.json", "plan.2x.json", "plan.1.5x.json"]
    reports = [read_file(report_path(str(tmp_path / name))) for name in files]
    compared = 0
    for report, name in zip(reports, files):
        own = np.array(read_file(str(tmp_path / name))["measured"]["errors_of_calls"])
        for one in reports[-1]["evaluations"]:
            plan = parse_plan(one["config"], "a replay")
            if plan.work(6) <= 1 / float(report["goal"].rstrip("x")) + 1e-9:
                errors = np.array(one["details"]["errors"])
                is_clear = (own - errors).mean() > 2**-0.5 * (own - errors).std(ddof=1) + 1e-12
                # Among the first steps it takes a quarter.
                assert not (is_clear and runner.TOLERANCE * errors.mean() < own.mean()), (name, plan.describe())
                compared += 1
    assert compared > 3


@pytest.mark.parametrize(
    "errors, others, is_clear",
    [
        ([1.0, 2.0, 3.0], [1.1, 2.1, 3.1], True),  # always less
        ([1.0, 2.0, 3.0], [1.5, 3.0, 2.0], False),  # less in the mean, and more once
        ([1.0], [1.2], False),
        ([1.0], [1.3], True),
        ([1.0, 2.0], [1.0, 2.0], False),
    ],
)
def test_a_plan_is_clearly_better_by_more_than_its_calls_leave_in_doubt(errors, others, is_clear):
    one, other = (Evaluation({}, 0.0, 1.0, details={"errors": values}) for values in (errors, others))
    assert judge.is_clearly_better(one, other) is is_clear


@pytest.mark.parametrize("steps", [40, 60])
def test_the_fitted_predictor_is_taken_only_where_it_was_measured_to_help(tmp_path, steps):
    pipeline, call = miniature("EulerDiscrete")
    _, plan, report = search(tmp_path, ("1.7x",), steps=steps, pipeline=pipeline, **call)
    torch.manual_seed(5)
    plain = pipeline(num_inference_steps=steps, **call).images
    torch.manual_seed(5)
    with Generation(pipeline, replace(plan, correction=replace(plan.correction, predictor=0.0))):
        without = pipeline(num_inference_steps=steps, **call).images
    assert plan.skip and report["error"] <= 1.01 * relative(without, plain)
    tried = {run["config"].get("correction", {}).get("predictor", 0.0) for run in report["evaluations"]}
    assert len(tried) == 2 and max(tried) > 0.5


def test_replays_show_no_progress_bar_of_the_pipeline_s(tmp_path, capfd):
    pipeline, call = miniature("EulerDiscrete")
    pipeline.set_progress_bar_config(disable=False)
    _, _, report = search(tmp_path, ("psnr:30",), steps=20, pipeline=pipeline, **call)
    # That of the recorded call, and nothing of the others.
    assert len(report["evaluations"]) > 3 and capfd.readouterr().err.count("  0%|") == 1


@pytest.mark.parametrize("goals", [("2x", "1.5x", "2.5x"), ("error:0.05", "error:0.02", "error:0.1")])
def test_a_search_killed_before_its_last_file_finds_the_same_and_runs_nothing_again(tmp_path, monkeypatch, goals):
    _, whole, expected = search(tmp_path / "whole", goals, prompts=2)

    def killed(*_):
        raise KeyboardInterrupt

    pipeline = Pipeline()
    with monkeypatch.context() as patched:
        patched.setattr(runner.formats, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "killed", goals, prompts=2, pipeline=pipeline)
    before = sum(pipeline.block_calls())
    _, resumed, report = search(tmp_path / "killed", goals, prompts=2, pipeline=pipeline)
    assert before > 0 and sum(pipeline.block_calls()) == before
    assert resumed == whole and report["cost"]["plain_generations"] == expected["cost"]["plain_generations"]
    for goal in goals[1:]:
        name = f"plan.{goal.replace(':', '')}.json"
        assert read_plan(str(tmp_path / "killed" / name)) == read_plan(str(tmp_path / "whole" / name))


def test_a_killed_search_goes_on_with_its_recordings_where_more_calls_are_probed(tmp_path, monkeypatch, caplog):
    _, whole, _ = search(tmp_path / "whole", prompts=3, probed=2)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner.formats, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "killed", prompts=3, probed=1)
    caplog.set_level("INFO", "osaccel")
    _, resumed, report = search(tmp_path / "killed", prompts=3, probed=2)
    assert caplog.text.count("was recorded before the search was interrupted") == 3
    assert resumed == whole and {len(row["calls"]) for row in report["evaluations"] if "calls" in row} == {2}


def test_what_cannot_be_reached_says_how_far_it_goes(tmp_path):
    pipeline = Pipeline()
    with pytest.raises(SearchError, match="No plan reaches 50x: at most 15.00x can be reached"):
        search(tmp_path, ("2x", "50x"), pipeline=pipeline, prompts=3)
    # Neither were other calls waited for nor anything replayed for the target before it.
    assert sum(pipeline.block_calls()) < 6 * STEPS * 1.5
    _, plan, report = search(tmp_path / "far", ("6x",))
    assert len(plan.skip) == 25 and report["predicted_error"] is None and report["error"] == plan.measured["error"]
    sampler = Pipeline(scheduler=DPMSolverMultistepScheduler(), num_blocks=1)
    with pytest.raises(
        SearchError, match="guidance is off, or .*; DPMSolverMultistepScheduler cannot skip or correct steps: "
    ):
        search(tmp_path / "off", pipeline=sampler, guidance_scale=1.0)
    clipping = Pipeline(scheduler=DDIMScheduler(clip_sample=True), num_blocks=1)
    with pytest.raises(SearchError, match="clip_sample=False is allowed.* No blocks can be forecast"):
        search(tmp_path / "clipping", pipeline=clipping, guidance_scale=1.0)


def test_too_short_a_generation_is_refused(tmp_path):
    with pytest.raises(SearchError, match="6 steps is too short for a plan search; sample at least 7"):
        search(tmp_path, steps=6)
    search(tmp_path / "enough", steps=7)


def test_the_early_windows_save_where_that_was_measured_to_be_better_by_a_quarter(tmp_path):
    windows, is_taken = Windows.of(50, 6), set()
    assert (windows.first, windows.early, windows.settled) == (2, 1, 14)
    for goal in ("1.1x", "1.6x", "4x"):
        _, plan, report = search(tmp_path / goal, (goal,), steps=50)
        tried = [(parse_plan(one["config"], "evaluation"), one["error"]) for one in report["evaluations"]]
        kinds = {True: [], False: []}
        for one, error in tried:
            first_saved = min(step for _, steps in one.named_steps() for step in steps)
            if one.work(6) <= 1 / float(goal[:-1]) + 1e-9:
                kinds[first_saved < windows.settled].append(error)
        # On one call whatever is tried later must be better by a quarter, what saves early than what was taken else.
        early, late, taken = min(kinds[True]), min(kinds[False], default=math.inf), plan.measured["error"]
        is_taken.add(taken in kinds[True])
        assert taken <= 1.25 * min(early, late) and (taken < late if taken in kinds[True] else taken in kinds[False])
    assert is_taken == {True, False}


def test_replays_and_errors_to_keep_leave_the_early_windows_in_full(tmp_path):
    windows = Windows.of(50, 6)
    _, plan, report = search(tmp_path, ("error:0.02",), steps=50)
    tried = [parse_plan(one["config"], "evaluation") for one in report["evaluations"]] + [plan]
    assert len(tried) > 4 and report["error"] <= 0.02
    assert all(step >= windows.settled for one in tried for _, steps in one.named_steps() for step in steps)


def test_an_error_is_kept_by_the_least_work_that_was_measured_to_keep_it(tmp_path):
    """Also where the budget is over before the choices come to it: a replay that measures the gains may keep it."""
    scheduler = EulerDiscreteScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    pipeline = Pipeline(scheduler=scheduler, num_blocks=2)
    _, plan, report = search(tmp_path, ("error:0.0001",), prompts=2, pipeline=pipeline, guidance_scale=1.0)
    tried = [(parse_plan(one["config"], "evaluation").work(2), one["error"]) for one in report["evaluations"]]
    keeping = [work for work, error in tried if error <= 0.0001]
    assert keeping and plan.measured["error"] <= 0.0001 and plan.work(2) == pytest.approx(min(keeping))


@pytest.mark.parametrize(
    "errors, taken",
    [
        # By plan: late, early, late, early. An early one must be better than every late one by a quarter.
        ([1.0, 0.79, 0.84, 0.90], 2),
        ([1.0, 0.60, 0.84, 0.90], 1),
        ([1.0, 0.60, 0.84, 0.40], 3),
        ([1.0, 0.95, 0.90, 0.85], 2),
        ([1.0, 0.85, 1.10, 0.90], 0),
    ],
)
def test_of_measured_plans_the_first_is_taken_unless_another_is_better_by_what_is_in_doubt(errors, taken):
    goal = Goal("speed", 2.0)
    skips = [(20, 22), (3, 20), (24, 26), (5, 7)]
    plans = [Plan(steps=50, skip=skip) for skip in skips]
    # Two calls that agree: every difference is clear.
    found = [
        judge.Found(goal, Choice((), 0.9, ()), plan, Evaluation({}, error, 1.0, details={"errors": [error, error]}))
        for plan, error in zip(plans, errors)
    ]
    assert judge.best(found, Windows.of(50, 6).settled).plan == plans[taken]


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_multistep_sampler_skips_no_step(tmp_path, guidance):
    sampler = Pipeline(scheduler=DPMSolverMultistepScheduler())
    _, plan, _ = search(tmp_path, ("1.3x",), pipeline=sampler, guidance_scale=guidance)
    assert not plan.skip and (plan.conditional_only or plan.regions) and plan.work(6) <= 1 / 1.3 + 1e-9
    assert guidance > 1 or not plan.conditional_only


def test_without_guidance_no_step_is_conditional_only(tmp_path):
    _, plan, _ = search(tmp_path, guidance_scale=1.0)
    assert not plan.conditional_only and plan.work(6) <= 0.5


def test_latents_that_are_not_finite_are_refused(tmp_path):
    pipeline = Pipeline(scheduler=EulerAncestralDiscreteScheduler())
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[0].linear.weight.fill_(float("nan"))
    with pytest.raises(SearchError, match="not finite"):
        search(tmp_path, pipeline=pipeline)


@pytest.mark.parametrize("first, last", [(0, 12), (12, STEPS)])
def test_guidance_at_some_of_the_steps_leaves_skipping_them(tmp_path, first, last):
    class Partly(Pipeline):
        """As FLUX and Wan pipelines run guidance that begins late or ends early."""

        def predict(self, latents, t, scale):
            step = self.scheduler.index_for_timestep(float(t))
            return super().predict(latents, t, scale if first <= step < last else 1.0)

    pipeline, plan, report = search(tmp_path, pipeline=Partly())
    assert plan.skip and not plan.conditional_only and not plan.regions
    assert report["error"] < 0.3


@pytest.mark.parametrize("goal", ["2x", "error:0.01"])
def test_a_first_choice_that_is_not_finite_leaves_the_others(tmp_path, monkeypatch, goal):
    evaluated, first = runner.PlanRunner.evaluated, []

    def spoiled(self, jobs):
        found = evaluated(self, jobs)
        if len(jobs) == 1 and (not first or jobs == first):
            first[:] = jobs
            found = [replace(found[0], error=None)]
            self.asked.update((one.key, one) for one in found)
        return found

    monkeypatch.setattr(runner.PlanRunner, "evaluated", spoiled)
    _, plan, report = search(tmp_path, (goal,))
    assert plan.touches_network and (goal == "2x" or report["error"] <= 0.01)
    assert first and report["plan"] != first[0] and report["error"] is not None


@pytest.mark.parametrize(
    "text, goals",
    [
        ("2x", [Goal("speed", 2.0)]),
        ("1.5X, 3x", [Goal("speed", 1.5), Goal("speed", 3.0)]),
        ("psnr:40,error:0.02", [Goal("psnr", 40.0), Goal("error", 0.02)]),
    ],
)
def test_targets(text, goals):
    assert list(settings.load({"OSACCEL_TARGET": text}).target) == goals


@pytest.mark.parametrize("text", ["2", "x", "1x", "0.5x", "psnr:", "psnr:-3", "size:2", "fast", "2x,,3x", "nanx"])
def test_targets_that_are_none(text):
    with pytest.raises(SettingsError, match="OSACCEL_TARGET: expected a speed-up such as 2x"):
        settings.load({"OSACCEL_TARGET": text})


def test_targets_that_would_have_one_file_are_refused():
    with pytest.raises(SettingsError, match="OSACCEL_TARGET: 2x is asked for twice; each target's file is named"):
        settings.load({"OSACCEL_TARGET": "2x,psnr:40,2.0000001x"})
