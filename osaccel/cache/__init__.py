# SPDX-License-Identifier: Apache-2.0
"""DiT cache: which blocks compute at which step (policy) and how skipped ones are replaced (executor)."""
