# SPDX-License-Identifier: Apache-2.0
"""A second trained reference model, unlike the miniature in world, captions, latents, depth and position embedding."""
