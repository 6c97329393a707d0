# SPDX-License-Identifier: Apache-2.0
"""`import osaccel.auto` accelerates this process's sampling as the OSACCEL_* variables say.

It only starts to watch imports: no torch, no file is read. A wrong setting is logged when the upstream's pipeline is
imported and raised by the first generation; `python -m osaccel.run` checks before anything is spawned.
"""

from osaccel import hooks

hooks.install()
