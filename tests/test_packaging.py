# SPDX-License-Identifier: Apache-2.0
"""What the package and its pages say of themselves agrees; the rest is `python -m build && twine check --strict`."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import matrix
import pytest

import osaccel

pytest.importorskip("packaging")
from packaging.requirements import Requirement  # noqa: E402
from packaging.specifiers import SpecifierSet  # noqa: E402
from packaging.version import Version  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version_everywhere():
    assert f'\nversion = "{osaccel.__version__}"\n' in text("pyproject.toml")
    assert f"\nversion: {osaccel.__version__}\n" in text("CITATION.cff")
    assert re.search(r"^## (\S+?),", text("CHANGELOG.md"), re.MULTILINE).group(1) == osaccel.__version__


def test_license_types_and_data_are_in_the_package():
    assert "Apache License" in text("LICENSE") and 'KEY: "Apache-2.0"' in text("setup.py")
    for name in ("py.typed", "plan.schema.json", "report/page.html", "demo/checkpoint/README.md"):
        assert (ROOT / "osaccel" / name).exists()
    assert 'osaccel = ["py.typed", "*.pyi", "plan.schema.json"]' in text("pyproject.toml") and '["page.html"]' in text(
        "pyproject.toml"
    )


def test_no_extra_brings_another_torch():
    assert "torch_npu" not in text("pyproject.toml") and "download.pytorch.org" not in text("constraints.txt")


def requirements():
    """What the package asks for in any case, by name."""
    (listed,) = re.findall(r"^dependencies = \[(.*?)^\]", text("pyproject.toml"), re.MULTILINE | re.DOTALL)
    found = map(Requirement, re.findall(r'"(.+?)"', listed))
    return {requirement.name: requirement.specifier for requirement in found}


def test_the_upstream_s_pins_are_kept():
    pins = {"torch": "2.1.0", "numpy": "1.24.4", "PyYAML": "6.0.1"}
    assert requirements().keys() - pins == {"wrapt"}
    assert [name for name, version in pins.items() if version not in requirements()[name]] == []
    # Of a build that names its device: as torch_npu's and the CPU's are.
    assert "2.1.0+cpu" in requirements()["torch"]


def test_the_matrix_has_the_oldest_of_what_is_allowed():
    """And every cell of it is allowed, and names a Python that is announced."""
    specifiers, oldest = requirements(), set()
    for cell in matrix.CELLS.values():
        assert f'"Programming Language :: Python :: {cell.python}"' in text("pyproject.toml")
        for name, version in re.findall(r"(\w+)==(\S+)", " ".join(cell.requirements)):
            assert version in specifiers.get(name, SpecifierSet(">=0.28")), cell
            oldest.add((name, version))
    assert {("wrapt", "1.14.0"), ("torch", "2.1.0"), ("diffusers", "0.28.0")} <= oldest


def test_the_matrix_says_what_could_not_be_installed(tmp_path, monkeypatch):
    assert matrix.try_cell(matrix.Cell("3.99", []), str(tmp_path / "a"), []).words == "not installed: no Python 3.99"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    cell = matrix.Cell("{}.{}".format(*sys.version_info), ["no-such-thing==1"])
    outcome = matrix.try_cell(cell, str(tmp_path / "b"), [])
    assert "no-such-thing==1" in outcome.words and outcome.words.startswith("not installed") and not outcome.failed


@pytest.mark.parametrize("module", ["run", "report", "doctor", "demo"])
def test_every_command_says_its_version(module):
    command = [sys.executable, "-m", f"osaccel.{module}", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"osaccel {osaccel.__version__}\n"


MISSPELT = {"run --plann": "--plan", "doctor --jsn": "--json", "report x --otu": "--out", "demo --fats": "--fast"}


@pytest.mark.parametrize("wrong, meant", MISSPELT.items())
def test_every_command_answers_a_misspelt_option_with_the_one_that_is_meant(wrong, meant):
    result = subprocess.run([sys.executable, "-m", *f"osaccel.{wrong}".split()], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.endswith(f": unknown option. Did you mean {meant!r}?\n") and result.stderr.count("\n") == 1


def test_constraints_ask_for_no_version_that_their_python_cannot_have():
    lines = [line for line in text("constraints.txt").splitlines() if line and line[0] != "#"]
    checked = 0
    for wanted in map(Requirement, lines):
        try:
            installed = distribution(wanted.name)
        except PackageNotFoundError:
            continue
        if wanted.marker is None or f"=={Version(installed.version).public}" != str(wanted.specifier):
            continue
        lowest = next(minor for minor in range(8, 20) if wanted.marker.evaluate({"python_version": f"3.{minor}"}))
        assert f"3.{lowest}.99" in SpecifierSet(installed.metadata["Requires-Python"]), wanted
        checked += 1
    if sys.version_info >= (3, 11):
        assert checked
