# SPDX-License-Identifier: Apache-2.0
"""The launcher and the other ways to activate, in real subprocesses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import osaccel
from osaccel import settings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOOD = {"cache_block_start": 0, "cache_num_blocks": 2, "cache_step_start": 0, "cache_step_interval": 2}
ACTIVE = "import sys; print(any(type(f).__name__ == '_PipelineFinder' for f in sys.meta_path))"


def run(*command, cwd=None, timeout=120, **environ):
    env = dict(os.environ, **environ)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout)


def launch(*arguments, **options):
    return run(sys.executable, "-m", "osaccel.run", *arguments, **options)


@pytest.fixture
def cache_file(tmp_path):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(GOOD))
    return str(path)


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_every_python_below_is_active(separator, cache_file, tmp_path):
    script = tmp_path / "outer.sh"
    script.write_text(
        f'cd /\n"{sys.executable}" -c "{ACTIVE}; import os; print(os.environ[\'OSACCEL_CACHE_CONFIG\'])"\n'
    )
    result = launch("--cache-config", "cache.json", *separator, "bash", str(script), cwd=tmp_path)
    assert result.stdout.split() == ["True", cache_file]


def test_module_and_script_run_under_this_python(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ACTIVE + "; print(sys.executable, sys.argv[1:])")
    assert launch(str(script), "--x", "-h").stdout.split() == ["True", sys.executable, "['--x',", "'-h']"]
    result = launch("-m", "timeit", "-n", "1", "-r", "1", ACTIVE)
    assert result.stdout.split()[0] == "True"


def test_torchrun_workers_are_active(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\nsys.stdout.write(str(any(type(f).__name__ == '_PipelineFinder' for f in sys.meta_path)))"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = launch("--", *torchrun, str(script), OMP_NUM_THREADS="1")
    assert result.stdout == "TrueTrue", result.stderr


@pytest.mark.parametrize("status", [0, 3, 77])
def test_exit_status_is_the_command_s(status):
    assert launch("python", "-c", f"raise SystemExit({status})").returncode == status


def test_signals_reach_the_command_itself(tmp_path):
    script = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-m", "osaccel.run", "python", "-c", script], stdout=subprocess.PIPE, text=True
    )
    assert int(process.stdout.readline()) == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cache-config", "missing.json"], "osaccel: error: missing.json: cannot be read"),
        (["--cash-config", "x"], "--cash-config"),
        (["--log", "LOUD"], "osaccel: error: --log: unknown log level 'LOUD'"),
    ],
)
def test_a_wrong_setting_spawns_nothing(arguments, expected, tmp_path):
    marker = tmp_path / "spawned"
    result = launch(*arguments, "--", "touch", str(marker), cwd=tmp_path)
    assert result.returncode == 2 and expected in result.stderr and result.stdout == ""
    assert not marker.exists()


def test_an_unknown_variable_is_an_error():
    result = launch("python", "-c", "", OSACCEL_CACHE="x")
    assert result.returncode == 2 and "OSACCEL_CACHE: unknown environment variable" in result.stderr


PLAN = {"format": "osaccel.plan/1", "steps": 20, "skip": [3]}


@pytest.mark.parametrize(
    ("environ", "extra", "expected"),
    [
        (
            {},
            ["--num_sampling_steps", "8"],
            "OSACCEL_PLAN: the plan is for 20 steps, but this generation takes 8; sample",
        ),
        (
            {},
            ["--sample_method=DPMSolverMultistep"],
            "DPMSolverMultistepScheduler cannot skip or correct steps: it already",
        ),
        (
            {},
            ["--num_sampling_steps", "20", "--num_samp=8"],
            "OSACCEL_PLAN: the plan is for 20 steps, but this generation takes 8; sample",
        ),
        (
            {"OSACCEL_SEARCH": "plan"},
            ["--num_sampling_steps=6"],
            "A generation of 6 steps is too short for a plan search; sample at least 7.",
        ),
    ],
)
def test_what_cannot_fit_the_command_s_own_options_spawns_nothing(environ, extra, expected, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    marker = tmp_path / "spawned"
    code = f"open({str(marker)!r}, 'w')"
    result = launch(sys.executable, "-c", code, *extra, OSACCEL_PLAN=str(tmp_path / "plan.json"), **environ)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"osaccel: error: {expected}") and result.stderr.count("\n") == 1
    assert not marker.exists()


@pytest.mark.parametrize(
    "extra",
    [
        ["--num_sampling_steps", "20", "--sample_method", "DDIM"],
        # A prompt is no option.
        ["--num_sampling_steps", "20", "--text_prompt", "num_sampling_steps=8"],
        # Where one is given twice, shortened or not, the last is what the script has.
        ["--num_sampling_steps", "8", "--num_sampling_step", "20"],
        ["--num_sampling_steps", "²"],
        # It counts twice as many steps, less one.
        ["--num_sampling_steps", "8", "--sample_method", "HeunDiscrete"],
    ],
)
def test_what_may_fit_is_started(extra, tmp_path):
    plan = {**PLAN, "skip": [], "conditional_only": [3]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-c", "print('started')", *extra]
    for whole in (command, ["bash", "-c", "echo started", "_", "--num_sampling_steps", "8"], ["env", *command]):
        result = launch(*whole, OSACCEL_PLAN=str(tmp_path / "plan.json"))
        assert result.returncode == 0 and result.stdout.startswith("started") and result.stderr == ""


def test_the_check_beforehand_imports_nothing_heavy(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    code = (
        "import sys; from osaccel import run; print(run.main(['python', '--num_sampling_steps', '8']),"
        "*{'torch', 'diffusers', 'wrapt', 'numpy'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", code, OSACCEL_PLAN=str(tmp_path / "plan.json")).stdout == "2\n"


def test_settings_of_a_search_without_one_are_a_warning(tmp_path, cache_file):
    environ = {"OSACCEL_TARGET": "2x", "OSACCEL_CACHE_CONFIG": cache_file}
    result = launch("--target-steps", "5", "echo", "started", **environ)
    assert result.stdout == "started\n" and result.stderr == (
        "osaccel: warning: OSACCEL_TARGET, --target-steps: only a search reads this, and none is asked for; see "
        "OSACCEL_SEARCH.\n"
    )
    for name, value in (("SEARCH", "0"), ("DISABLE", "1")):
        assert launch("true", **environ, **{f"OSACCEL_{name}": value}).stderr == ""
    missing = launch("true", OSACCEL_TARGET="2x", OSACCEL_PLAN="none.json")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 2 and "warning: OSACCEL_TARGET" in missing.stderr


@pytest.mark.parametrize("arguments", [[], ["--plan", "plan.json"], ["--"]])
def test_no_command(arguments):
    result = launch(*arguments)
    assert result.returncode == 2 and result.stderr == (
        "osaccel: error: no COMMAND given; usage: python -m osaccel.run [options] [--] COMMAND...; --help lists the "
        "options.\n"
    )


def test_unknown_command():
    result = launch("no-such-program")
    assert result.returncode == 127 and "command not found: no-such-program" in result.stderr


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--cache-confg", "--cache-confg: unknown option. Did you mean '--cache-config'?"),
        ("--timestep=x", "--timestep: unknown option. Did you mean '--timesteps'?"),
        ("--dit_cache_config", "--dit_cache_config is msModelSlim's; here it is --cache-config FILE."),
        ("--schedule_timestep", "here it is --timesteps FILE."),
        ("--search_type", "here it is --search dit_cache, or --search restep."),
        ("--cache_save_path", "here it is --search dit_cache --cache-config FILE"),
    ],
)
def test_a_misspelt_or_former_option_is_answered_with_the_one_that_is_meant(option, expected):
    result = launch(option, "file", "python", "-c", "print('ran')")
    assert result.returncode == 2 and expected in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_version():
    assert launch("--version").stdout == f"osaccel {osaccel.__version__}\n"


def test_help_shows_every_setting_once():
    text = launch("--help").stdout
    for setting in settings.TABLE:
        assert text.count(f"[{setting.variable}]") == 1, setting.name
    assert text.index("what is applied") < text.index("--plan") < text.index("search instead") < text.index("--target ")


def test_help_names_every_variable():
    text = launch("--help").stdout
    assert all(name in text for name in ("OSACCEL_CACHE_CONFIG", "OSACCEL_TIMESTEPS", "OSACCEL_SEARCH", "--strict"))


def test_nested_launches_add_one_path_and_one_hook():
    count = "import os, sys; print(sum(type(f).__name__ == '_PipelineFinder' for f in sys.meta_path))"
    paths = "; print(os.environ['PYTHONPATH'].count('_bootstrap'))"
    nested = launch(sys.executable, "-m", "osaccel.run", "python", "-c", count + "; import osaccel.auto" + paths)
    assert nested.stdout.split() == ["1", "1"]


@pytest.mark.parametrize("pythonpath", [":/nowhere", "/nowhere:", "/nowhere::/else", ":", None])
def test_an_empty_entry_of_pythonpath_stays_the_current_directory(tmp_path, pythonpath):
    """`PYTHONPATH=$PYTHONPATH:/x` stands in many scripts, whose command then finds its own package beside it."""
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "sample.py").write_text("import sys, mine; print([p for p in sys.path if 'nowhere' in p])")
    environ = dict(os.environ, PYTHONPATH=pythonpath or "")
    command = [sys.executable, "scripts/sample.py"]
    # Started by the installed package's path: the launcher itself must not need PYTHONPATH.
    ours = [sys.executable, "-c", f"import sys; sys.path.insert(0, {ROOT!r}); from osaccel.run import main; main()"]
    plain, launched, nested = (
        subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
        for words in (command, ours + command, ours + ours + command)
    )
    assert (plain.returncode == 0) == (pythonpath is not None)
    assert launched.stdout == nested.stdout == plain.stdout
    assert launched.returncode == nested.returncode == plain.returncode


def test_the_user_s_own_sitecustomize_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.own_sitecustomize = 'ran'\n")
    result = launch("python", "-c", ACTIVE + "; print(sys.own_sitecustomize)", PYTHONPATH=str(tmp_path))
    assert result.stdout.split() == ["True", "ran"]


def test_an_error_in_the_user_s_sitecustomize_is_shown_as_python_shows_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("raise ValueError('mine')\n")
    result = launch("python", "-c", ACTIVE, PYTHONPATH=str(tmp_path))
    assert "ValueError: mine" in result.stderr and result.stdout.strip() == "True"


@pytest.mark.parametrize("flag", ["-S", "-E", "-I"])
def test_python_flags_that_ignore_us_are_named(flag):
    result = launch("python", flag, "-c", "pass")
    assert f"python {flag} ignores PYTHONPATH or sitecustomize" in result.stderr
    assert "ignores" not in launch("python", "-u", "-c", "pass", flag).stderr


def test_disable_leaves_no_hook():
    assert launch("--disable", "python", "-c", ACTIVE).stdout.strip() == "False"
    result = run(sys.executable, "-c", "import osaccel.auto; " + ACTIVE, OSACCEL_DISABLE="1")
    assert result.stdout.strip() == "False"


def test_sitecustomize_example_and_auto_activate():
    example = os.path.join(ROOT, "sitecustomize_example")
    assert run(sys.executable, "-c", ACTIVE, PYTHONPATH=os.pathsep.join([example, ROOT])).stdout.strip() == "True"
    assert run(sys.executable, "-c", "import osaccel.auto; " + ACTIVE).stdout.strip() == "True"


def test_activation_imports_nothing_heavy_and_is_quick(cache_file):
    code = (
        "import sys, time; before = time.process_time(); import osaccel.auto; spent = time.process_time() - before;"
        "heavy = {'torch', 'diffusers', 'wrapt', 'numpy', 'yaml', 'torch_npu'} & set(sys.modules); print(spent, *heavy)"
    )
    results = [run(sys.executable, "-c", code, OSACCEL_CACHE_CONFIG=cache_file).stdout.split() for _ in range(5)]
    assert all(len(result) == 1 for result in results)
    assert min(float(result[0]) for result in results) < 0.02


FAKE_UPSTREAM = """
class OpenSoraPipeline:
    def __call__(self, num_inference_steps=5):
        return num_inference_steps
