# SPDX-License-Identifier: Apache-2.0
"""Put this directory on PYTHONPATH and every Python below runs with osaccel; or copy the line into your own."""

import osaccel.auto  # noqa: F401
