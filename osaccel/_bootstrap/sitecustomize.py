# SPDX-License-Identifier: Apache-2.0
"""Injected by `osaccel.run` through PYTHONPATH: activates osaccel, then runs the sitecustomize this one hides."""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _activate():
    try:
        from osaccel import hooks
    except ImportError:
        # Another environment's Python, or a source tree: the package is in the directory two above.
        sys.path.append(os.path.dirname(os.path.dirname(_HERE)))
        from osaccel import hooks
    # The launcher has checked the settings; a process that never samples need not read them.
    hooks.install()


def _run_hidden_sitecustomize():
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    path = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != _HERE]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


try:
    _activate()
except Exception as error:  # Python would print a traceback and go on just the same.
    sys.stderr.write(f"osaccel: not activated: {error}\n")
_run_hidden_sitecustomize()
