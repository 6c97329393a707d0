# SPDX-License-Identifier: Apache-2.0
"""What the package and its pages say of themselves agrees; the rest is `python -m build && twine check --strict`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import osaccel

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


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", text(name)):
        assert (ROOT / target).exists(), target
