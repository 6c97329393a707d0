# SPDX-License-Identifier: Apache-2.0
"""One plain generation, recorded so that it can be run again from any step."""
