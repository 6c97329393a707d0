# SPDX-License-Identifier: Apache-2.0
"""The miniature upstream with its trained checkpoint, and the demo that runs it; nothing else imports this."""
