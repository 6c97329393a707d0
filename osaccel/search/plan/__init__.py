# SPDX-License-Identifier: Apache-2.0
"""The search for a plan: which steps are skipped, which run the conditional half, on the user's own model."""
