# SPDX-License-Identifier: Apache-2.0
"""Injected by `osaccel.run` through PYTHONPATH: activates osaccel, then runs the sitecustomize this one hides.

Others do the same, and may run this file again: every directory's sitecustomize runs once, in the order of sys.path.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
# Shared by all of ours: launchers of two installations may be nested.
_FINISHED = sys.__dict__.setdefault("_osaccel_sitecustomizes", set())


def _activate():
    # The launcher's own osaccel, which has checked the settings; a process that never samples need not read them.
    root = os.path.dirname(os.path.dirname(_HERE))
    sys.path.insert(0, root)
    try:
        from osaccel import hooks, relaunch
    finally:
        sys.path.remove(root)
    if not hooks.disabled():
        hooks.install()
        relaunch.stay_first(_HERE)


def _note(file, is_package):
    directory = os.path.dirname(os.path.abspath(file))
    _FINISHED.add(os.path.dirname(directory) if is_package else directory)


def _note_running():
    """Whoever runs this file has run already: the sitecustomizes on the stack."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals
        if module.get("__name__") == "sitecustomize" and "__file__" in module:
            _note(module["__file__"], "__path__" in module)
        frame = frame.f_back


def _run_hidden_sitecustomize():
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    path = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) not in _FINISHED]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is None or spec.loader is None:
        return
    _note(spec.origin, spec.submodule_search_locations is not None)
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def _report(error):
    # Python would print a traceback and go on just the same.
    if sys.stderr is not None:
        try:
            print(f"osaccel: not activated: {error}", file=sys.stderr)
        except (OSError, ValueError):
            pass  # Closed, or its reader is gone.


_note_running()
try:
    _activate()
except Exception as error:
    _report(error)
_was_first = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] == _HERE
_run_hidden_sitecustomize()
if _was_first and "osaccel.relaunch" in sys.modules:
    # OpenTelemetry's puts itself first again when it is done, and our children would be without us.
    sys.modules["osaccel.relaunch"].put_first(_HERE)
