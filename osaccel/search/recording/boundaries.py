# SPDX-License-Identifier: Apache-2.0
"""Hidden states at the blocks' edges in some steps of the plain generation, so that a resumed one starts with a delta.

The delta that a cached generation stores at its first storing step is a difference of two of them, bit for bit: up to
there it computes what the plain one does. So that step need not be computed again. Memory is bounded; a step that no
longer fits is not kept, and is computed again by whoever needs it.
"""

from typing import Any, Container, Dict, List, Optional, Sequence, Tuple

from osaccel.network.forwards import Streams
from osaccel.plan import Region

# Host memory for all recorded calls of a process together.
MEMORY = 2 * 2**30


class _Pass:
    """One forward through all blocks: what entered and what left each, in the blocks' order."""

    def __init__(self, inputs: Sequence[Streams] = (), outputs: Sequence[Streams] = ()) -> None:
        self.inputs: List[Streams] = list(inputs)
        self.outputs: List[Streams] = list(outputs)


class Boundaries:
    """What entered and left every block, by step and branch, on the host.

    Args:
        memory: bytes the kept states may take.
        steps: the steps worth keeping; None for all of them. May be set until the generation begins.
    """

    def __init__(self, memory: int = MEMORY, steps: Optional[Container[int]] = None):
        self.memory, self.steps = memory, steps
        self.kept: Dict[int, List[_Pass]] = {}
        self.bytes_used = 0
        self._full = False
        self._last: Tuple[Any, Any] = (None, None)

    def observe(self, step: int, branch: int, index: int, before: Streams, after: Streams) -> None:
        """Called after every block; `branch` numbers the passes of a step, `index` the blocks."""
        if self._full or (self.steps is not None and step not in self.steps):
            return
        passes = self.kept.setdefault(step, [])
        if len(passes) == branch:
            passes.append(_Pass())
        original, copied = self._last
        is_same = index > 0 and original is not None and all(a is b for a, b in zip(before, original))
        if not (
            self._keep(passes[branch].inputs, copied if is_same else self._copy(before))
            and self._keep(passes[branch].outputs, self._copy(after))
        ):
            # This step does not fit, and the later ones are as large.
            self._full = True
            self.forget(step)
            self.close()
        else:
            self._last = after, passes[branch].outputs[-1]

    @staticmethod
    def _keep(where: List[Streams], copied: Optional[Streams]) -> bool:
        where.extend([] if copied is None else [copied])
        return copied is not None

    def _copy(self, streams: Streams) -> Optional[Streams]:
        """A copy on the host, or None when it does not fit."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in streams)
        if self.bytes_used + size > self.memory:
            return None
        self.bytes_used += size
        return tuple(tensor.detach().to("cpu", copy=True) for tensor in streams)

    def forget(self, step: int) -> None:
        passes = self.kept.pop(step, [])
        tensors = {id(t): t for p in passes for streams in p.inputs + p.outputs for t in streams}
        self.bytes_used -= sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def content(self) -> Dict[str, Any]:
        """What `load` of another process needs."""
        kept = {step: [(one.inputs, one.outputs) for one in passes] for step, passes in self.kept.items()}
        return {"memory": self.memory, "bytes_used": self.bytes_used, "kept": kept}

    def load(self, content: Dict[str, Any]) -> None:
        self.memory, self.bytes_used = content["memory"], content["bytes_used"]
        self.kept = {step: [_Pass(*both) for both in passes] for step, passes in content["kept"].items()}

    def close(self) -> None:
        """The generation is over: let go of the tensors on the device."""
        self._last = (None, None)

    def deltas(self, step: int, region: Region) -> List[Streams]:
        """What the region's blocks added at this kept step, one entry per branch."""
        return [
            tuple(after - before for after, before in zip(one.outputs[region.stop - 1], one.inputs[region.start]))
            for one in self.kept[step]
        ]
