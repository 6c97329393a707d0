# SPDX-License-Identifier: Apache-2.0
"""msModelSlim's Python API: its interface as its users know it, and each of its known defects gone."""

import gc
import weakref

import pytest
import torch
from tiny import Pipeline, reference_loop
from torch import nn

from osaccel.adaptors import DitCacheAdaptor, DitCacheConfig, DitCacheSearchConfig

CONFIG = {"cache_block_start": 1, "cache_num_blocks": 3, "cache_step_start": 2, "cache_step_interval": 2}


@pytest.fixture(autouse=True)
def never_set(monkeypatch):
    monkeypatch.setattr(DitCacheAdaptor, "_timestep_idx", None)


class AddIndex(nn.Module):
    """A block whose output tells which blocks ran at which step."""

    def __init__(self, index):
        super().__init__()
        self.index, self.t = index, -1

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + torch.tensor([self.t, self.index])


class AddIndexDual(AddIndex):
    def forward(self, hidden_states, encoder_hidden_states, *args, **kwargs):
        ids = torch.tensor([self.t, self.index])
        return hidden_states + ids, encoder_hidden_states + 10 * ids


class BarePipeline:
    """No scheduler: steps are known only from set_timestep_idx."""

    def __init__(self, block=AddIndex, num_blocks=5):
        self.transformer = nn.Module()
        self.transformer.transformer_blocks = nn.ModuleList([block(index) for index in range(num_blocks)])

    def run_step(self, t, *hidden, by_keyword=False):
        for block in self.transformer.transformer_blocks:
            block.t = t
            if by_keyword:
                names = ("hidden_states", "encoder_hidden_states")
                output = block(**dict(zip(names, hidden)), frame=1)
            else:
                output = block.forward(*hidden, frame=1)
            hidden = output if isinstance(output, tuple) else (output,)
        return hidden if len(hidden) > 1 else hidden[0]


def zero():
    return torch.zeros(2)


@pytest.mark.parametrize("name", list(CONFIG))
@pytest.mark.parametrize("value", [-1, 1.0, "1", None, True])
def test_config_values(name, value):
    kind = "positive" if name == "cache_step_interval" else "non-negative"
    with pytest.raises(ValueError, match=f"{name} must be a {kind} integer"):
        DitCacheConfig(**dict(CONFIG, **{name: value}))


def test_config_is_iterable_as_pairs():
    assert dict(DitCacheConfig(**CONFIG)) == CONFIG == DitCacheConfig(**CONFIG).to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_ratio": 2.5, "num_sampling_steps": 100}, r"cache_ratio should be in the range of \(1.0, 2.0\]"),
        ({"cache_ratio": 1.0, "num_sampling_steps": 100}, r"cache_ratio should be in the range of \(1.0, 2.0\]"),
        ({"cache_ratio": "1.3", "num_sampling_steps": 100}, "cache_ratio must be a number"),
        ({}, "num_sampling_steps must be set to search"),
        ({"num_sampling_steps": "100"}, "num_sampling_steps must be an integer"),
        ({"num_sampling_steps": -10}, "num_sampling_steps must be positive"),
        ({"dit_block_num": 0, "num_sampling_steps": 9}, "dit_block_num must be positive"),
        ({"dit_block_num": "10", "num_sampling_steps": 9}, "dit_block_num must be an integer"),
        ({"num_hidden_states": 0, "num_sampling_steps": 9}, "num_hidden_states must be positive"),
        ({"cache_step_interval": 1, "num_sampling_steps": 9}, "cache_step_interval for searching must be larger"),
    ],
)
def test_search_config_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        DitCacheSearchConfig(**arguments)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "dit_block_path must be a non-empty string"),
        (None, "dit_block_path must be a non-empty string"),
        ("transformer..blocks", "Invalid dit_block_path format"),
        ("transformer.invalid_blocks", "Failed to access 'transformer.invalid_blocks'"),
        ("transformer", "must be type nn.ModuleList"),
    ],
)
def test_block_paths(path, message):
    with pytest.raises(ValueError, match=message):
        DitCacheAdaptor(BarePipeline(), dit_block_path=path)


