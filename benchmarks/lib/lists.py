# SPDX-License-Identifier: Apache-2.0
"""The timestep lists that are compared: even spacing, and what each method makes of the same statistics."""

import json
from typing import Dict, List, Sequence

import numpy as np

from osaccel.search.timesteps import lists as timesteps


def lists_of(
    statistics: timesteps.Statistics, counts: Sequence[int], variants: Sequence[str] = ()
) -> Dict[str, List[float]]:
    """Descending, by name. variants: further wdp parameters, each a JSON object."""
    last = float(statistics.timesteps[0])
    lists = {"plain 100": np.linspace(last, 0, 100)}
    for count in counts:
        lists[f"plain {count}"] = np.linspace(last, 0, count)
        for method in timesteps.METHODS:
            lists[f"{method} {count}"] = timesteps.search(statistics, [count], method)[count]
        for variant in variants:
            given = timesteps.Parameters(**json.loads(variant))
            lists[f"wdp {variant} {count}"] = timesteps.wdp(statistics, [count], given)[count]
    return {name: [float(value) for value in values] for name, values in lists.items()}
