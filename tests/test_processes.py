# SPDX-License-Identifier: Apache-2.0
"""Other people's sitecustomizes, launchers, streams and logging around ours, in real processes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ACTIVE = "import sys; print(any(type(f).__name__ == '_PipelineFinder' for f in sys.meta_path))"


def run(*command, **options):
    environ = dict(os.environ, **options.pop("env", {}))
    options.setdefault("timeout", 60)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environ, **options)


def launch(*arguments, **options):
    return run(sys.executable, "-m", "osaccel.run", *arguments, **options)


# As New Relic's and ddtrace's do: runs the next sitecustomize of the path, whatever it is.
CHAINING = """
import os, sys
from importlib import machinery, util
sys.ran = getattr(sys, "ran", []) + ["theirs"]
here = os.path.dirname(os.path.abspath(__file__))
spec = machinery.PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != here])
if spec is not None:
    module = util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)
"""
USERS = "import sys\nsys.ran = getattr(sys, 'ran', []) + ['user']\n"


@pytest.fixture
def sites(tmp_path):
    for name, text in (("theirs", CHAINING), ("user", USERS)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sitecustomize.py").write_text(text)
    return tmp_path


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("package", [False, True])
def test_sitecustomizes_that_run_each_other_run_once_each(sites, first, package):
    if package:
        (sites / "theirs" / "sitecustomize").mkdir()
        text = CHAINING.replace("dirname(os.path.abspath(__file__))", "dirname(os.path.dirname(__file__))")
        (sites / "theirs" / "sitecustomize" / "__init__.py").write_text(text)
    from osaccel.run import BOOTSTRAP

    order = [BOOTSTRAP, str(sites / "theirs"), str(sites / "user"), ROOT]
    if first == "theirs":
        order[0], order[1] = order[1], order[0]
    result = run(sys.executable, "-c", ACTIVE + "; print(sys.ran)", env={"PYTHONPATH": os.pathsep.join(order)})
    assert result.stdout.splitlines() == ["True", "['theirs', 'user']"] and result.stderr == ""


def test_launchers_of_two_installations_add_one_hook_and_run_the_users_sitecustomize_once(sites):
    shutil.copytree(os.path.join(ROOT, "osaccel"), sites / "other" / "osaccel", ignore=shutil.ignore_patterns("demo"))
    inner = f"import sys; sys.path.insert(0, {str(sites / 'other')!r}); "
    inner += "from osaccel.run import main; sys.exit(main())"
    count = "import sys; print(sum(type(f).__name__ == '_PipelineFinder' for f in sys.meta_path), sys.ran)"
    # -I: the inner launcher's Python is one in which the outer one is not active, so that its own osaccel is used.
    command = [sys.executable, "-I", "-c", inner, sys.executable, "-c", count]
    result = launch(*command, env={"PYTHONPATH": os.pathsep.join([ROOT, str(sites / "user")])})
    assert result.stdout.strip() == "1 ['user']", result.stderr


# An inner launcher, word for word what opentelemetry-instrument and its sitecustomize do with PYTHONPATH.
OTEL_LAUNCHER = """
import os, shutil, sys
entries = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
entries.insert(0, os.getcwd())
here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "auto")
os.environ["PYTHONPATH"] = os.pathsep.join([here] + [p for p in entries if p != here])
os.execl(shutil.which(sys.argv[1]), *sys.argv[1:])
"""
OTEL_SITECUSTOMIZE = """
import os, sys
sys.instrumented = True
here = os.path.dirname(os.path.abspath(__file__))
rest = [p for p in os.environ["PYTHONPATH"].split(os.pathsep) if p != here]
os.environ["PYTHONPATH"] = os.pathsep.join([here] + rest)
"""
BOTH = ACTIVE + "; print(hasattr(sys, 'instrumented'), flush=True)"
GENERATIONS = f"""
import os, subprocess
exec({BOTH!r})
subprocess.run([sys.executable, "-c", {BOTH!r}])
os.execve(sys.executable, [sys.executable, "-c", {BOTH!r}], dict(os.environ))
"""


@pytest.mark.parametrize("inner", [True, False])
def test_a_launcher_that_puts_its_own_sitecustomize_first_leaves_ours_active(tmp_path, inner):
    """In the command, in what it starts, and in what it becomes: in torchrun and its ranks, for example."""
    (tmp_path / "auto").mkdir()
    (tmp_path / "auto" / "sitecustomize.py").write_text(OTEL_SITECUSTOMIZE)
    (tmp_path / "instrument.py").write_text(OTEL_LAUNCHER)
    theirs, ours = [sys.executable, str(tmp_path / "instrument.py")], [sys.executable, "-m", "osaccel.run"]
    words = [*ours, *theirs] if inner else [*theirs, *ours]
    result = run(*words, sys.executable, "-c", GENERATIONS, env={"PYTHONPATH": ROOT})
    assert result.stdout.split() == ["True"] * 6 and result.stderr == ""


def test_a_launcher_that_takes_ours_off_the_path_is_let(tmp_path):
    code = f"import os, sys; os.environ['PYTHONPATH'] = ''; os.execl(sys.executable, sys.executable, '-c', {ACTIVE!r})"
    assert launch(sys.executable, "-c", code).stdout.strip() == "False"


# Silence --------------------------------------------------------------------------------------------------------------

FAKE = """
class OpenSoraPipeline:
    def __call__(self, num_inference_steps=5):
        return num_inference_steps
