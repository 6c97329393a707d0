# SPDX-License-Identifier: Apache-2.0
"""OpenSoraT2V, in the layout of the upstream."""
