# SPDX-License-Identifier: Apache-2.0
"""The timestep search in the unmodified v1.2.0 scripts: search, then sample with the list; one rank and two."""

import json

import pytest

LAUNCHER = ("python", "-m", "osaccel.run")


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_search_then_sample(upstream, script, tmp_path):
    path = tmp_path / "searched_schedule.txt"
    searched = upstream.run(
        script, prefix=LAUNCHER, OSACCEL_SEARCH="restep", OSACCEL_TARGET_STEPS="5,4", OSACCEL_TIMESTEPS=str(path)
    )
    assert searched.status == 0, searched.log[-3000:]
    # One recorded prompt of 8 steps, every block once per step: nothing was computed for the search.
    ranks = upstream.ranks_of(script)
    assert {rank: set(calls) for rank, calls in searched.calls.items()} == {rank: {8} for rank in ranks}
    values = json.loads(path.read_text())
    assert len(values) == 5 and values == sorted(values) and 0 <= values[0] and values[-1] <= 1
    assert len(json.loads((tmp_path / "searched_schedule.4.txt").read_text())) == 4
    report = json.loads((tmp_path / "searched_schedule.txt.report.json").read_text())
    assert report["kind"] == "restep" and report["forwards"]["extra"] == 0
    sampled = upstream.run(script, prefix=LAUNCHER, OSACCEL_TIMESTEPS=str(path))
    assert len(sampled.videos) == 2, sampled.log[-3000:]
    # Both ranks ran the same list: they would wait for each other forever otherwise.
    assert {rank: calls[0] for rank, calls in sampled.calls.items() if rank in ranks}.keys() == set(ranks)
    assert "5 steps (searched timesteps)" in sampled.summaries[0]


def test_all_binds_both_files(upstream, tmp_path):
    timesteps, cache = tmp_path / "searched_schedule.txt", tmp_path / "dit_cache_config.json"
    result = upstream.run(
        prefix=LAUNCHER, OSACCEL_SEARCH="all", OSACCEL_TARGET_STEPS="6", OSACCEL_CACHE_RATIO="1.1",
        OSACCEL_TIMESTEPS=str(timesteps), OSACCEL_CACHE_CONFIG=str(cache),
    )  # fmt: skip
    assert result.status == 0, result.log[-3000:]
    reports = [json.loads((path.parent / (path.name + ".report.json")).read_text()) for path in (timesteps, cache)]
    first, second = (report["fingerprint"] for report in reports)
    assert first["timesteps"] == second["timesteps"] and first["steps"] == second["steps"] == 6
