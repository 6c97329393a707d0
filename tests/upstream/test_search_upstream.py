# SPDX-License-Identifier: Apache-2.0
"""The cache search in the unmodified v1.2.0 scripts, one rank and two: search, then sample with what was found."""

import json

import pytest

LAUNCHER = ("python", "-m", "osaccel.run")


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_search_then_sample(upstream, script, tmp_path):
    config = tmp_path / "dit_cache_config.json"
    searched = upstream.run(script, prefix=LAUNCHER, OSACCEL_SEARCH="1", OSACCEL_CACHE_CONFIG=str(config))
    assert searched.status == 0, searched.log[-3000:]
    assert not searched.videos, "the search ends the script before it saves"
    report = json.loads((tmp_path / "dit_cache_config.json.report.json").read_text())
    assert report["chosen"] == json.loads(config.read_text())
    assert report["speed_up"] >= 1.3 and report["cost"]["plain_generations"] <= 6
    sampled = upstream.run(script, prefix=LAUNCHER, OSACCEL_CACHE_CONFIG=str(config))
    assert len(sampled.summaries) >= 1 and "when it was searched" not in sampled.log
