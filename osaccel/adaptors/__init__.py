# SPDX-License-Identifier: Apache-2.0
"""msModelSlim's Python API: code written for it runs with only the import changed."""

from osaccel.adaptors.dit_cache import DitCacheAdaptor, DitCacheConfig, DitCacheSearchConfig
from osaccel.adaptors.restep import ReStepAdaptor, ReStepSearchConfig

__all__ = ["DitCacheAdaptor", "DitCacheConfig", "DitCacheSearchConfig", "ReStepAdaptor", "ReStepSearchConfig"]
