# SPDX-License-Identifier: Apache-2.0
"""The trained miniature: data whose truth is known, the training that learns it, and the parser that judges samples."""