"""


@pytest.fixture
def fake_upstream(tmp_path):
    package = tmp_path / "opensora" / "sample"
    package.mkdir(parents=True)
    for directory in (package, package.parent):
        (directory / "__init__.py").write_text("")
    (package / "pipeline_opensora.py").write_text(FAKE_UPSTREAM)
    return str(tmp_path)


CALL = "from opensora.sample.pipeline_opensora import OpenSoraPipeline as P; print(P()())"


@pytest.mark.parametrize("before", ["", "import opensora.sample.pipeline_opensora; "])
def test_an_unrecognised_pipeline_runs_unaccelerated_with_one_warning(fake_upstream, cache_file, before):
    environ = {"PYTHONPATH": os.pathsep.join([fake_upstream, ROOT]), "OSACCEL_CACHE_CONFIG": cache_file}
    code = before + "import osaccel.auto; " + CALL
    result = run(sys.executable, "-c", code, **environ)
    assert result.stdout.strip() == "5"
    assert "has no scheduler" in result.stderr and result.stderr.count("runs unaccelerated") == 1
    strict = run(sys.executable, "-c", code, OSACCEL_STRICT="1", **environ)
    assert strict.returncode != 0 and "UnsupportedPipeline" in strict.stderr and strict.stdout == ""


def test_an_upstream_without_the_class_fails_at_exit_when_strict(fake_upstream, cache_file):
    path = os.path.join(fake_upstream, "opensora", "sample", "pipeline_opensora.py")
    with open(path, "w") as file:
        file.write("class Renamed: pass\n")
    environ = {"PYTHONPATH": os.pathsep.join([fake_upstream, ROOT]), "OSACCEL_CACHE_CONFIG": cache_file}
    code = "import osaccel.auto, opensora.sample.pipeline_opensora; print('ran')"
    result = run(sys.executable, "-c", code, **environ)
    assert result.returncode == 0 and "no class OpenSoraPipeline" in result.stderr
    assert run(sys.executable, "-c", code, OSACCEL_STRICT="1", **environ).returncode == 1


def test_a_wrong_setting_without_the_launcher_fails_the_first_generation(fake_upstream):
    environ = {"PYTHONPATH": os.pathsep.join([fake_upstream, ROOT]), "OSACCEL_CACHE_CONFIG": "missing.json"}
    result = run(sys.executable, "-c", "import osaccel.auto; " + CALL, **environ)
    assert result.returncode != 0 and "SettingsError: missing.json: cannot be read" in result.stderr
    assert result.stdout == ""


def test_launching_costs_little():
    started = time.perf_counter()
    launch("true")
    # The bound is loose for busy machines; `import torch` alone would exceed it.
    assert time.perf_counter() - started < 2
