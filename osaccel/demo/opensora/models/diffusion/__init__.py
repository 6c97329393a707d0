# SPDX-License-Identifier: Apache-2.0
"""The diffusion transformer of the miniature."""