def test_get_and_check_blocks():
    pipeline = BarePipeline()
    assert len(DitCacheAdaptor.get_and_check_blocks(pipeline, "transformer.transformer_blocks")) == 5
    with pytest.raises(ValueError, match="Failed to access 'transformer.nothing'"):
        DitCacheAdaptor.get_and_check_blocks(pipeline, "transformer.nothing")
    with pytest.raises(TypeError, match="must be type nn.ModuleList"):
        DitCacheAdaptor.get_and_check_blocks(pipeline, "transformer")
    pipeline.transformer.transformer_blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="is empty"):
        DitCacheAdaptor.get_and_check_blocks(pipeline, "transformer.transformer_blocks")


def test_wrong_configs():
    with pytest.raises(ValueError, match="config must be DitCacheSearchConfig"):
        DitCacheAdaptor(BarePipeline(), DitCacheConfig(**CONFIG))
    with pytest.raises(ValueError, match="dit_block_num not equal"):
        DitCacheAdaptor(BarePipeline(), DitCacheSearchConfig(dit_block_num=4, num_sampling_steps=9))


def test_timestep_idx_on_instance_and_class():
    adaptor = DitCacheAdaptor(BarePipeline())
    with pytest.raises(ValueError, match="Please call DitCacheAdaptor.set_timestep_idx"):
        adaptor.get_timestep_idx()
    adaptor.set_timestep_idx(5)
    assert adaptor.get_timestep_idx() == 5
    DitCacheAdaptor.set_timestep_idx(7)
    assert adaptor.get_timestep_idx() == 7
    for wrong in (-1, 1.0, "1", True):
        with pytest.raises(ValueError, match="t_idx must be non-negative integer"):
            adaptor.set_timestep_idx(wrong)


def test_block_forward_called_directly_follows_the_rule():
    pipeline = BarePipeline()
    adaptor = DitCacheAdaptor(pipeline, DitCacheSearchConfig(num_sampling_steps=5))
    adaptor.dit_cache_config = DitCacheConfig(
        cache_step_start=1, cache_step_interval=3, cache_block_start=1, cache_num_blocks=3
    )
    outputs = []
    for t in range(5):
        for block in pipeline.transformer.transformer_blocks:
            DitCacheAdaptor.set_timestep_idx(t)
            assert block.forward is not None
        outputs.append(pipeline.run_step(t, zero()).tolist())
    # Blocks 1 to 3 keep step 1's delta at steps 2 and 3; blocks 0 and 4 always run.
    assert outputs == [[0.0, 10.0], [5.0, 10.0], [2 * 2 + 3 * 1.0, 10.0], [2 * 3 + 3 * 1.0, 10.0], [20.0, 10.0]]


@pytest.mark.parametrize("by_keyword", [False, True])
def test_two_hidden_states_by_position_and_by_keyword(by_keyword):
    pipeline = BarePipeline(AddIndexDual)
    adaptor = DitCacheAdaptor(pipeline, DitCacheSearchConfig(num_sampling_steps=5, num_hidden_states=2))
    adaptor.update_cache_config(cache_block_start=0, cache_num_blocks=5, cache_step_start=0, cache_step_interval=2)
    adaptor.set_timestep_idx(0)
    for t in range(2):
        hidden, encoder = pipeline.run_step(t, zero(), zero(), by_keyword=by_keyword)
        # Step 1 reuses step 0's deltas, so block.t does not show.
        assert hidden.tolist() == [0.0, 10.0] and encoder.tolist() == [0.0, 100.0]


def test_one_block_can_be_cached():
    pipeline = BarePipeline()
    adaptor = DitCacheAdaptor(pipeline)
    adaptor.update_cache_config(cache_block_start=2, cache_num_blocks=1, cache_step_start=0, cache_step_interval=2)
    adaptor.set_timestep_idx(0)
    assert pipeline.run_step(1, zero()).tolist() == [5.0, 10.0]
    assert pipeline.run_step(3, zero()).tolist() == [4 * 3 + 1.0, 10.0]


def test_without_a_config_blocks_run_as_they_are():
    pipeline = Pipeline()
    DitCacheAdaptor(pipeline)
    assert torch.equal(pipeline(), Pipeline()())


def test_a_region_past_the_last_block_says_so():
    adaptor = DitCacheAdaptor(BarePipeline())
    with pytest.raises(ValueError, match="= 6 reaches past the last of the 5 transformer blocks"):
        adaptor.update_cache_config(cache_block_start=3, cache_num_blocks=3, cache_step_start=0, cache_step_interval=2)


