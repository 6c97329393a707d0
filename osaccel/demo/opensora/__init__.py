# SPDX-License-Identifier: Apache-2.0
"""A miniature of the Open-Sora-Plan v1.2 package: same module names, small trained networks, no code shared."""
