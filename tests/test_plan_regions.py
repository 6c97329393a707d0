# SPDX-License-Identifier: Apache-2.0
"""A plan's regions with reuse or first-order forecast, through the same executor as the four-key rule."""

from dataclasses import replace

import pytest
import torch
from tiny import Block, Pipeline

from osaccel.dit_cache_config import DitCacheConfig
from osaccel.formats import SettingsError
from osaccel.generation import Generation
from osaccel.plan import Plan, Region, of_dit_cache

REGION = Region(1, 5)


def masked(mask, order=0, region=REGION):
    """The plan that computes the region where the mask is set."""
    reuse = tuple(step for step, computed in enumerate(mask) if not computed)
    return Plan(steps=len(mask), regions=(replace(region, reuse=reuse, order=order),))


def sampled(plan, pipeline=None, **arguments):
    pipeline = pipeline or Pipeline()
    with Generation(pipeline, plan) as generation:
        return pipeline(**arguments), pipeline, generation


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_the_interval_s_mask_equals_the_interval_to_the_last_bit(interval, forwards):
    config = DitCacheConfig(cache_block_start=1, cache_num_blocks=4, cache_step_start=3, cache_step_interval=interval)
    mask = [step < 3 or (step - 3) % interval == 0 for step in range(10)]
    expected, _, _ = sampled(of_dit_cache(config), Pipeline(forwards=forwards))
    output, pipeline, generation = sampled(masked(mask), Pipeline(forwards=forwards))
    assert torch.equal(output, expected)
    blocks = forwards * of_dit_cache(config).work(6, 10) * 60
    assert sum(pipeline.block_calls()) == blocks
    # Without a step that reuses nothing is attached, nor counted.
    assert generation.computed_blocks == (blocks if interval > 1 else 0)


def forecast_written_out(mask, **arguments):
    """The same generation by a loop of its own: delta = newest + (step - newest's step) * slope."""
    pipeline = Pipeline()
    history, step = [], -1

    def forward(hidden_states, timestep=None):
        nonlocal step
        step += 1
        for index, block in enumerate(pipeline.transformer.transformer_blocks):
            if index == REGION.start:
                entered = hidden_states
                if not mask[step]:
                    (newest, at), (older, before) = history[-1], history[-2] if len(history) > 1 else (None, None)
                    slope = 0 if older is None else (newest - older) / (at - before)
                    hidden_states = hidden_states + newest + (step - at) * slope
            if mask[step] or not REGION.start <= index < REGION.stop:
                hidden_states = Block.forward(block, hidden_states, timestep=timestep)
            if index == REGION.stop - 1 and mask[step]:
                history.append((hidden_states - entered, step))
        return hidden_states

    pipeline.transformer.forward = forward
    return pipeline(**arguments)


@pytest.mark.parametrize("mask", ["1101010101", "1010010001", "1110010111", "1000000000", "1111111111"])
def test_forecast_is_the_line_through_the_two_newest_deltas(mask):
    mask = [step == "1" for step in mask]
    output, pipeline, generation = sampled(masked(mask, order=1))
    expected = forecast_written_out(mask)
    assert torch.allclose(output, expected, atol=1e-4 * expected.abs().max())
    blocks = 2 * 10 + 4 * sum(mask)
    assert sum(pipeline.block_calls()) == blocks
    assert generation.computed_blocks == (0 if all(mask) else blocks)


@pytest.mark.parametrize("forecast", [False, True])
def test_no_more_deltas_are_kept_than_needed(forecast):
    kept = []
    plan = masked([True, True, True, False, False, True, False, True, True, False], int(forecast))
    pipeline = Pipeline()
    with Generation(pipeline, plan) as generation:
        lanes = generation.cache.regions[0].lanes
        pipeline(callback=lambda *_: kept.append(max((len(lane.deltas) for lane in lanes.values()), default=0)))
    assert kept == ([0, 1, 2, 2, 2, 2, 2, 2, 2, 2] if forecast else [0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    assert not lanes


def test_a_plan_belongs_to_its_number_of_steps():
    with pytest.raises(SettingsError, match="mine.json: the plan is for 5 steps, but this generation takes 6"):
        pipeline = Pipeline()
        with Generation(pipeline, masked([True, False, True, True, True]), source="mine.json"):
            pipeline(num_inference_steps=6)
    assert pipeline.block_calls() == [0] * 6
    with pytest.raises(ValueError, match="the first step, 0, must be computed in full"):
        masked([False, True])
