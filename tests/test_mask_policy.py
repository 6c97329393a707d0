# SPDX-License-Identifier: Apache-2.0
"""Step masks with reuse or first-order forecast, through the same executor as the four-key rule."""

import pytest
import torch
from tiny import Block, Pipeline

from osaccel.dit_cache_config import DitCacheConfig
from osaccel.generation import Generation
from osaccel.network.policy import IntervalPolicy, MaskPolicy, Region, computed_blocks

REGION = Region(1, 5)


def sampled(policy, pipeline=None, **arguments):
    pipeline = pipeline or Pipeline()
    with Generation(pipeline, policy=policy) as generation:
        return pipeline(**arguments), pipeline, generation


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_the_interval_s_mask_equals_the_interval_to_the_last_bit(interval, forwards):
    config = DitCacheConfig(cache_block_start=1, cache_num_blocks=4, cache_step_start=3, cache_step_interval=interval)
    mask = [step < 3 or (step - 3) % interval == 0 for step in range(10)]
    expected, _, _ = sampled(IntervalPolicy(config), Pipeline(forwards=forwards))
    output, pipeline, generation = sampled(MaskPolicy(REGION, mask), Pipeline(forwards=forwards))
    assert torch.equal(output, expected)
    blocks = forwards * computed_blocks(IntervalPolicy(config), 6, 10)
    assert sum(pipeline.block_calls()) == blocks == generation.cache.computed_blocks


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
    output, pipeline, generation = sampled(MaskPolicy(REGION, mask, forecast=True))
    expected = forecast_written_out(mask)
    assert torch.allclose(output, expected, atol=1e-4 * expected.abs().max())
    assert sum(pipeline.block_calls()) == 2 * 10 + 4 * sum(mask) == generation.cache.computed_blocks


@pytest.mark.parametrize("forecast", [False, True])
def test_no_more_deltas_are_kept_than_needed(forecast):
    kept = []
    policy = MaskPolicy(REGION, [True, True, True, False, False, True, False, True, True, False], forecast)
    pipeline = Pipeline()
    with Generation(pipeline, policy=policy) as generation:
        lanes = generation.cache.regions[0].lanes
        pipeline(callback=lambda *_: kept.append(max((len(lane.deltas) for lane in lanes.values()), default=0)))
    assert kept == ([0, 1, 2, 2, 2, 2, 2, 2, 2, 2] if forecast else [0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    assert not lanes


def test_a_mask_belongs_to_its_number_of_steps():
    with pytest.raises(ValueError, match="The mask has 5 steps, but the generation takes more"):
        sampled(MaskPolicy(REGION, [True] * 5), num_inference_steps=6)
    for mask in ([], [False, True]):
        with pytest.raises(ValueError, match="first step must be computed"):
            MaskPolicy(REGION, mask)


def test_plans_depend_on_the_step_alone():
    """So ranks that hold the same mask decide alike, in whatever order they ask."""
    mask = [True, True, False, True, False, False]
    one, other = (MaskPolicy(REGION, mask, forecast=True) for _ in range(2))
    assert [one.plan(0, step) for step in range(6)] == [other.plan(0, step) for step in reversed(range(6))][::-1]
