# SPDX-License-Identifier: Apache-2.0
"""Searches inside the unmodified script: replayed generations, the cache search, the timestep search."""
