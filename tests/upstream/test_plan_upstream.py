# SPDX-License-Identifier: Apache-2.0
"""Plans on unmodified upstream v1.2.0: every action equals the same worked out by hand; both scripts; ranks agree."""

import json

import pytest

LAUNCHER = ("python", "-m", "osaccel.run")
FORMAT = {"format": "osaccel.plan/1", "steps": 8}
PLANS = {
    "skip": {**FORMAT, "skip": [2, 4, 5]},
    "corrected": {**FORMAT, "skip": [2, 4, 5], "correction": {"corrector": 1, "response": 1}},
    "corrected, both": {**FORMAT, "skip": [2, 5], "conditional_only": [3],
                        "correction": {"corrector": 1, "response": 1}},
    "conditional only": {**FORMAT, "conditional_only": [2, 3, 5, 7]},
    "regions": {**FORMAT, "regions": [{"start": 1, "stop": 3, "reuse": [2, 4, 6]},
                                      {"start": 3, "stop": 6, "reuse": [3, 5, 6], "order": 1}]},
    "everything": {**FORMAT, "skip": [3], "conditional_only": [2, 5, 6],
                   "regions": [{"start": 1, "stop": 5, "reuse": [4, 6], "order": 1}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def by_hand(upstream):
    def compare(plan, dtype="float32", frames=5, ranks=1):
        return upstream.found("plan_by_hand.py", ranks, dtype, str(frames), json.dumps(plan))

    return compare


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_action_equals_the_same_worked_out_by_hand(by_hand, name, ranks):
    for found in by_hand(PLANS[name], ranks=ranks):
        assert found["empty"] == found["again"] == 0.0, "bit for bit the plain run"
        assert found["changed"] > 100 * found["off"] and found["off"] < 1e-4
        assert found["work"] == pytest.approx(found["by hand"])


@pytest.mark.parametrize("name", ["everything", "corrected"])
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"frames": 1}, {"dtype": "bfloat16", "ranks": 2}], ids=str)
def test_half_precision_and_image_mode(by_hand, name, options):
    for found in by_hand(PLANS[name], **options):
        assert found["empty"] == found["again"] == 0.0
        # bfloat16 kernels round one branch differently from both, and guidance multiplies that.
        assert found["off"] < (0.7 * found["changed"] if "dtype" in options else 1e-4)
        assert found["work"] == pytest.approx(found["by hand"])


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_the_scripts_follow_a_plan_file(upstream, script, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(json.dumps(PLANS["everything"]))
    result = upstream.run(script, prefix=(*LAUNCHER, "--plan", str(path)))
    assert len(result.videos) == 2 and (script == "sample_t2v_sp" or result.status == 0), result.log[-3000:]
    ranks = upstream.ranks_of(script)
    # Two prompts: 7 of 8 steps call the network, blocks 1 to 4 reuse at two of them.
    assert result.calls == dict.fromkeys(ranks, [14] + [10] * 4 + [14])
    assert result.log.count("generation of 8 steps (default timesteps) begins: 1 step skipped, 3 conditional only") == 2
    assert "network work 56.2 %" in result.summaries[0]


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_four_keys_and_their_plan_make_the_same_video(upstream, script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    keys = {"cache_block_start": 1, "cache_num_blocks": 4, "cache_step_start": 2, "cache_step_interval": 2}
    (folder / "keys.json").write_text(json.dumps(keys))
    (folder / "plan.json").write_text(json.dumps({**FORMAT, "regions": [{"start": 1, "stop": 5, "reuse": [3, 5, 7]}]}))
    (folder / "empty.json").write_text(json.dumps(FORMAT))
    as_keys = upstream.run(script, prefix=LAUNCHER, OSACCEL_CACHE_CONFIG=str(folder / "keys.json"))
    as_plan = upstream.run(script, prefix=LAUNCHER, OSACCEL_PLAN=str(folder / "plan.json"))
    empty = upstream.run(script, prefix=LAUNCHER, OSACCEL_PLAN=str(folder / "empty.json"))
    assert as_keys.videos == as_plan.videos and as_keys.calls == as_plan.calls
    assert empty.videos == upstream.run(script).videos != as_plan.videos


def test_another_number_of_steps_is_refused_before_the_script_starts(upstream, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(json.dumps({**PLANS["skip"], "steps": 9}))
    result = upstream.run(prefix=LAUNCHER, OSACCEL_PLAN=str(path))
    assert result.status == 2 and len(result.log.splitlines()) == 1
    assert "OSACCEL_PLAN: the plan is for 9 steps, but this generation takes 8" in result.log
    unchecked = upstream.run(sitecustomize="import osaccel.auto\n", OSACCEL_PLAN=str(path))
    assert unchecked.status == 1 and not unchecked.calls
    assert "OSACCEL_PLAN: the plan is for 9 steps, but this generation takes 8" in unchecked.log
