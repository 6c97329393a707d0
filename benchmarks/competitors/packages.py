# SPDX-License-Identifier: Apache-2.0
"""The packages that competitors need; both come with the extra `bench`, and without them their arms are left out."""

import importlib
import os
from typing import Dict

NEEDED = {"cache-dit": ("cache_dit", "BlockAdapter"), "diffusers": ("diffusers.hooks", "SeaCacheConfig")}


def missing() -> Dict[str, str]:
    """Package name -> why its arms are left out."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    lines = {}
    for package, (module, name) in NEEDED.items():
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            lines[package] = f"{package} left out ({error}); install it with: pip install -e '.[bench]'"
    return lines
