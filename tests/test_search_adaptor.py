# SPDX-License-Identifier: Apache-2.0
"""`DitCacheAdaptor.search`: msModelSlim's contract."""

import pytest
import tiny

from osaccel.adaptors import DitCacheAdaptor, DitCacheSearchConfig


def make(ratio=1.3):
    pipeline = tiny.Pipeline()
    return pipeline, DitCacheAdaptor(pipeline, DitCacheSearchConfig(cache_ratio=ratio, num_sampling_steps=10))


def videos_of(pipeline, calls, count=2):
    calls.append(1)
    return [pipeline(num_inference_steps=10, seed=seed).numpy().reshape(1, 5, 8, 1) for seed in range(count)]


def test_search_finds_a_config_that_reaches_the_ratio_and_activates_it():
    pipeline, adaptor = make()
    calls = []
    config = adaptor.search(lambda given: videos_of(given, calls), prompts_num=2)
    assert adaptor.dit_cache_config == config
    assert 1 < len(calls) <= 6
    before = sum(pipeline.block_calls())
    pipeline(num_inference_steps=10)
    assert 60 / (sum(pipeline.block_calls()) - before) >= 1.3


def test_search_refuses_what_msmodelslim_refuses():
    _, adaptor = make()
    with pytest.raises(ValueError, match="length equal to prompts_num: 1!=2"):
        adaptor.search(lambda given: videos_of(given, [], 1), prompts_num=2)
    with pytest.raises(ValueError, match="must be callable"):
        adaptor.search(None)
    with pytest.raises(ValueError, match="must be a positive integer"):
        adaptor.search(lambda given: [], prompts_num=0)
    with pytest.raises(ValueError, match="search_config must be set"):
        DitCacheAdaptor(tiny.Pipeline()).search(lambda given: [])