def test_jumping_into_a_reuse_step_says_so():
    pipeline = BarePipeline()
    adaptor = DitCacheAdaptor(pipeline)
    adaptor.update_cache_config(**CONFIG)
    adaptor.set_timestep_idx(3)
    with pytest.raises(ValueError, match="Step 3 is to reuse the cached delta of blocks 1 to 3"):
        pipeline.run_step(3, zero())


@pytest.mark.parametrize("explicit", [False, True])
def test_later_generations_equal_the_first(explicit):
    """msModelSlim: with set_timestep_idx at every step, generation 2 skips warm-up and reuses generation 1's delta."""
    expected = reference_loop(Pipeline(), CONFIG)
    pipeline = Pipeline()
    adaptor = DitCacheAdaptor(pipeline, DitCacheSearchConfig(num_sampling_steps=10))
    adaptor.update_cache_config(**CONFIG)
    callback = (lambda i, *_: i < 9 and adaptor.set_timestep_idx(i + 1)) if explicit else None
    if explicit:
        adaptor.set_timestep_idx(0)
    for _ in range(3):
        assert torch.equal(pipeline(callback=callback), expected)


def test_an_aborted_or_shorter_generation_shifts_nothing():
    expected = reference_loop(Pipeline(), CONFIG)
    pipeline = Pipeline()
    adaptor = DitCacheAdaptor(pipeline, DitCacheSearchConfig(num_sampling_steps=10))
    adaptor.update_cache_config(**CONFIG)

    def fail(i, *_):
        if i == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(callback=fail)
    pipeline(num_inference_steps=1)
    pipeline(num_inference_steps=4)
    assert torch.equal(pipeline(), expected)


def test_a_second_adaptor_takes_over_and_the_first_one_is_detached(caplog):
    caplog.set_level("INFO", "osaccel")
    other = dict(CONFIG, cache_block_start=2, cache_num_blocks=1)
    pipeline = Pipeline()
    first = DitCacheAdaptor(pipeline)
    first.update_cache_config(**CONFIG)
    second = DitCacheAdaptor(pipeline, DitCacheSearchConfig(num_sampling_steps=10))
    assert first.dit_cache_config is None and "takes over" in caplog.text
    assert torch.equal(pipeline(), Pipeline()())
    second.update_cache_config(**other)
    assert torch.equal(pipeline(), reference_loop(Pipeline(), other))
    first.update_cache_config(**CONFIG)
    assert second.dit_cache_config is None
    assert torch.equal(pipeline(), reference_loop(Pipeline(), CONFIG))
    first.detach()
    assert "step" not in vars(pipeline.scheduler) and first.blocks[0] not in DitCacheAdaptor._attached


def test_deltas_die_with_the_generation():
    pipeline = Pipeline()
    adaptor = DitCacheAdaptor(pipeline)
    adaptor.update_cache_config(**CONFIG)
    alive = []

    def watch(i, *_):
        lanes = adaptor._cache.regions[0].lanes.values()
        alive.extend(weakref.ref(x) for lane in lanes for _, delta in lane.deltas for x in delta)

    pipeline(callback=watch)
    gc.collect()
    assert alive and all(reference() is None for reference in alive)


def test_none_and_detach_stop_caching():
    pipeline = Pipeline()
    adaptor = DitCacheAdaptor(pipeline)
    adaptor.update_cache_config(**CONFIG)
    adaptor.dit_cache_config = None
    assert torch.equal(pipeline(), Pipeline()())
    assert "step" not in vars(pipeline.scheduler)


def test_an_exchanged_scheduler_is_followed():
    from diffusers import DDIMScheduler

    expected = reference_loop(Pipeline(scheduler=DDIMScheduler(clip_sample=False)), CONFIG)
    pipeline = Pipeline()
    adaptor = DitCacheAdaptor(pipeline)
    adaptor.update_cache_config(**CONFIG)
    pipeline()
    pipeline.scheduler = DDIMScheduler(clip_sample=False)
    assert torch.equal(pipeline(), expected)
    assert torch.equal(pipeline(), expected)


def test_two_pipelines_do_not_share_steps():
    expected = reference_loop(Pipeline(), CONFIG)
    first, second = Pipeline(), Pipeline()
    for pipeline in (first, second):
        DitCacheAdaptor(pipeline).update_cache_config(**CONFIG)
    inner = []
    outer = first(callback=lambda i, *_: inner.append(second()) if i == 4 else None)
    assert torch.equal(outer, expected) and torch.equal(inner[0], expected)
