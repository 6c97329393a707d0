# SPDX-License-Identifier: Apache-2.0
"""The DiT cache against a reference loop written out beside it, and what a generation leaves behind: nothing."""

import copy
import gc
import io
import itertools
import pickle
import weakref

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from tiny import Block, Pipeline, needs_compile, needs_pickling, reference_loop

from osaccel.dit_cache_config import CACHE_KEYS, DitCacheConfig
from osaccel.generation import Generation, UnsupportedPipeline
from osaccel.plan import of_dit_cache


def config_of(start, blocks, step_start, interval):
    return DitCacheConfig(**dict(zip(CACHE_KEYS, (start, blocks, step_start, interval))))


def accelerated(pipeline, config, **arguments):
    with Generation(pipeline, of_dit_cache(config)) as generation:
        output = pipeline(**arguments)
    return output, generation


GRID = [
    values
    for values in itertools.product((0, 1, 3, 5), (0, 1, 2, 6), (0, 3, 50), (1, 2, 3, 20))
    if values[0] + values[1] <= 6
]


@pytest.mark.parametrize("values", GRID, ids=str)
def test_equals_the_documented_rule_to_the_last_bit(values):
    config = config_of(*values)
    expected = reference_loop(Pipeline(), dict(config))
    pipeline = Pipeline()
    output, generation = accelerated(pipeline, config)
    assert torch.equal(output, expected)
    assert sum(pipeline.block_calls()) == generation.plan.work(6, 10) * 60


def test_block_calls_are_the_formula_s():
    pipeline = Pipeline(num_blocks=32)
    _, generation = accelerated(pipeline, config_of(10, 15, 4, 3), num_inference_steps=20)
    # Steps 4, 7, 10, 13, 16, 19 store; the other 10 of the 16 steps from 4 on reuse.
    assert pipeline.block_calls() == [20] * 10 + [10] * 15 + [20] * 7
    assert (generation.computed_blocks, generation.total_blocks) == (32 * 20 - 15 * 10, 32 * 20)
    assert "490 of 640 blocks computed, ideal speed-up 1.306x" in generation.summary()


def multiplies_half():
    try:
        torch.ones(2, 2).half() @ torch.ones(2, 2).half()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_first": True},
        {"forwards": 2},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"dtype": torch.float64},
        {"scheduler": HeunDiscreteScheduler},
    ],
    ids=str,
)
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_every_way_a_pipeline_runs_its_blocks(options, guidance_scale):
    if "scheduler" in options:
        options = {"scheduler": options["scheduler"]()}
    config = config_of(2, 3, 2, 2)
    # Half precision overflows where these untrained blocks are guided strongly.
    is_half = options.get("dtype") == torch.float16
    if is_half and not multiplies_half():
        pytest.skip("this torch has no half-precision products on a CPU")
    call = {"guidance_scale": min(guidance_scale, 1.5) if is_half else guidance_scale, "batch": 2}
    expected = reference_loop(Pipeline(**copy.deepcopy(options)), dict(config), **call)
    output, _ = accelerated(Pipeline(**options), config, **call)
    assert torch.isfinite(output).all() and torch.equal(output, expected)


def test_two_forwards_a_step_keep_two_deltas():
    pipeline = Pipeline(forwards=2)
    seen = []
    with Generation(pipeline, of_dit_cache(config_of(0, 6, 0, 2))) as generation:
        pipeline(callback=lambda *_: seen.append(len(generation.cache.regions[0].lanes)))
    assert set(seen) == {2}


def test_second_generation_starts_anew():
    config = config_of(1, 4, 3, 2)
    pipeline = Pipeline()
    first, _ = accelerated(pipeline, config, num_inference_steps=10)
    accelerated(pipeline, config, num_inference_steps=7, seed=9)
    again, _ = accelerated(pipeline, config, num_inference_steps=10)
    assert torch.equal(first, again)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_aborted_generation_leaves_nothing_behind(error):
    pipeline, untouched = Pipeline(), Pipeline()
    before = [dict(module.__dict__) for module in pipeline.transformer.modules()]
    tensors = []

    def fail(i, t, latents):
        if i == 5:
            raise error("stop")

    generation = Generation(pipeline, of_dit_cache(config_of(1, 4, 0, 4)))
    with pytest.raises(error), generation:
        region = generation.cache.regions[0]
        pipeline(
            callback=lambda i, t, latents: (
                tensors.extend(
                    weakref.ref(x) for lane in region.lanes.values() for _, delta in lane.deltas for x in delta
                ),
                fail(i, t, latents),
            )
        )
    gc.collect()
    assert tensors and not any(reference() is not None for reference in tensors)
    assert [set(module.__dict__) for module in pipeline.transformer.modules()] == [set(names) for names in before]
    assert not {"step", "set_timesteps"} & set(vars(pipeline.scheduler))
    assert torch.equal(pipeline(), untouched())


