# SPDX-License-Identifier: Apache-2.0
"""Generations at once: in threads, inside each other, and with copies made of what they run on."""

import copy
import functools
import json
import pickle
import sys
import threading
import types

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from osaccel.adaptors import DitCacheAdaptor, DitCacheConfig
from osaccel.formats import write_plan
from osaccel.generation import Generation
from osaccel.hooks import pipelines
from osaccel.plan import Correction, Plan, Region, of_dit_cache

STEPS, MODULE = 12, "opensora.sample.pipeline_opensora"
CACHE = DitCacheConfig(cache_block_start=1, cache_num_blocks=4, cache_step_start=2, cache_step_interval=3)
PLAN = Plan(
    steps=STEPS,
    skip=(4, 8, 9),
    conditional_only=(2, 3, 6, 10),
    regions=(Region(0, 2, (3, 5, 10), 1), Region(3, 6, (5, 6, 7), 0)),
    correction=Correction(0.0, 0.5),
)
LIST = [value / STEPS for value in range(STEPS)]
# Seconds that a thread waits for another one on a slow machine.
PATIENCE = 60
MODES = ["plain", "cache", "plan", "correction", "timesteps"]


class Known(tiny.Pipeline):
    """A pipeline that is made of what another one has."""

    def __init__(self, transformer=None, scheduler=None):
        super().__init__(scheduler=scheduler)
        self.transformer = transformer or self.transformer


def hooked(monkeypatch, **variables):
    """A pipeline class by the upstream's name, hooked as on import, in a process with these variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    module = types.ModuleType(MODULE)
    call = lambda self, *args, **kwargs: tiny.Pipeline.__call__(self, *args, **kwargs)  # noqa: E731
    module.OpenSoraPipeline = type("OpenSoraPipeline", (Known,), {"__module__": MODULE, "__call__": call})
    for name in (MODULE, "opensora", "opensora.sample"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(pipelines, "_settings", None)
    monkeypatch.setattr(pipelines, "_session", None)
    pipelines.wrap_pipeline(module)
    return module.OpenSoraPipeline


@pytest.fixture(params=MODES)
def make(request, tmp_path, monkeypatch):
    """The class of a known pipeline, in a process whose settings ask for `request.param`."""
    path, variables = tmp_path / "file.json", {}
    if request.param == "cache":
        path.write_text(json.dumps(dict(CACHE)))
        variables["OSACCEL_CACHE_CONFIG"] = path
    elif request.param == "plan":
        write_plan(str(path), PLAN)
        variables["OSACCEL_PLAN"] = path
    elif request.param == "timesteps":
        path.write_text(json.dumps(LIST))
        variables["OSACCEL_TIMESTEPS"] = path
    elif request.param == "correction":
        variables["OSACCEL_CORRECTION"] = 1
    return hooked(monkeypatch, **variables)


def attributes(pipeline):
    """Everything that could be left behind: the names and hooks of pipeline, scheduler and every module."""
    modules = [*pipeline.transformer.modules()]
    names = [sorted(vars(owner)) for owner in (pipeline, pipeline.scheduler, *modules)]
    return names, [list(module._forward_pre_hooks) for module in modules], list(pipelines._running)


def at_once(*calls):
    """The results of `call(wait)` in a thread each, or their exceptions; `wait` lets all come to the same place."""
    barrier, results = threading.Barrier(len(calls)), {}

    def run(number, call):
        try:
            results[number] = call(lambda: barrier.wait(timeout=PATIENCE))
        except Exception as error:
            results[number] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(calls))]


def run(pipeline, seed=1, callback=None):
    return pipeline(num_inference_steps=STEPS, seed=seed, callback=callback)


def in_step(pipeline, seed, behind=0):
    """A call that takes each step when the other one does, or 2 steps behind it, when that one is over first."""

    def call(wait):
        for _ in range(behind):
            wait()
        result = run(pipeline, seed, lambda i, *_: wait())
        for _ in range(2 - behind):
            wait()
        return result

    return call


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("behind", [(0, 0), (2, 0), (0, 2)])
def test_pipelines_in_threads_give_what_they_give_one_after_the_other(make, shared, behind):
    first = make()
    second = make(first.transformer if shared else None)
    expected = [run(pipeline, seed) for seed, pipeline in enumerate((first, second))]
    before = attributes(first), attributes(second)
    results = at_once(in_step(first, 0, behind[0]), in_step(second, 1, behind[1]))
    assert all(isinstance(result, torch.Tensor) for result in results), results
    assert all(map(torch.equal, results, expected))
    assert (attributes(first), attributes(second)) == before


def intruded(pipeline, intruder):
    """The pipeline's result, and what came of calling the intruder in another thread at the third step."""
    arrived, left, came = threading.Event(), threading.Event(), []

    def intrude():
        arrived.wait(PATIENCE)
        try:
            came.append(run(intruder, seed=2))
        except Exception as error:
            came.append(error)
        left.set()

    def callback(i, *_):
        if i == 2:
            arrived.set()
            assert left.wait(PATIENCE)

    thread = threading.Thread(target=intrude)
    thread.start()
    result = run(pipeline, callback=callback)
    thread.join()
    return result, came[0]


