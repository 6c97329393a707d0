# SPDX-License-Identifier: Apache-2.0
"""Post-import hooks on the known pipelines; importing or installing them imports neither torch nor wrapt."""

import os
import sys
from importlib import util
from typing import Any, Optional

from osaccel.targets import TARGETS


class _PipelineFinder:
    """Registers wrapt's post-import hook at the moment a target module is looked for.

    wrapt alone costs more than the whole budget of a process that never imports the upstream, so it is imported here.
    """

    def __init__(self) -> None:
        self._registered = set()  # type: ignore[var-annotated]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[Any]:
        if name not in TARGETS or name in self._registered:
            return None
        self._registered.add(name)
        _register(name)
        # Registering put wrapt's own finder in front; the search that is under way has already passed that place.
        return util.find_spec(name)

    def invalidate_caches(self) -> None:
        """Part of the finder protocol; nothing is cached here."""


def _register(name: str) -> None:
    import wrapt

    from osaccel.hooks.pipelines import wrap_pipeline

    wrapt.register_post_import_hook(wrap_pipeline, name)


def disabled() -> bool:
    """Whether OSACCEL_DISABLE asks for a process without osaccel."""
    return os.environ.get("OSACCEL_DISABLE", "").lower() in ("1", "true", "yes", "on")


def install() -> None:
    """Wrap the known pipelines' `__call__`, now or when their modules are imported; twice is harmless."""
    if disabled() or any(isinstance(finder, _PipelineFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _PipelineFinder())  # type: ignore[arg-type]
    for name in TARGETS:
        if name in sys.modules:
            _register(name)


def uninstall() -> None:
    """Give the pipeline classes their own `__call__` back and stop watching imports."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PipelineFinder)]
    for name in TARGETS:
        if name in sys.modules and "osaccel.hooks.pipelines" in sys.modules:
            sys.modules["osaccel.hooks.pipelines"].unwrap_pipeline(sys.modules[name])
