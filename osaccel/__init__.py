# SPDX-License-Identifier: Apache-2.0
"""Training-free acceleration for Open-Sora-Plan sampling: plans, DiT cache, searched timesteps, without source edits.

The adaptors are loaded when they are asked for: importing osaccel imports no torch. `__init__.pyi` is for checkers.
"""

import importlib
from typing import Any, List

__version__ = "0.1.0"
_ADAPTORS = ("DitCacheAdaptor", "DitCacheConfig", "DitCacheSearchConfig", "ReStepAdaptor", "ReStepSearchConfig")


def __getattr__(name: str) -> Any:
    if name in _ADAPTORS:
        return getattr(importlib.import_module("osaccel.adaptors"), name)
    raise AttributeError(f"module 'osaccel' has no attribute {name!r}")


def __dir__() -> List[str]:
    return sorted([*globals(), *_ADAPTORS])
