# SPDX-License-Identifier: Apache-2.0
"""The three networks of the miniature."""
