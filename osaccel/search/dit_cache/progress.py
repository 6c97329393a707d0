# SPDX-License-Identifier: Apache-2.0
"""The cache search's progress bar: block forwards spent of the budget, on the one rank that shows it."""

from osaccel.search.dit_cache.candidates import Search


class Progress:
    """A bar over block forwards, with the time left, on the one rank that shows it."""

    def __init__(self, search: Search, shown: bool):
        self.search, self.bar = search, None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            total = search.budget * search.num_steps
            self.bar = tqdm(
                total=total, desc="osaccel search", unit="step", bar_format="{l_bar}{bar}| {elapsed}<{remaining}"
            )
            self.sync()

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update(1 if self.bar.n + 1 <= self.bar.total else 0)

    def sync(self) -> None:
        if self.bar is not None:
            self.bar.n = min(self.search.spent * self.search.num_steps, self.bar.total)
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.n = self.bar.total
            self.bar.close()
