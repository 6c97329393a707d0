# SPDX-License-Identifier: Apache-2.0
"""What every run needs, tested under the oldest and the newest that is allowed: `python tests/matrix.py [CELL...]`.

Every cell is a fresh virtual environment: a Python, versions, the package installed from this checkout. Where the
versions are there, a dry run says what else the package would change: nothing. What cannot be installed is reported
as that, with pip's last line; status 1 is for cells in which something failed.
"""

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, NamedTuple, Optional

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMOKE = ["settings", "plan", "plan_regions", "correction", "cache", "search_session", "threads", "processes"]
TEST_TOOLS = ["pytest>=7", "hypothesis>=6", "scipy", "safetensors"]
# What Open-Sora-Plan v1.2 pins; its diffusers needs a huggingface_hub of its time.
UPSTREAM = ["torch==2.1.0", "diffusers==0.28.0", "numpy==1.24.4", "PyYAML==6.0.1", "huggingface_hub<0.25"]

NEWEST = ["torch", "diffusers", "wrapt", "numpy", "PyYAML"]


class Cell(NamedTuple):
    """A Python, and requirements for pip; without a version, the newest that this Python can have."""

    python: str
    requirements: List[str]


CELLS: Dict[str, Cell] = {
    "3.8-oldest": Cell("3.8", [*UPSTREAM, "wrapt==1.14.0"]),
    "3.8-newest": Cell("3.8", NEWEST),
    "3.11-oldest": Cell("3.11", [*UPSTREAM, "wrapt==1.14.0"]),
    "3.11-newest": Cell("3.11", NEWEST),
    # The first torch for this Python.
    "3.13-oldest": Cell(
        "3.13", ["torch==2.5.0", "diffusers==0.28.0", "wrapt==1.14.0", "huggingface_hub<0.25", "numpy", "PyYAML"]
    ),
    "3.13-newest": Cell("3.13", NEWEST),
}


class Outcome(NamedTuple):
    versions: str
    words: str
    failed: bool


def interpreter(version: str) -> Optional[str]:
    """A Python of this version: this one, one on the path, or one of pyenv's."""
    if "{}.{}".format(*sys.version_info) == version:
        return sys.executable
    root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    found = sorted(glob.glob(os.path.join(root, "versions", version + ".*", "bin", "python")))
    return found[-1] if found else shutil.which("python" + version)


def run(command: List[str], **options: str) -> "subprocess.CompletedProcess[str]":
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environ.update(OMP_NUM_THREADS="1", **options)
    return subprocess.run(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def last_line(text: str, pattern: str = r"\S") -> str:
    lines = [line.strip() for line in text.splitlines() if re.search(pattern, line)]
    return lines[-1] if lines else ""


def try_cell(cell: Cell, folder: str, tests: List[str]) -> Outcome:
    """Install and test one cell in `folder`."""
    base = interpreter(cell.python)
    if base is None:
        return Outcome("", f"not installed: no Python {cell.python}", False)
    python = os.path.join(folder, "bin", "python")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    for command in ([base, "-m", "venv", folder], [*pip, *cell.requirements, *TEST_TOOLS]):
        made = run(command)
        if made.returncode != 0:
            reason = last_line(made.stdout, r"(?i)^\s*error") or last_line(made.stdout)
            return Outcome("", f"not installed: {reason}", False)
    planned = run([*pip, "--dry-run", ROOT])
    added = re.findall(r"^Would install (.*)", planned.stdout, re.MULTILINE)
    if run([*pip, ROOT]).returncode != 0 or [name.split("-")[0] for name in " ".join(added).split()] != ["osaccel"]:
        return Outcome("", f"the package would install {added}: {last_line(planned.stdout)}", True)
    names = "torch diffusers wrapt numpy"
    versions = run([python, "-c", f"from importlib import metadata as m; print(*map(m.version, {names.split()}))"])
    # From the checkout's folder, whose osaccel is the one that was installed.
    tested = run([python, "-m", "pytest", "-q", "-W", "ignore", *tests])
    words = last_line(tested.stdout).strip("= ")
    failures = "".join("\n    " + line for line in re.findall(r"^(?:FAILED|ERROR).*", tested.stdout, re.MULTILINE))
    return Outcome(versions.stdout.strip(), words + failures, tested.returncode != 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/matrix.py", description=__doc__)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--list", action="store_true", help="print the cells and end")
    parser.add_argument("--all-tests", action="store_true", help="the whole suite instead of the smoke set")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the environments in this folder")
    arguments = parser.parse_args()
    unknown = sorted({*arguments.cells} - {*CELLS})
    if unknown:
        parser.error(f"no such cell: {', '.join(unknown)}; there are {', '.join(CELLS)}")
    if arguments.list:
        print(
            "\n".join(f"{name}: Python {cell.python}, {', '.join(cell.requirements)}" for name, cell in CELLS.items())
        )
        return 0
    tests = ["tests"] if arguments.all_tests else [os.path.join("tests", f"test_{name}.py") for name in SMOKE]
    print("cell | torch diffusers wrapt numpy | result", flush=True)
    has_failed = False
    for name in arguments.cells or CELLS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="osaccel-matrix-") as temporary:
            outcome = try_cell(CELLS[name], os.path.join(arguments.keep or temporary, name), tests)
        print(f"{name} | {outcome.versions} | {outcome.words} ({time.monotonic() - started:.0f} s)", flush=True)
        has_failed |= outcome.failed
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
