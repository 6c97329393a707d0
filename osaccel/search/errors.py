# SPDX-License-Identifier: Apache-2.0
"""What a search raises when it cannot go on."""


class SearchError(RuntimeError):
    """The search cannot give what was asked for; the message says why, and where it can what is reachable."""
