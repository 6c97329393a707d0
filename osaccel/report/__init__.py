# SPDX-License-Identifier: Apache-2.0
"""What a search found, as plots and one HTML page."""
