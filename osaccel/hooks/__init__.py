# SPDX-License-Identifier: Apache-2.0
"""Post-import hooks on the known pipelines; importing or installing them imports neither torch nor wrapt."""

import atexit
import os
import sys
from typing import Any, Optional

from osaccel.targets import TARGETS


class _PipelineFinder:
    """Has the pipeline wrapped whenever a target module is executed: imported, imported anew, or reloaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[Any]:
        if name not in TARGETS:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec is not None and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _WrappingLoader(spec.loader)
                return spec
        return None

    def invalidate_caches(self) -> None:
        """Part of the finder protocol; nothing is cached here."""


class _WrappingLoader:
    """A module's own loader, but for what follows the module's execution."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # The module shows its own loader, as without us.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _wrap(module)


def _wrap(module: Any) -> None:
    # wrapt alone costs more than the whole budget of a process that never imports the upstream, so it is imported here.
    try:
        from osaccel.hooks.pipelines import wrap_pipeline
    except ImportError as error:
        # Raised here it would end in the upstream's bare `except:`.
        _report_missing(error)
        return
    wrap_pipeline(module)


def _report_missing(error: ImportError) -> None:
    from osaccel import log
    from osaccel.hooks import silence

    log.prepare()
    silence.explained = True
    log.logger.warning("not active in %s, the script runs unaccelerated: %s", sys.executable, error)


def disabled() -> bool:
    """Whether OSACCEL_DISABLE asks for a process without osaccel."""
    return os.environ.get("OSACCEL_DISABLE", "").lower() in ("1", "true", "yes", "on")


def install() -> None:
    """Wrap the known pipelines' `__call__`, now or when their modules are imported; twice is harmless."""
    # By name: the launcher's osaccel and the environment's may be two installations.
    if disabled() or any(type(finder).__name__ == _PipelineFinder.__name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _PipelineFinder())  # type: ignore[arg-type]
    atexit.register(_at_exit)
    for name in TARGETS:
        if name in sys.modules:
            _wrap(sys.modules[name])


def uninstall() -> None:
    """Give the pipeline classes their own `__call__` back and stop watching imports."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PipelineFinder)]
    atexit.unregister(_at_exit)
    for name in TARGETS:
        if name in sys.modules and "osaccel.hooks.pipelines" in sys.modules:
            sys.modules["osaccel.hooks.pipelines"].unwrap_pipeline(sys.modules[name])


def _at_exit() -> None:
    # Looked up before anything is imported: most processes end here.
    if "diffusers.pipelines.pipeline_utils" in sys.modules or any(name in sys.modules for name in TARGETS):
        from osaccel.hooks import silence

        silence.report()
