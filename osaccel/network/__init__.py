# SPDX-License-Identifier: Apache-2.0
"""What stands in for transformer work: regions of blocks, conditional-only halves, skipped calls."""
