# SPDX-License-Identifier: Apache-2.0
"""The correction on unmodified upstream v1.2.0: on, off and of strength 0; both scripts, two ranks, half precision."""

import json

import pytest

LAUNCHER = ("python", "-m", "osaccel.run")
BOTH = {"predictor": 1, "corrector": 1}
PER_STEP = {"predictor": [0, 0.5, 1, 0, 1, 1, 0.5, 1], "corrector": [1, 1, 0, 0.5, 1, 0, 1, 1]}
LINE = "generation of 8 steps (default timesteps) begins: corrected (predictor 1, corrector 1)"


@pytest.fixture(scope="module")
def by_hand(upstream):
    def compare(correction, dtype="float32", frames=5, ranks=1):
        return upstream.found("correction_by_hand.py", ranks, dtype, str(frames), json.dumps(correction))

    return compare


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("correction", [BOTH, PER_STEP], ids=["both", "per step"])
def test_a_correction_equals_the_same_worked_out_by_hand(by_hand, correction, ranks):
    results = by_hand(correction, ranks=ranks)
    for found in results:
        assert found["zero"] == found["again"] == 0.0, "bit for bit the plain run"
        assert found["changed"] > 100 * found["off"] and found["off"] < 1e-4 and found["same state"]
    assert len({found["digest"] for found in results}) == 1, "all ranks have the same latents in the end"


@pytest.mark.parametrize("ranks", [1, 2])
def test_half_precision(by_hand, ranks):
    results = by_hand(BOTH, dtype="bfloat16", ranks=ranks)
    for found in results:
        assert found["zero"] == found["again"] == 0.0 and found["same state"]
        assert found["off"] < found["changed"] / 4
    assert len({found["digest"] for found in results}) == 1


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_one_variable_corrects_the_scripts(upstream, script):
    plain = upstream.run(script)
    corrected = upstream.run(script, prefix=LAUNCHER, OSACCEL_CORRECTION="1")
    assert len(corrected.videos) == 2 and corrected.log.count(LINE) == 2, corrected.log[-3000:]
    assert corrected.videos.keys() == plain.videos.keys() and corrected.calls == plain.calls
    assert all(corrected.videos[name] != plain.videos[name] for name in plain.videos)
    for nothing in ("0", "0,0"):
        assert upstream.run(script, prefix=LAUNCHER, OSACCEL_CORRECTION=nothing).videos == plain.videos


@pytest.mark.parametrize("method", ["DDPM", "DDIM", "EulerDiscrete"])
def test_other_samplers_that_can_be_corrected(upstream, method):
    plain, corrected = (upstream.run(method=method, prefix=LAUNCHER, **extra) for extra in (
        {}, {"OSACCEL_CORRECTION": "1"}))  # fmt: skip
    assert corrected.status == 0 and corrected.log.count(LINE) == 2, corrected.log[-3000:]
    assert corrected.calls == plain.calls and corrected.videos != plain.videos


@pytest.mark.parametrize("method", ["HeunDiscrete", "DPMSolverMultistep"])
def test_samplers_of_higher_order_are_refused_before_the_first_forward(upstream, method):
    result = upstream.run(method=method, sitecustomize="import osaccel.auto\n", OSACCEL_CORRECTION="1")
    assert result.status == 1 and not result.calls
    launched = upstream.run(method=method, prefix=LAUNCHER, OSACCEL_CORRECTION="1")
    assert launched.status == 2 and len(launched.log.splitlines()) == 1
    message = launched.log.partition("error: ")[2].strip()
    assert "Scheduler cannot skip or correct steps: it" in message and message in result.log
