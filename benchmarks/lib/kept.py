# SPDX-License-Identifier: Apache-2.0
"""What is finished is kept in a folder, so that an interrupted command goes on; and what a kept result was made by."""

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import torch

from osaccel import formats
from osaccel.binding import digest_of, weights_digest

__all__ = ["Kept", "digest_of", "made_by", "weights_digest"]


class Kept:
    """Named results; those of another `bound` (model, sampler, steps ...) are in another subfolder and never met.

    Without a folder they are kept in memory. Names are file names.
    """

    def __init__(self, folder: Optional[Any], bound: Dict[str, Any]):
        self.folder = None if folder is None else Path(folder) / digest_of(json.dumps(bound, sort_keys=True))
        self._memory: Dict[str, Any] = {}
        if self.folder is not None:
            formats.write_json(str(self.folder / "bound.json"), bound)

    def has(self, name: str) -> bool:
        return name in self._memory if self.folder is None else self._path(name, "pt").exists()

    def put(self, name: str, content: Dict[str, Any]) -> None:
        """Tensors, numbers and texts."""
        if self.folder is None:
            self._memory[name] = content
            return
        part = self._path(name, f"{os.getpid()}.part")
        torch.save(content, part)
        part.replace(self._path(name, "pt"))

    def get(self, name: str) -> Dict[str, Any]:
        return self._memory[name] if self.folder is None else torch.load(self._path(name, "pt"), weights_only=True)

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make()` gave when it was first asked for under this name: anything that JSON holds."""
        if self.folder is None:
            if name not in self._memory:
                self._memory[name] = make()
            return self._memory[name]
        path = self._path(name, "json")
        if not path.exists():
            formats.write_json(str(path), make())
        return json.loads(path.read_text())

    def _path(self, name: str, kind: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.{kind}"


def made_by() -> Dict[str, str]:
    """The command, commit and machine, for every result that is written to a file."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    program = f"python -m {module}" if module else f"python {Path(sys.argv[0]).name}"
    return {"command": shlex.join([*program.split(), *sys.argv[1:]]), "commit": _commit(), "machine": _machine()}


def _commit() -> str:
    where = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        found = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        return "unknown"
    return found


def _machine() -> str:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    if torch.cuda.is_available():
        processor += f" and one {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores of {processor}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _lines(path: str) -> list:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not a Linux
        return []
