# SPDX-License-Identifier: Apache-2.0
"""The search's memory on disk: whatever was finished before a kill is never computed again.

One directory beside the output file holds the fingerprint, the recorded plain generations (one file per call and rank)
and one line per finished evaluation. Lines are appended whole and flushed; a torn last line is ignored.
"""

import json
import os
import shutil
from typing import Any, Dict, List, Optional

import torch

from osaccel import formats


class Journal:
    """Finished work of one search in `directory`, valid for one `fingerprint`.

    Args:
        directory: created when missing.
        fingerprint: what the evaluations depend on; when the directory holds another one, it is emptied and
            `started_anew` says in words what changed.
    """

    def __init__(self, directory: str, fingerprint: Dict[str, Any], is_writer: bool = True):
        self.directory = directory
        self.started_anew: Optional[str] = None
        path = os.path.join(directory, "fingerprint.json")
        if is_writer:
            known = _read_json(path)
            if known is not None and known != fingerprint:
                self.started_anew = describe_difference(known, fingerprint)
                shutil.rmtree(directory)
            elif known is None and os.path.isdir(directory):
                shutil.rmtree(directory)
            os.makedirs(directory, exist_ok=True)
            if _read_json(path) is None:
                formats.write_json(path, fingerprint)

    def evaluations(self) -> List[Dict[str, Any]]:
        """Every finished evaluation, of all workers, in a fixed order."""
        found: List[Dict[str, Any]] = []
        for name in sorted(os.listdir(self.directory)) if os.path.isdir(self.directory) else ():
            if name.startswith("evaluations-"):
                with open(os.path.join(self.directory, name), encoding="utf-8") as file:
                    found.extend(_whole_lines(file.read()))
        return found

    def add(self, evaluation: Dict[str, Any], worker: int = 0) -> None:
        path = os.path.join(self.directory, f"evaluations-{worker}.jsonl")
        # A kill may have left half a line; the next one must not be glued to it.
        torn = os.path.exists(path) and not _ends_with_newline(path)
        with open(path, "a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(evaluation, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, name: str, content: Any) -> None:
        """Write tensors and plain values so that `name` is there whole or not at all."""
        path = os.path.join(self.directory, name)
        temporary = f"{path}.{os.getpid()}.part"
        torch.save(content, temporary)
        os.replace(temporary, path)

    def load(self, name: str) -> Any:
        """What `save` wrote under this name, or None."""
        path = os.path.join(self.directory, name)
        if not os.path.exists(path):
            return None
        # Written by this search on this machine, and holds Python's and NumPy's random states.
        return torch.load(path, map_location="cpu", weights_only=False)

    def claim(self, name: str) -> bool:
        """Whether this process is the first to claim `name`."""
        try:
            os.close(os.open(os.path.join(self.directory, name + ".claim"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def _read_json(path: str) -> Any:
    try:
        return formats.read_file(path)
    except formats.SettingsError:
        return None


def _whole_lines(text: str) -> List[Dict[str, Any]]:
    found = []
    for line in text.split("\n"):
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def _ends_with_newline(path: str) -> bool:
    with open(path, "rb") as file:
        content = file.read()
    return not content or content.endswith(b"\n")


def describe_difference(known: Dict[str, Any], now: Dict[str, Any]) -> str:
    """ "steps was 20, is now 30; ..." for what differs between two fingerprints."""
    return "; ".join(
        f"{key} was {known.get(key, 'unknown')!r}, is now {now.get(key, 'unknown')!r}"
        for key in sorted(set(known) | set(now))
        if known.get(key) != now.get(key)
    )
