# SPDX-License-Identifier: Apache-2.0
"""OSACCEL_SEARCH=plan in the unmodified v1.2.0 scripts: searched on the first prompt, applied to the second."""

import json

import pytest

LAUNCHER = ("python", "-m", "osaccel.run")


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_a_plan_is_searched_and_applied(upstream, script, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    result = upstream.run(
        script, prefix=LAUNCHER, steps=20, OSACCEL_SEARCH="plan", OSACCEL_TARGET="1.5x,psnr:35", OSACCEL_PLAN=str(path),
        OSACCEL_SEARCH_THEN="continue",
    )  # fmt: skip
    assert len(result.videos) == 2 and (script == "sample_t2v_sp" or result.status == 0), result.log[-3000:]
    plan, report = json.loads(path.read_text()), json.loads((path.parent / "plan.json.report.json").read_text())
    assert plan["steps"] == 20 and plan["made_for"]["sampler"] == "EulerAncestralDiscreteScheduler"
    # Six, and one for the second target.
    assert report["cost"]["plain_generations"] <= 7 and report["work"] <= 1 / 1.5
    assert json.loads((path.parent / "plan.psnr35.json").read_text())["measured"]["psnr"] >= 35
    assert report["fingerprint"]["ranks"] == len(upstream.ranks_of(script))
    assert "found a plan for 1.5x" in result.log
    # Behind it there may be some of the next round, which the script of several ranks begins by itself.
    summary = result.summaries[0]
    assert len(result.summaries) == 1 or script == "sample_t2v_sp"
    assert f"network work {100 * report['work']:.1f} %" in summary
    # Both ranks called the blocks equally often, in the search and after it.
    assert len({json.dumps(calls) for calls in result.calls.values()}) == 1
    # The file alone does the same to the second prompt.
    again = upstream.run(script, prefix=LAUNCHER, steps=20, OSACCEL_PLAN=str(path))
    assert again.summaries[1].split("measured")[0] == summary.split("measured")[0]
    if script == "sample_t2v":
        assert list(again.videos.values())[1] == list(result.videos.values())[1]


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_one_of_two_prompts_is_probed_and_plans_run_on_both(upstream, script, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    result = upstream.run(
        script, prefix=LAUNCHER, steps=20, OSACCEL_SEARCH="plan", OSACCEL_TARGET="1.5x", OSACCEL_PLAN=str(path),
        OSACCEL_SEARCH_PROMPTS="2", OSACCEL_SEARCH_PROBED="1",
    )  # fmt: skip
    assert result.status == 0 and "found a plan for 1.5x" in result.log, result.log[-3000:]
    report = json.loads((path.parent / "plan.json.report.json").read_text())
    errors = {len(row["details"]["errors"]): row.get("calls") for row in report["evaluations"]}
    assert errors[2] is None and errors[1] in ([0], [1])
    assert len(json.loads(path.read_text())["measured"]["errors_of_calls"]) == 2
