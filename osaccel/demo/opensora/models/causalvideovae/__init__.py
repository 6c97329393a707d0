# SPDX-License-Identifier: Apache-2.0
"""The small causal video autoencoder, behind the names the sample scripts import."""

from .modeling_causalvae import CausalVAEModel, CausalVAEModelWrapper

ae_stride_config = {"CausalVAEModel_D8_4x4x4": [4, 4, 4]}
ae_channel_config = {"CausalVAEModel_D8_4x4x4": 8}
ae_norm = {"CausalVAEModel_D8_4x4x4": lambda x: 2.0 * x - 1.0}
ae_denorm = {"CausalVAEModel_D8_4x4x4": lambda x: (x + 1.0) / 2.0}

__all__ = [
    "CausalVAEModel",
    "CausalVAEModelWrapper",
    "ae_channel_config",
    "ae_denorm",
    "ae_norm",
    "ae_stride_config",
]