@pytest.mark.parametrize("make", MODES[1:], indirect=True)
@pytest.mark.parametrize("shared", ["pipeline", "scheduler"])
def test_what_counts_one_generation_s_steps_is_refused_to_a_second_one(make, shared):
    first = make()
    second = first if shared == "pipeline" else make(scheduler=first.scheduler)
    expected, before = run(first), (attributes(first), attributes(second))
    calls = sum(second.block_calls())
    result, refusal = intruded(first, second)
    assert isinstance(refusal, RuntimeError) and "at once" in str(refusal), refusal
    assert second is first or sum(second.block_calls()) == calls
    assert torch.equal(result, expected)
    assert (attributes(first), attributes(second)) == before
    assert torch.equal(run(second), expected)


@pytest.mark.parametrize("make", MODES[1:], indirect=True)
def test_a_second_pipeline_with_the_scheduler_is_refused_within_a_step_of_the_first_one_too(make):
    first = make()
    second = make(scheduler=first.scheduler)
    expected, before = run(first), (attributes(first), attributes(second))
    with pytest.raises(RuntimeError, match="EulerAncestralDiscreteScheduler .* at once"):
        run(first, callback=lambda i, *_: run(second) if i == 2 else None)
    assert (attributes(first), attributes(second)) == before
    assert torch.equal(run(first), expected)


def test_a_generation_within_a_step_of_another_one_is_its_own(make):
    first = make()
    second, inner = make(first.transformer), []
    expected = [run(first), run(second, 5)]
    before = attributes(first), attributes(second)
    outer = run(first, callback=lambda i, *_: inner.append(run(second, 5)) if i in (0, 6) else None)
    assert torch.equal(outer, expected[0]) and all(torch.equal(one, expected[1]) for one in inner)
    assert (attributes(first), attributes(second)) == before


def test_a_plain_pipeline_in_another_thread_is_left_plain(make):
    first = make()
    plain = tiny.Pipeline()
    plain.transformer = first.transformer
    expected = run(first), run(plain, seed=2)
    assert all(map(torch.equal, intruded(first, plain), expected))


@pytest.mark.parametrize("make", MODES[1:], indirect=True)
def test_an_error_in_one_thread_leaves_the_other_one_alone(make):
    first = make()
    second = make(first.transformer)
    expected = run(first)
    assert torch.equal(run(second), expected)
    before = attributes(first), attributes(second)

    def broken(i, *_):
        if i == 3:
            raise ZeroDivisionError

    result, error = intruded(first, lambda **kwargs: second(**dict(kwargs, callback=broken)))
    assert isinstance(error, ZeroDivisionError) and torch.equal(result, expected)
    assert (attributes(first), attributes(second)) == before


def test_a_search_is_not_called_from_two_threads(monkeypatch, tmp_path):
    variables = {"OSACCEL_SEARCH": "dit_cache", "OSACCEL_CACHE_CONFIG": tmp_path / "found.json"}
    make = hooked(monkeypatch, **variables, OSACCEL_SEARCH_PROMPTS=1, OSACCEL_SEARCH_THEN="continue")
    first, second = make(), make()
    before = attributes(first), attributes(second)
    result, refusal = intruded(first, second)
    assert isinstance(refusal, RuntimeError) and "one after the other" in str(refusal), refusal
    assert torch.equal(result, run(tiny.Pipeline())) and sum(second.block_calls()) == 0
    assert (attributes(first), attributes(second)) == before


def in_a_thread(call):
    return at_once(lambda wait: call())[0]


def test_what_is_attached_from_python_works_in_whatever_thread_calls(monkeypatch):
    pipeline, plan = tiny.Pipeline(), of_dit_cache(CACHE)
    with Generation(pipeline, plan):
        expected = run(pipeline)
    with Generation(pipeline, plan):
        assert torch.equal(in_a_thread(lambda: run(pipeline)), expected)
        assert torch.equal(run(pipeline), expected)
    adaptor = DitCacheAdaptor(pipeline)
    adaptor.dit_cache_config = CACHE
    assert torch.equal(in_a_thread(lambda: run(pipeline)), expected)


@pytest.mark.parametrize("make", MODES[1:], indirect=True)
def test_what_a_script_asks_for_from_python_is_what_its_pipeline_does(make):
    pipeline, plan = tiny.Pipeline(), of_dit_cache(DitCacheConfig(0, 6, 0, 2))
    with Generation(pipeline, plan):
        expected = run(pipeline)
    hooked_one = make()
    with Generation(hooked_one, plan):
        assert torch.equal(run(hooked_one), expected)
    assert not torch.equal(run(hooked_one), expected)


