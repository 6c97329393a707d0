# SPDX-License-Identifier: Apache-2.0
"""`import osaccel.compat` lets code that imports msModelSlim's two adaptors run where msModelSlim is not installed.

Its modules are looked for behind every other place, so the real package is never shadowed, nor mixed with.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Dict, Optional, Sequence, Tuple

_PACKAGE = "msmodelslim"
# Its modules, and what each gives from osaccel.adaptors; packages give nothing.
MODULES: Dict[str, Tuple[str, ...]] = {
    _PACKAGE: (),
    f"{_PACKAGE}.pytorch": (),
    f"{_PACKAGE}.pytorch.multi_modal": (),
    f"{_PACKAGE}.pytorch.multi_modal.dit_cache": ("DitCacheAdaptor", "DitCacheConfig", "DitCacheSearchConfig"),
    f"{_PACKAGE}.pytorch.multi_modal.sampling_optimization": ("ReStepAdaptor", "ReStepSearchConfig"),
}


class _Module(ModuleType):
    """Loads the adaptors, and torch with them, when one is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name in MODULES[self.__name__]:
            return getattr(importlib.import_module("osaccel.adaptors"), name)
        raise AttributeError(f"module {self.__name__!r}, of osaccel.compat, has no attribute {name!r}")


class _Finder:
    """Finds the modules above; nothing inside a real msmodelslim."""

    def find_spec(self, name: str, path: Optional[Sequence[str]] = None, target: Any = None) -> Optional[ModuleSpec]:
        if name not in MODULES:
            return None
        if name != _PACKAGE and not isinstance(sys.modules.get(_PACKAGE), _Module):
            return None
        return ModuleSpec(name, self, is_package=not MODULES[name])  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name, __doc__)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def install() -> None:
    """From now on `msmodelslim` can be imported; twice is harmless."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # type: ignore[arg-type]


def uninstall() -> None:
    """No longer; what was imported stays with who imported it."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name in MODULES:
        if isinstance(sys.modules.get(name), _Module):
            del sys.modules[name]


install()
