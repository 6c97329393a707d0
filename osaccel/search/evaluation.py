# SPDX-License-Identifier: Apache-2.0
"""What is known of one thing that a search tried: the record that searches decide by, and that files hold."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Dict, Mapping, Optional, Tuple

# The errors of one call after each of its steps; None where one was not finite.
Curve = Tuple[Optional[float], ...]


def key_of(config: Mapping[str, Any]) -> str:
    """The same text for equal configurations, whatever the order of their keys."""
    return json.dumps(config, sort_keys=True, allow_nan=False)


@dataclass(frozen=True)
class Evaluation:
    """One configuration, run on the recorded calls.

    Args:
        config: what was run, JSON-able: msModelSlim's four keys, or a plan's content, with the calls' numbers where it
            was not run on all.
        error: relative L2 distance of the final latents from the plain ones, mean over the calls; None if not finite.
        block_forwards: network work it took: block calls x share of the batch.
        psnr: of the decoded frames in dB, where frames are judged.
        resumed_at: the first step that was computed.
        seconds: wall time.
        curves: per call, the error after each step.
        worker: who ran it.
        details: what else a search wants to know later, JSON-able.
    """

    config: Mapping[str, Any]
    error: Optional[float]
    block_forwards: float
    psnr: Optional[float] = None
    resumed_at: int = 0
    seconds: float = 0.0
    curves: Tuple[Curve, ...] = ()
    worker: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells it from the evaluations of other configurations."""
        return key_of(self.config)

    def to_json(self) -> Dict[str, Any]:
        """A JSON-able mapping of the same names; numbers in it are finite."""
        content = asdict(self)
        content["curves"] = [list(curve) for curve in self.curves]
        if not self.details:
            del content["details"]
        return content

    @classmethod
    def from_json(cls, content: Any) -> "Evaluation":
        """What `to_json` gave.

        Raises:
            ValueError: it is not that; the message names the key.
        """
        if not isinstance(content, dict):
            raise ValueError(f"an evaluation must be a mapping, got {type(content).__name__}.")
        unknown = sorted(set(content) - {item.name for item in fields(cls)})
        if unknown:
            raise ValueError(f"an evaluation has no key {unknown[0]!r}.")
        for name, kinds in _KINDS.items():
            if name in content and not _is(content[name], kinds):
                raise ValueError(f"{name} of an evaluation cannot be {content[name]!r}.")
        missing = [name for name in ("config", "error", "block_forwards") if name not in content]
        if missing:
            raise ValueError(f"an evaluation needs the key {missing[0]!r}.")
        return cls(**{**content, "curves": tuple(tuple(curve) for curve in content.get("curves", ()))})


_NUMBER, _MAYBE = (int, float), (int, float, type(None))
_KINDS: Dict[str, Tuple[type, ...]] = {
    "config": (dict,), "error": _MAYBE, "block_forwards": _NUMBER,
    "psnr": _MAYBE, "resumed_at": (int,), "seconds": _NUMBER, "curves": (list,), "worker": (int,),
    "details": (dict,),
}  # fmt: skip


def _is(value: Any, kinds: Tuple[type, ...]) -> bool:
    # True is an int to Python.
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
