# SPDX-License-Identifier: Apache-2.0
"""The sampling pipeline and script of the miniature."""
