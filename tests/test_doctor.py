# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.doctor`: what it finds, what it makes of it, and that it runs nothing."""

import json
import os
import subprocess
import sys

import pytest

from osaccel import doctor
from osaccel.doctor import ERROR, NOTE, WARNING

FOUR_KEYS = {"cache_block_start": 1, "cache_num_blocks": 2, "cache_step_start": 4, "cache_step_interval": 2}
PLAN = {
    "format": "osaccel.plan/1", "steps": 10, "skip": [3, 5],
    "made_for": {"steps": 10, "blocks": 4, "sampler": "EulerAncestralDiscreteScheduler", "resolution": [29, 480, 640]},
}  # fmt: skip
SCRIPT = ("python", "-m", "opensora.sample.sample_t2v")


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A directory with an upstream whose packages must not be run."""
    package = tmp_path / "opensora" / "sample"
    package.mkdir(parents=True)
    (package / "sample_t2v.py").touch()
    for directory in (package, package.parent):
        (directory / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "pipeline_opensora.py").write_text("class OpenSoraPipeline:\n    def __call__(self): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "osaccel" not in entry])
    monkeypatch.delitem(sys.modules, "opensora", raising=False)
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def levels(found):
    return {finding.level for finding in found.findings}


def said(found):
    return "\n".join(finding.text for finding in found.findings)


def test_the_upstream_is_recognised_without_being_imported(upstream):
    found = doctor.diagnose({}, {}, ())
    assert found.upstream["opensora.sample.pipeline_opensora"] == {
        "path": str(upstream / "opensora/sample/pipeline_opensora.py"), "recognised": True,
    }  # fmt: skip
    assert found.upstream["opensora.sample.pipeline_opensora_sp"]["path"] is None
    assert levels(found) == {NOTE} and found.status == 0 and "Nothing is set" in said(found)


def test_an_upstream_of_another_shape_is_a_warning(upstream):
    (upstream / "opensora/sample/pipeline_opensora.py").write_text("class Renamed: pass\n")
    found = doctor.diagnose({}, {}, ())
    assert found.status == 1 and "has no class OpenSoraPipeline" in said(found)


def test_no_upstream_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "locate", lambda module, path: None)
    assert "No Open-Sora-Plan is found from here" in said(doctor.diagnose({}, {}, ()))


def test_a_plan_that_fits_says_what_it_would_do(upstream):
    path = write(upstream / "plan.json", PLAN)
    size = ("--num_frames", "29", "--height=480", "--width", "640")
    command = (*SCRIPT, "--num_sampling_steps", "10", "--sample_method", "EulerAncestralDiscrete", *size)
    found = doctor.diagnose({"OSACCEL_PLAN": path, **PATH}, {}, command)
    assert found.status == 0 and found.findings == []
    assert found.effect["network_work"] == pytest.approx(0.8) and found.effect["ideal_speed_up"] == pytest.approx(1.25)
    assert found.settings == {"plan": {"value": path, "source": "OSACCEL_PLAN"}}


PATH = {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}


@pytest.mark.parametrize(
    ("extra", "level", "expected"),
    [
        (("--num_sampling_steps", "50"), ERROR, "the plan is for 10 steps, but this generation takes 50"),
        (("--sample_method", "PNDM"), ERROR, "PNDMScheduler cannot skip or correct steps: it already extrapolates"),
        (("--sample_method", "DPMSolverMultistep"), ERROR, "Allowed: EulerAncestralDiscreteScheduler, DDPMScheduler, "),
        (("--num_frames", "93", "--height", "480", "--width", "640"), WARNING, "resolution was [29, 480, 640]"),
        (("--schedule_timestep", "x"), ERROR, "--schedule_timestep is msModelSlim's; before COMMAND it is --timesteps"),
    ],
)
def test_what_does_not_fit_the_command(upstream, extra, level, expected):
    path = write(upstream / "plan.json", PLAN)
    found = doctor.diagnose({"OSACCEL_PLAN": path, **PATH}, {}, (*SCRIPT, *extra))
    assert expected in "\n".join(finding.text for finding in found.findings if finding.level == level)


def test_what_is_an_error_is_not_a_warning_too(upstream):
    path = write(upstream / "plan.json", PLAN)
    found = doctor.diagnose({"OSACCEL_PLAN": path, **PATH}, {}, (*SCRIPT, "--num_sampling_steps", "50"))
    assert [finding.level for finding in found.findings] == [ERROR]


def test_a_list_is_compared_with_the_steps_that_the_command_asks_for(upstream):
    path = write(upstream / "list.txt", [0.1, 0.4, 0.6, 0.9])
    found = doctor.diagnose(PATH, {"timesteps": path}, (*SCRIPT, "--num_sampling_steps", "8"))
    assert found.effect["network_work"] == pytest.approx(0.5) and found.status == 0
    text = doctor.text_of(found)
    assert "in place of     8 evenly spaced steps" in text and "50.0 %" in text and "2.000x" in text


def test_blocks_are_those_of_the_checkpoint_that_the_command_names(upstream):
    (upstream / "model").mkdir()
    write(upstream / "model" / "config.json", {"num_layers": 5})
    options = {"cache_config": write(upstream / "c.json", FOUR_KEYS)}
    command = (*SCRIPT, "--num_sampling_steps", "10", "--model_path", "model")
    found = doctor.diagnose(PATH, options, command)
    assert found.effect["network_work"] == pytest.approx(1 - 3 * 2 / 50) and found.findings == []
    path = write(upstream / "plan.json", PLAN)
    assert "blocks was 4 when it was searched, is now 5" in said(doctor.diagnose(PATH, {"plan": path}, command))
    guided = write(upstream / "guided.json", {**PLAN, "made_for": {"guidance_scale": 7.5}})
    for words, is_said in ((("--guidance_scale", "3"), True), (("--guidance_scale=7.50",), False), ((), False)):
        found = doctor.diagnose(PATH, {"plan": guided}, (*command, *words))
        assert ("guidance_scale was 7.5 when it was searched" in said(found)) is is_said
    (upstream / "model" / "config.json").write_text("{")
    assert "say it with --num-blocks" in said(doctor.diagnose(PATH, options, command))


def test_what_the_command_names_and_is_not_here(upstream):
    found = doctor.diagnose(PATH, {}, ("python", "-m", "opensora.sample.sample_t2v_sq"))
    assert found.status == 2 and "no module opensora.sample.sample_t2v_sq is found from here" in said(found)
    found = doctor.diagnose(PATH, {}, ("bash", "gone.sh"))
    assert found.status == 1 and "gone.sh is not found from here" in said(found)


def test_strict_makes_a_mismatch_an_error(upstream):
    options = {"plan": write(upstream / "plan.json", PLAN), "strict": True}
    command = (*SCRIPT, "--sample_method", "DDIM")
    found = doctor.diagnose(PATH, options, command)
    assert found.status == 2 and "sampler was 'EulerAncestralDiscreteScheduler'" in said(found)
    assert doctor.diagnose(PATH, {**options, "strict": None}, command).status == 1


def test_four_keys_need_the_number_of_blocks(upstream):
    options = {"cache_config": write(upstream / "c.json", FOUR_KEYS)}
    command = (*SCRIPT, "--num_sampling_steps", "10")
    assert "say it with --num-blocks" in said(doctor.diagnose(PATH, options, command))
    assert doctor.diagnose(PATH, options, command, 4).effect["network_work"] == pytest.approx(1 - 3 * 2 / 40)
    assert "reaches past the last of the 2" in said(doctor.diagnose(PATH, options, command, 2))
    write(upstream / "c.json.report.json", {"fingerprint": {"blocks": 4, "steps": 20}})
    beside = doctor.diagnose(PATH, options, command)
    assert beside.effect["blocks"] == 4 and "steps was 20 when it was searched, is now 10" in said(beside)


def test_a_search_is_checked_too(upstream):
    options = {"search": "restep", "timesteps": str(upstream / "list.txt"), "target_steps": "50"}
    found = doctor.diagnose(PATH, options, (*SCRIPT, "--num_sampling_steps", "50"))
    assert found.status == 2 and "at most 49 are allowed" in said(found)
    assert doctor.diagnose(PATH, {"search": "plan"}, ()).status == 2


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({"search": "plan", "plan": "p.json"}, "6", "6 steps is too short for a plan search; sample at least 7."),
        (
            {"search": "restep", "timesteps": "t.txt", "target_steps": "20"},
            "10",
            "OSACCEL_TARGET_STEPS asks for 20 steps, but the script samples 10; a search chooses among the script's "
            "own steps, so at most 9 are allowed.",
        ),
    ],
)
def test_a_search_that_would_end_with_an_error_says_so_as_the_search_would(upstream, options, steps, expected):
    found = doctor.diagnose(PATH, options, (*SCRIPT, "--num_sampling_steps", steps))
    assert found.status == 2 and expected in said(found)
    assert doctor.diagnose(PATH, options, (*SCRIPT, "--num_sampling_steps", "50")).status == 0


def test_samplers_that_count_their_steps_otherwise_are_not_compared(upstream):
    plan = {"format": "osaccel.plan/1", "steps": 15, "conditional_only": [3], "made_for": {"steps": 8}}
    command = (*SCRIPT, "--num_sampling_steps", "8")
    options = {"plan": write(upstream / "plan.json", plan)}
    assert doctor.diagnose(PATH, options, command).status == 2
    found = doctor.diagnose(PATH, options, (*command, "--sample_method", "HeunDiscrete"))
    assert found.status == 0 and found.effect["steps"] == 15
    plan["made_for"]["sampler"] = "HeunDiscreteScheduler"
    assert doctor.diagnose(PATH, {"plan": write(upstream / "plan.json", plan)}, command).status == 0


def test_a_plan_that_changes_nothing_is_named(upstream):
    path = write(upstream / "plan.json", {"format": "osaccel.plan/1", "steps": 10})
    found = doctor.diagnose({"OSACCEL_PLAN": path, **PATH}, {}, (*SCRIPT, "--num_sampling_steps", "8"))
    assert found.status == 0 and "OSACCEL_PLAN computes every step in full: COMMAND would run as without" in said(found)


def test_settings_are_shown_as_they_were_written(upstream):
    write(upstream / "plan.json", PLAN)
    (upstream / "osaccel.yaml").write_text(
        "plan: plan.json\ncorrection: [0, 1.0, 1]\nstrict: true\nsearch: {mode: plan, target: '2x, 3x', prompts: 4}\n"
        "wall: {parallel_vae: false}\n"
    )
    found = doctor.diagnose({**PATH, "OSACCEL_LOG": "debug"}, {"config": "osaccel.yaml", "cache_ratio": "1.20"}, ())
    assert {name: row["value"] for name, row in found.settings.items()} == {
        "config": "osaccel.yaml", "plan": "plan.json", "correction": "0, 1.0, 1", "strict": "true", "search": "plan",
        "target": "2x, 3x", "search_prompts": "4", "parallel_vae": "false", "log": "debug", "cache_ratio": "1.20",
    }  # fmt: skip
    assert "plan            plan.json  (osaccel.yaml: plan)\n" in doctor.text_of(found)
    (upstream / "osaccel.yaml").write_text(f"cache: {json.dumps(FOUR_KEYS)}\n")
    found = doctor.diagnose(PATH, {"config": "osaccel.yaml"}, ())
    assert json.loads(found.settings["cache_config"]["value"]) == FOUR_KEYS


def test_settings_of_a_search_without_one_are_a_warning(upstream):
    found = doctor.diagnose({**PATH, "OSACCEL_TARGET": "2x"}, {"plan": write(upstream / "plan.json", PLAN)}, ())
    assert found.status == 1 and "OSACCEL_TARGET: only a search reads this, and none is asked for" in said(found)
    found = doctor.diagnose({**PATH, "OSACCEL_TARGET": "2x"}, {"plan": "none.json"}, ())
    assert [finding.level for finding in found.findings] == [WARNING, ERROR]
    # A file of settings may be one for all commands.
    (upstream / "osaccel.yaml").write_text("plan: plan.json\nsearch: {target: 3x, prompts: 4}\n")
    assert doctor.diagnose(PATH, {"config": "osaccel.yaml"}, ()).findings == []


def test_options_inside_a_shell_script_are_read(upstream):
    (upstream / "sample.sh").write_text("torchrun -m opensora.sample.x \\\n  --num_sampling_steps 50 # --height 1\n")
    assert doctor.asked_for(doctor.words_of(["bash", "sample.sh"])) == {"num_sampling_steps": 50}


def test_a_command_of_another_environment_is_named(upstream):
    (upstream / "python").write_text("#!/bin/sh\n")
    (upstream / "python").chmod(0o755)
    found = doctor.diagnose({"PATH": str(upstream)}, {}, SCRIPT)
    assert f"COMMAND starts {upstream / 'python'}" in said(found) and found.status == 1
    assert "command not found: no-such" in said(doctor.diagnose(PATH, {}, ["no-such"]))
    assert "python -I ignores" in said(doctor.diagnose(PATH, {}, ["python", "-I", "x.py"]))


def doctor_process(*arguments, **environ):
    environ = {**os.environ, **environ}
    return subprocess.run(
        [sys.executable, "-m", "osaccel.doctor", *arguments], capture_output=True, text=True, env=environ
    )


def test_the_command_line(tmp_path):
    found = json.loads(doctor_process("--json", "--num-blocks", "4").stdout)
    assert found["versions"]["osaccel"] == doctor.__version__ and found["status"] in (0, 1)
    assert doctor_process("--version").stdout == f"osaccel {doctor.__version__}\n"
    wrong = doctor_process("--plan", str(tmp_path / "none.json"))
    assert wrong.returncode == 2 and "error:" in wrong.stdout and "cannot be read" in wrong.stdout
    assert doctor_process("--num-blocks", "0").returncode == 2
    text = doctor_process(OSACCEL_LOG="DEBUG").stdout
    assert "\nsettings\n" in text and "DEBUG  (OSACCEL_LOG)" in text