def test_memory_is_one_delta_per_branch():
    pipeline = Pipeline()
    held = []
    with Generation(pipeline, of_dit_cache(config_of(1, 4, 0, 3))) as generation:

        def count(*_):
            lanes = generation.cache.regions[0].lanes.values()
            held.append(sum(x.numel() for lane in lanes for _, delta in lane.deltas for x in delta))
            assert generation.cache.regions[0]._input is None

        pipeline(callback=count)
    # Guidance runs as one batch of two: the hidden state is (2, 5, 8).
    assert set(held) == {2 * 5 * 8}


def test_a_region_past_the_last_block_is_refused_before_sampling():
    pipeline = Pipeline(num_blocks=6)
    message = "my.json: cache_block_start \\+ cache_num_blocks = 8 reaches past the last of the 6 transformer blocks"
    with pytest.raises(ValueError, match=message):
        Generation(pipeline, of_dit_cache(config_of(4, 4, 0, 2)), source="my.json").open()
    assert pipeline.block_calls() == [0] * 6
    assert "step" not in vars(pipeline.scheduler)


def test_a_changed_shape_within_a_generation_is_an_error():
    pipeline = Pipeline()
    with Generation(pipeline, of_dit_cache(config_of(0, 6, 0, 2))) as generation:
        pipeline.transformer(torch.zeros(2, 5, 8), timestep=torch.tensor(1.0))
        generation.clock.end_step()
        with pytest.raises(
            ValueError, match=r"delta of blocks 0 to 5 has shape \(2, 5, 8\).*now have shape \(3, 5, 8\)"
        ):
            pipeline.transformer(torch.zeros(3, 5, 8), timestep=torch.tensor(1.0))


def test_an_unknown_pipeline_is_told_apart_from_a_wrong_setting():
    pipeline = Pipeline()
    pipeline.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedPipeline, match="transformer_blocks' not found in Linear"):
        Generation(pipeline, of_dit_cache(config_of(0, 1, 0, 2))).open()


def test_attaching_twice_is_refused():
    pipeline = Pipeline()
    plan = of_dit_cache(config_of(0, 2, 0, 2))
    with Generation(pipeline, plan):
        with pytest.raises(RuntimeError, match="in use by another generation"):
            Generation(pipeline, plan).open()
    assert torch.equal(pipeline(), Pipeline()())


def roundtrip(module):
    return pickle.loads(pickle.dumps(module))


def save_and_load(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, *(pytest.param(f, marks=needs_pickling) for f in (roundtrip, save_and_load))],
    ids=lambda f: f.__name__,
)
def test_copies_made_during_a_generation_are_plain_models(duplicate):
    pipeline = Pipeline()
    copies = []
    with Generation(pipeline, of_dit_cache(config_of(1, 4, 0, 2))):
        pipeline(callback=lambda i, *_: copies.append(duplicate(pipeline.transformer)) if i == 5 else None)
        shallow = copy.copy(pipeline.transformer.transformer_blocks[2])
    assert "forward" not in vars(shallow)
    other = Pipeline()
    other.transformer = copies[0]
    assert torch.equal(other(), Pipeline()())


def test_state_dict_is_the_plain_one_during_a_generation():
    pipeline = Pipeline()
    plain = list(pipeline.transformer.state_dict())
    with Generation(pipeline, of_dit_cache(config_of(1, 4, 0, 2))):
        assert list(pipeline.transformer.state_dict()) == plain


@needs_compile
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_transformer_gives_the_cached_result_without_more_graphs_per_step(backend):
    config = config_of(1, 4, 2, 2)
    expected, _ = accelerated(Pipeline(), config, num_inference_steps=12)
    pipeline = Pipeline(block=Block)  # a counter read in a compiled region would recompile it at every call
    compiled = pipeline.transformer = torch.compile(pipeline.transformer, backend=backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for steps in (6, 12, 24):
        output, _ = accelerated(pipeline, config, num_inference_steps=steps)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        if steps == 12:
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    assert pipeline.transformer is compiled
    assert 0 < graphs[0] == graphs[1] == graphs[2]


@needs_compile
def test_a_model_compiled_in_place_is_refused_with_the_way_out():
    pipeline = Pipeline()
    pipeline.transformer.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled in place.*torch.compile"):
        Generation(pipeline, of_dit_cache(config_of(1, 4, 2, 2))).open()
