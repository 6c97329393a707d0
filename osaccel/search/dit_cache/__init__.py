# SPDX-License-Identifier: Apache-2.0
"""The search for msModelSlim's four numbers."""