def test_one_generation_from_python_called_from_two_threads_says_so():
    pipeline = tiny.Pipeline()
    with Generation(pipeline, of_dit_cache(CACHE)):
        with pytest.raises(RuntimeError, match="two threads at once"):
            intruded(pipeline, pipeline)
    assert not {"step", "set_timesteps", "__getstate__"} & set(vars(pipeline.scheduler))


def pickled(original):
    return pickle.loads(pickle.dumps(original))


SAMPLERS = {
    "Euler": EulerDiscreteScheduler,
    "Euler ancestral": EulerAncestralDiscreteScheduler,
    "DDIM": functools.partial(DDIMScheduler, clip_sample=False),
}
DUPLICATES = [copy.copy, copy.deepcopy, pytest.param(pickled, marks=tiny.needs_pickling)]


@pytest.mark.parametrize("duplicate", DUPLICATES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_scheduler_s_copy_is_plain_and_its_own(make, duplicate, sampler):
    """Its steps are what a plain copy's are, and the running generation sees nothing of it."""
    sampler = SAMPLERS[sampler]
    copies, plain = [], []

    def use(kept):
        def callback(i, t, latents):
            if i == 5:
                kept.append(duplicate(made.scheduler))
                kept[0].set_timesteps(7)
                for time in kept[0].timesteps:
                    latents = kept[0].step(latents, time, latents).prev_sample
                kept.append(latents)

        return callback

    made = make(scheduler=sampler())
    expected = run(made, callback=lambda *_: None)
    torch.manual_seed(3)
    before = attributes(made)
    assert torch.equal(run(made, callback=use(copies)), expected)
    assert attributes(made) == before
    made = tiny.Pipeline(scheduler=sampler())
    run(made, callback=use(plain))
    assert sorted(vars(copies[0])) == sorted(vars(plain[0])) and torch.equal(copies[0].timesteps, plain[0].timesteps)


@pytest.mark.parametrize("duplicate", DUPLICATES[1:], ids=lambda function: function.__name__)
def test_a_pipeline_s_copy_generates_on_its_own(make, duplicate):
    made, results = make(), []
    expected, before = run(made), attributes(made)

    def callback(i, *_):
        if i == 5:
            results.append(duplicate(made))
            results.append(run(results[0]))

    assert torch.equal(run(made, callback=callback), expected)
    assert attributes(made) == before
    assert torch.equal(results[1], expected) and attributes(results[0]) == before
    assert torch.equal(run(results[0]), expected)


@pytest.mark.parametrize("make", MODES[1:], indirect=True)
def test_a_shallow_copy_shares_the_scheduler_and_is_refused(make):
    made = make()
    expected, before = run(made), attributes(made)
    with pytest.raises(RuntimeError, match="at once"):
        run(made, callback=lambda i, *_: run(copy.copy(made)) if i == 5 else None)
    assert attributes(made) == before and torch.equal(run(copy.copy(made)), expected)


@pytest.mark.parametrize("duplicate", DUPLICATES, ids=lambda function: function.__name__)
def test_a_copy_in_the_middle_goes_on_as_the_original_does(make, duplicate):
    """The step that a callback tries on a copy is the one that the sampler takes next on the same input."""
    made, seen = make(scheduler=EulerDiscreteScheduler()), []

    def callback(i, t, latents):
        if i == 5:
            tried = duplicate(made.scheduler)
            noise = torch.full_like(latents, 0.1)
            seen.append(tried.step(noise, tried.timesteps[6], latents).prev_sample)
            sigmas = made.scheduler.sigmas
            seen.append(latents + 0.1 * (sigmas[7] - sigmas[6]))

    expected = run(made)
    assert torch.equal(run(made, callback=callback), expected)
    assert torch.allclose(*seen, atol=1e-5)


@pytest.mark.parametrize("duplicate", DUPLICATES, ids=lambda function: function.__name__)
def test_a_scheduler_s_copy_is_plain_while_an_adaptor_is_attached(duplicate):
    pipeline = tiny.Pipeline()
    adaptor = DitCacheAdaptor(pipeline)
    adaptor.dit_cache_config = CACHE
    expected = run(pipeline)
    tried = duplicate(pipeline.scheduler)
    assert not {"step", "set_timesteps", "__getstate__"} & set(vars(tried))
    assert torch.equal(run(pipeline, callback=lambda *_: tried.set_timesteps(9)), expected)


def test_of_two_generations_on_one_transformer_the_older_one_waits_for_the_newer_one_to_end():
    first, second, plan = tiny.Pipeline(), Known(), of_dit_cache(CACHE)
    second.transformer = first.transformer
    with Generation(first, plan):
        with Generation(second, plan):
            with pytest.raises(RuntimeError, match="Another generation of this thread"):
                run(first)
            result = run(second)
        assert torch.equal(run(first), result)
    assert not torch.equal(run(first), result)
