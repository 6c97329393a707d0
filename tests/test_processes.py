# SPDX-License-Identifier: Apache-2.0
"""Other people's sitecustomizes, launchers, streams and logging around ours, in real processes."""

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
