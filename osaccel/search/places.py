# SPDX-License-Identifier: Apache-2.0
"""Where to look when not everything can be looked at."""

from typing import Tuple

import numpy as np


def even_places(size: int, points: int) -> Tuple[int, ...]:
    """Evenly spaced places on a grid of `size`, the first and the last among them."""
    return tuple(int(place) for place in np.round(np.linspace(0, size - 1, points)))