"""
MODULE = "opensora.sample.pipeline_opensora"
SILENT = "settings ask for acceleration (OSACCEL_CACHE_CONFIG), but nothing was accelerated: "


@pytest.fixture
def fakes(tmp_path):
    """An upstream and a diffusers that need no torch; returns the variables that make them and a setting known."""
    for name, text in ((MODULE, FAKE), ("diffusers.pipelines.pipeline_utils", "class DiffusionPipeline: pass\n")):
        path = tmp_path / "fakes" / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        # Without these the diffusers that is installed, with torch, would be found before a namespace package.
        for package in list(path.parents)[: name.count(".")]:
            (package / "__init__.py").touch()
    config = {"cache_block_start": 0, "cache_num_blocks": 2, "cache_step_start": 0, "cache_step_interval": 2}
    (tmp_path / "cache.json").write_text(json.dumps(config))
    path = os.pathsep.join([str(tmp_path / "fakes"), ROOT])
    return {"PYTHONPATH": path, "OSACCEL_CACHE_CONFIG": str(tmp_path / "cache.json")}


def python(code, env, *arguments):
    return launch(sys.executable, "-c", code, *arguments, env=env)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import diffusers.pipelines.pipeline_utils", "no known pipeline was imported (opensora.sample.pipe"),
        (f"import {MODULE}", f"{MODULE} was imported, but OpenSoraPipeline.__call__ was never reached"),
        (
            f"from {MODULE} import OpenSoraPipeline as P\nclass Q(P):\n  def __call__(self): return 5\nQ()()",
            "OpenSoraPipeline.__call__ was never reached",
        ),
    ],
)
def test_a_script_that_sampled_without_us_ends_with_one_warning_or_status_1(fakes, code, reason):
    result = python(code, fakes)
    assert result.returncode == 0 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("[osaccel] " + SILENT) and reason in result.stderr
    strict = python(code, dict(fakes, OSACCEL_STRICT="1"))
    assert strict.returncode == 1 and reason in strict.stderr
    assert "OSACCEL_STRICT is set and nothing was accelerated" in strict.stderr
    assert python(code, dict(fakes, RANK="1")).stderr == "", "rank 0 speaks for all"
    assert python(code, dict(fakes, RANK="1", OSACCEL_STRICT="1")).returncode == 1


IMPORT = "import diffusers.pipelines.pipeline_utils"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("import json", ()),
        ("import pip", ()),
        ("import opensora.sample", ()),
        (IMPORT + "\nraise SystemExit(0)", ("--help",)),
        # One is started, and samples or loads data; the other is it.
        (
            IMPORT
            + "\nimport multiprocessing as m\np = m.get_context('spawn').Process(target=print)\np.start(); p.join()",
            (),
        ),
    ],
)
def test_processes_that_do_not_sample_say_nothing_and_never_fail(fakes, code, arguments):
    result = python(code, dict(fakes, OSACCEL_STRICT="1"), *arguments)
    assert result.returncode == 0 and result.stderr == ""


def test_a_traceback_is_not_followed_by_a_warning(fakes):
    result = python(IMPORT + "\nraise ValueError('theirs')", fakes)
    assert result.returncode == 1 and "theirs" in result.stderr and "osaccel" not in result.stderr


def test_without_a_request_there_is_nothing_to_miss(fakes):
    fakes.pop("OSACCEL_CACHE_CONFIG")
    assert python(IMPORT, dict(fakes, OSACCEL_LOG="INFO", OSACCEL_STRICT="1")).returncode == 0


@pytest.mark.parametrize(
    "again", ["importlib.reload(m)", "sys.modules.pop(m.__name__); m = importlib.import_module(m.__name__)"]
)
def test_a_module_that_is_reloaded_is_wrapped_again(fakes, again):
    fakes.pop("OSACCEL_CACHE_CONFIG")
    code = f"import importlib, sys, {MODULE} as m; {again}; print(type(vars(m.OpenSoraPipeline)['__call__']).__name__)"
    code += "; print(m.OpenSoraPipeline()(), type(m.__loader__).__name__, type(m.__spec__.loader).__name__)"
    result = python(code, fakes)
    assert result.stdout.split()[0] in ("FunctionWrapper", "BoundFunctionWrapper"), result.stderr
    assert result.stdout.split()[1:] == ["5", "SourceFileLoader", "SourceFileLoader"]


THEIRS = """
import wrapt
P = m.OpenSoraPipeline
P.__call__ = wrapt.FunctionWrapper(vars(P)['__call__'], lambda w, i, a, k: print('theirs') or w(*a, **k))
"""


@pytest.mark.parametrize("first", [True, False])
def test_another_tool_s_wrapt_wrapper_keeps_ours_neither_out_nor_twice(fakes, tmp_path, first):
    path = tmp_path / "fakes" / (MODULE.replace(".", "/") + ".py")
    if first:
        path.write_text(path.read_text() + "import sys; m = sys.modules[__name__]" + THEIRS)
    code = f"import {MODULE} as m; from osaccel import hooks\n{'' if first else THEIRS}\nC = m.OpenSoraPipeline()"
    code += "\nfrom osaccel.hooks.pipelines import wrap_pipeline; wrap_pipeline(m); C()"
    result = python(code + "; print(hasattr(vars(type(C))['__call__'], '__wrapped__'))", fakes)
    assert result.stdout == "theirs\nTrue\n" and result.stderr.count("runs unaccelerated") == 1, result.stderr
    assert "never reached" not in result.stderr
    undone = python(code.replace("; C()", "; hooks.uninstall(); C()"), fakes)
    assert undone.stdout == "theirs\n" and "unaccelerated" not in undone.stderr, undone.stderr
    again = python(code.replace("; C()", "; hooks.uninstall(); hooks.install(); C()"), fakes)
    assert again.stderr.count("runs unaccelerated") == 1, again.stderr


def test_a_python_without_wrapt_samples_unaccelerated_with_one_line(fakes, tmp_path):
    (tmp_path / "fakes" / "wrapt.py").write_text("raise ImportError(\"No module named 'wrapt'\")\n")
    code = f"from {MODULE} import OpenSoraPipeline as P; print(P()())"
    result = python(code, fakes)
    assert result.returncode == 0 and result.stdout == "5\n" and result.stderr.count("\n") == 1
    assert "the script runs unaccelerated: No module named 'wrapt'" in result.stderr
    strict = python(code, dict(fakes, OSACCEL_STRICT="1"))
    assert strict.returncode == 1 and strict.stdout == "5\n"


# Streams and logs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full"])
def test_closed_and_full_streams_change_nothing(fakes, tmp_path, closed):
    marker = tmp_path / "ran"
    code = f"import {MODULE}; open({str(marker)!r}, 'w').close()"
    words = f'{sys.executable} -m osaccel.run {sys.executable} -c "{code}" {closed}'
    assert run("sh", "-c", words, env=fakes).returncode == 0 and marker.exists()
    assert run("sh", "-c", words, env=dict(fakes, OSACCEL_STRICT="1")).returncode == 1
    assert run("sh", "-c", words, env=dict(fakes, OSACCEL_CACHE_CONFIG="no")).returncode == 2
    assert run("sh", "-c", f"{sys.executable} -m osaccel.run no-such-program {closed}", env=fakes).returncode == 127


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["-X", "dev", "-I"], "I"),
        (["-W", "ignore", "-E"], "E"),
        (["-Wignore", "-Xdev", "-uS"], "S"),
        (["--check-hash-based-pycs", "never", "-sE"], "E"),
        (["-uX", "dev", "-c", "pass", "-I"], None),
        (["-c", "pass", "-E"], None),
        (["-mthis", "-S"], None),
        (["-W", "-E", "-c", "pass"], None),
        (["-", "-I"], None),
    ],
)
def test_flags_are_read_as_python_reads_them(words, flag):
    from osaccel.run import disabling_flag

    assert disabling_flag(words) == flag


def test_a_script_whose_first_line_names_a_python_that_ignores_us(tmp_path):
    (tmp_path / "tool").write_text(f"#!{sys.executable} -sE\nprint('ran')\n")
    (tmp_path / "tool").chmod(0o755)
    result = launch(str(tmp_path / "tool"))
    assert result.stdout == "ran\n" and "warning: python -E ignores" in result.stderr


IMPORT_AND_CALL = f"from {MODULE} import OpenSoraPipeline as P\n"
LINE = "logging.getLogger('osaccel').info('our line')\n"
TO_FILE = "logging.basicConfig(filename=sys.argv[1], level=logging.{level}, format='THEIRS %(message)s')\n"
DICT = (
    "import logging.config as c\nc.dictConfig({'version': 1, 'handlers': {'f': {'class': 'logging.FileHandler', "
    "'filename': sys.argv[1]}}, 'root': {'handlers': ['f'], 'level': 'INFO'}})\nP()()\n"
)
OWN = "logging.getLogger('osaccel').addHandler(logging.FileHandler(sys.argv[1]))\n"


@pytest.mark.parametrize(
    "code",
    [
        TO_FILE.format(level="INFO") + IMPORT_AND_CALL + LINE,
        TO_FILE.format(level="WARNING") + IMPORT_AND_CALL + LINE,
        IMPORT_AND_CALL + TO_FILE.format(level="INFO") + LINE,
        IMPORT_AND_CALL + DICT + LINE,
        OWN + IMPORT_AND_CALL + LINE,
        IMPORT_AND_CALL + OWN + LINE,
    ],
)
def test_our_lines_are_in_the_log_of_an_application_that_has_one_and_only_there(fakes, tmp_path, code):
    fakes.pop("OSACCEL_CACHE_CONFIG")
    result = python("import logging, sys\n" + code, fakes, str(tmp_path / "log"))
    assert result.returncode == 0 and result.stderr == ""
    assert (tmp_path / "log").read_text().count("our line") == 1


def test_without_a_log_of_its_own_they_are_on_standard_error_once(fakes):
    fakes.pop("OSACCEL_CACHE_CONFIG")
    code = "import logging, sys\n" + IMPORT_AND_CALL + "P()()\n" + LINE
    assert python(code, fakes).stderr == "[osaccel] our line\n"
    assert python(code, dict(fakes, OSACCEL_LOG="WARNING")).stderr == ""
