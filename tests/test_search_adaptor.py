# SPDX-License-Identifier: Apache-2.0
"""`DitCacheAdaptor.search` and the report page: msModelSlim's contract, and a page that carries its pictures."""

import json

import numpy as np
import pytest
import tiny

from osaccel.adaptors import DitCacheAdaptor, DitCacheSearchConfig
from osaccel.report import page as report


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


def test_the_report_page_is_self_contained(tmp_path, capsys):
    chosen = {"cache_step_start": 1, "cache_step_interval": 2, "cache_block_start": 0, "cache_num_blocks": 2}
    content = {
        "chosen": chosen, "speed_up": 1.4, "error": 0.1, "cost": {"plain_generations": 3.0},
        "evaluations": [{"error": 0.1, "predicted_speed_up": 1.4}, {"error": None, "predicted_speed_up": 1.5}],
        "fingerprint": {"blocks": 3, "steps": 4, "sampler": "DDIM"}, "delta_change": [[1.0] * 3] * 4,
    }  # fmt: skip
    path = tmp_path / "found.json"
    (tmp_path / "found.json.report.json").write_text(json.dumps(content))
    np.savez(str(path) + ".report.npz", plain=np.zeros((2, 8, 8, 3), np.uint8), cached=np.ones((2, 8, 8, 3), np.uint8))
    assert report.main([str(path)]) == 0
    page = (tmp_path / "found.json.report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "src='http" not in page
    assert report.compute_map(report.load(str(path))).tolist() == [[1, 1, 0, 1]] * 2 + [[1, 1, 1, 1]]
    assert report.main([str(tmp_path / "missing.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
