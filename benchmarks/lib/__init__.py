# SPDX-License-Identifier: Apache-2.0
"""What the commands share. Nothing here imports a command or a competitor."""
