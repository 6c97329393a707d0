# SPDX-License-Identifier: Apache-2.0
"""Training-free acceleration for Open-Sora-Plan sampling: DiT cache and searched timesteps, without source edits."""

__version__ = "0.1.0"
