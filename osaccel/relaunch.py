# SPDX-License-Identifier: Apache-2.0
"""Keeps our sitecustomize the first one where a launcher inside ours becomes its command with one of its own.

OpenTelemetry's launcher puts its sitecustomize first on PYTHONPATH and never runs the next; ours runs the one it hides.
So at the moment of exec ours is put back to the front, if it is on PYTHONPATH still. Must import next to nothing.
"""

import os
from typing import Any, Mapping


def stay_first(directory: str) -> None:
    """From now on `os.exec*` starts programs with `directory` first on PYTHONPATH; twice is harmless."""
    if hasattr(os.execv, "_osaccel"):
        return
    execv, execve = os.execv, os.execve

    def keeping_execv(path: Any, argv: Any) -> Any:
        put_first(directory)
        return execv(path, argv)

    def keeping_execve(path: Any, argv: Any, env: Any) -> Any:
        changed = _changed(env, directory) if isinstance(env, Mapping) else {}
        return execve(path, argv, {**env, **changed} if changed else env)

    _replace("execv", keeping_execv)
    _replace("execve", keeping_execve)


def put_first(directory: str) -> None:
    """Move `directory` to the front of this process's PYTHONPATH, if it is on it."""
    os.environ.update(_changed(os.environ, directory))


def _replace(name: str, keeping: Any) -> None:
    # The others, from execl to execvpe, call these two.
    keeping.__name__, keeping.__doc__, keeping._osaccel = name, getattr(os, name).__doc__, True
    setattr(os, name, keeping)


def _changed(environ: Mapping[str, str], directory: str) -> Mapping[str, str]:
    entries = environ.get("PYTHONPATH", "").split(os.pathsep)
    if directory not in entries or entries[0] == directory:
        return {}
    return {"PYTHONPATH": os.pathsep.join([directory, *(entry for entry in entries if entry != directory)])}
