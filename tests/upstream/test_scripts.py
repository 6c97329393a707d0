# SPDX-License-Identifier: Apache-2.0
"""osaccel on the unmodified v1.2.0 sample scripts: off is bit-identical, on computes exactly what the formula says."""

import json
import os
import sys

import imageio
import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LAUNCHER = ("python", "-m", "osaccel.run")
STEPS = 8
CACHE = {"cache_block_start": 1, "cache_num_blocks": 4, "cache_step_start": 2, "cache_step_interval": 2}
# Steps 2, 4, 6 store and 3, 5, 7 reuse; two prompts.
CACHED_CALLS = [2 * 8] + [2 * 5] * 4 + [2 * 8]
TIMESTEPS = [0.0, 0.0712, 0.2, 0.45, 0.8, 0.999]
SAMPLERS = [
    "DDIM", "EulerDiscrete", "DDPM", "DPMSolverMultistep", "DPMSolverSinglestep", "PNDM", "HeunDiscrete",
    "EulerAncestralDiscrete", "DEISMultistep", "KDPM2AncestralDiscrete",
]  # fmt: skip


@pytest.fixture(scope="session")
def cache_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "dit_cache_config.json"
    path.write_text(json.dumps(CACHE))
    return str(path)


@pytest.fixture(scope="session")
def timesteps_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("timesteps") / "searched_schedule.txt"
    path.write_text(json.dumps(TIMESTEPS))
    return str(path)


def succeeded(result, script):
    assert script == "sample_t2v_sp" or result.status == 0, result.log[-3000:]
    assert len(result.videos) == 2, result.log[-3000:]
    return result


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_active_without_a_setting_and_disabled_are_bit_identical(upstream, script, cache_file):
    plain = succeeded(upstream.run(script), script)
    active = succeeded(upstream.run(script, prefix=LAUNCHER), script)
    disabled = succeeded(upstream.run(script, prefix=(*LAUNCHER, "--disable"), OSACCEL_CACHE_CONFIG=cache_file), script)
    assert plain.videos == active.videos == disabled.videos
    assert plain.calls == active.calls == disabled.calls
    assert not active.summaries and not disabled.summaries


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_cache_computes_what_the_formula_says_on_every_rank(upstream, script, cache_file):
    cached = succeeded(upstream.run(script, prefix=LAUNCHER, OSACCEL_CACHE_CONFIG=cache_file), script)
    assert cached.calls == dict.fromkeys(upstream.ranks_of(script), CACHED_CALLS)
    assert len(cached.summaries) == 2
    assert "8 steps (default timesteps), 36 of 48 blocks computed, ideal speed-up 1.333x" in cached.summaries[0]
    assert cached.videos != upstream.run(script).videos


def test_every_way_to_activate_gives_the_same_video(upstream, cache_file):
    launched = upstream.run(prefix=LAUNCHER, OSACCEL_CACHE_CONFIG=cache_file)
    example = os.path.join(ROOT, "sitecustomize_example", "sitecustomize.py")
    with open(example) as file:
        sitecustomize = file.read()
    by_example = succeeded(upstream.run(sitecustomize=sitecustomize, OSACCEL_CACHE_CONFIG=cache_file), "sample_t2v")
    assert by_example.videos == launched.videos and by_example.calls == launched.calls
    auto = (sys.executable, "-c", AUTO)
    by_import = succeeded(upstream.run(prefix=auto, OSACCEL_CACHE_CONFIG=cache_file), "sample_t2v")
    assert by_import.videos == launched.videos and by_import.calls == launched.calls


# `python -c AUTO python -m module options` runs the module in a process that has imported osaccel.auto.
AUTO = "import runpy, sys, osaccel.auto; sys.argv = sys.argv[3:]; runpy.run_module(sys.argv[0], run_name='__main__')"


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_timesteps_and_both_together(upstream, script, cache_file, timesteps_file):
    searched = succeeded(upstream.run(script, prefix=LAUNCHER, OSACCEL_TIMESTEPS=timesteps_file), script)
    assert all(calls == [2 * 6] * 6 for calls in searched.calls.values())
    assert "6 steps (searched timesteps), no block cached" in searched.summaries[0]
    assert "6/6" in searched.log and "/8 [" not in searched.log
    both = succeeded(
        upstream.run(script, prefix=LAUNCHER, OSACCEL_TIMESTEPS=timesteps_file, OSACCEL_CACHE_CONFIG=cache_file), script
    )
    assert all(calls == [12] + [2 * 4] * 4 + [12] for calls in both.calls.values())


@pytest.mark.parametrize("method", SAMPLERS)
def test_every_sampler_follows_the_list(upstream, method, timesteps_file):
    result = succeeded(upstream.run(prefix=LAUNCHER, method=method, OSACCEL_TIMESTEPS=timesteps_file), "sample_t2v")
    assert "(searched timesteps)" in result.summaries[0]
    assert "6/6" in result.log


def test_image_mode(upstream, cache_file):
    result = upstream.run(prefix=LAUNCHER, frames=1, OSACCEL_CACHE_CONFIG=cache_file)
    assert result.calls == {"0": CACHED_CALLS}, result.log[-3000:]


def frames_of(video):
    return np.stack(list(imageio.v3.imiter(video, plugin="FFMPEG", extension=".mp4"))).astype(float)


def test_compiled_transformer_under_two_ranks(upstream, cache_file):
    cached = upstream.run("sample_t2v_sp", prefix=LAUNCHER, OSACCEL_CACHE_CONFIG=cache_file)
    compiled = upstream.run("sample_t2v_sp", prefix=LAUNCHER, extra=("--compile",), OSACCEL_CACHE_CONFIG=cache_file)
    succeeded(compiled, "sample_t2v_sp")
    assert "36 of 48 blocks computed" in compiled.summaries[0]
    for name, video in cached.videos.items():
        # bf16 kernels that are fused round differently; the videos themselves are noise of random weights.
        assert np.abs(frames_of(video) - frames_of(compiled.videos[name])).mean() < 12
