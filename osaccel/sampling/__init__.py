# SPDX-License-Identifier: Apache-2.0
"""A timestep list put into a diffusers scheduler; classes are matched by name, so diffusers is never imported here."""

from .lists import ScheduleAdapter, UnsupportedScheduler, adapter_for

__all__ = ["ScheduleAdapter", "UnsupportedScheduler", "adapter_for"]
