# SPDX-License-Identifier: Apache-2.0
"""What a found configuration is bound to, and the warning when a generation differs from it."""

import hashlib
import importlib
import os
from datetime import date
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch

from osaccel import __version__, formats
from osaccel.messages import shown

# What a configuration must share with a generation to be valid for it.
BINDING = ("steps", "blocks", "sampler", "resolution", "timesteps", "guidance_scale", "model")
DEFAULT_SPACING = "the scheduler's own"
# Before the names of a compiled module's parameters.
_COMPILED = "_orig_mod."


def of_call(pipeline: Any, arguments: Mapping[str, Any], blocks: int, timesteps: Optional[Sequence[float]]) -> Dict:
    """The binding values of a call, from its arguments; None where the call does not say."""
    size = [arguments.get(name) for name in ("num_frames", "height", "width")]
    return {
        "steps": len(timesteps) if timesteps is not None else arguments.get("num_inference_steps"),
        "blocks": blocks,
        "sampler": type(pipeline.scheduler).__name__,
        "resolution": size if all(isinstance(value, int) for value in size) else None,
        # The same number of steps elsewhere is another generation, and the two files of a search are of one piece.
        "timesteps": DEFAULT_SPACING if timesteps is None else digest_of([float(value) for value in timesteps]),
        "guidance_scale": _number(arguments.get("guidance_scale")),
    }


def _number(value: Any) -> Optional[float]:
    """A number of whatever kind; None for several of them and for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def of_search(
    call: Any, blocks: int, timesteps: Optional[Sequence[float]], prompts: int, ranks: int, metric: str
) -> Dict[str, Any]:
    """Everything an evaluation depends on; a cache search whose fingerprint differs starts anew.

    Args:
        call: the first recorded one, an osaccel.search.replay.Call.
        timesteps: the searched list it follows, or None.
        prompts, ranks: how many calls are recorded, and how many ranks generate each.
        metric: what candidates are judged by, in words.
    """
    pipeline = call.pipeline
    # diffusers keeps private entries there, one of them a list in the order of a set, another in every process.
    config = {key: value for key, value in getattr(pipeline.scheduler, "config", {}).items() if key[:1] != "_"}
    return {
        **of_call(pipeline, call.arguments, blocks, timesteps),
        "model": weights_digest(call.target.owner_of_blocks(pipeline)),
        "sampler_config": digest_of(config),
        "prompt": digest_of({name: call.arguments.get(name) for name in ("prompt", "negative_prompt")}),
        "arguments": digest_of(call.arguments),
        "prompts": prompts,
        "ranks": ranks,
        "metric": metric,
        "versions": versions(),
    }


def occasion(calls: Sequence[Any]) -> Dict[str, Any]:
    """When and on which prompts a search ran, for its report; a call's prompt is text, a list of texts, or None."""
    prompts = [call.arguments.get("prompt") for call in calls]
    return {
        "date": date.today().isoformat(),
        "prompts": [prompt if isinstance(prompt, (str, list)) else None for prompt in prompts],
    }


def versions() -> Dict[str, str]:
    found = {"osaccel": __version__}
    for name in ("torch", "diffusers"):
        found[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
    return found


def recorded_of(settings: Any) -> Tuple[str, Any]:
    """What is applied, and what it was made for: a plan's `made_for`, or the fingerprint of a four-key file's report.

    The second is a text where the report is damaged; empty where nothing is recorded.
    """
    if settings.plan is not None:
        return settings.plan_source, settings.plan.made_for
    path = settings.cache_file
    if path is None or not os.path.exists(formats.report_path(path)):
        return "", {}
    try:
        report = formats.read_file(formats.report_path(path))
    except formats.SettingsError as error:
        return path, f"its report is damaged: {error}"
    recorded = report.get("fingerprint", {}) if isinstance(report, dict) else None
    if not isinstance(recorded, dict):
        return path, f"its report is damaged: {formats.report_path(path)} holds no fingerprint"
    return path, recorded


def mismatches(recorded: Any, found: Mapping[str, Any]) -> List[str]:
    """How a generation differs from what `recorded_of` gave; what either does not say is no difference."""
    if isinstance(recorded, str):
        return [recorded]
    differing = [
        name
        for name in BINDING
        if recorded.get(name) is not None and found.get(name) is not None and recorded[name] != found[name]
    ]
    return [
        "the model's weights, or their dtype, are not those that it was searched for"
        if name == "model"
        else f"{name} was {shown(recorded[name])} when it was searched, is now {shown(found[name])}"
        for name in differing
    ]


def weights_digest(module: torch.nn.Module, samples: int = 64) -> str:
    """A digest of names, shapes and some values of every parameter: cheap, and different for another checkpoint.

    Raises whatever reading a parameter raises, of weights that are not at hand for example.
    """
    digest = hashlib.sha256()
    named = {name.replace(_COMPILED, ""): tensor for name, tensor in module.named_parameters(remove_duplicate=False)}
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_some_of(tensor.detach(), samples).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _some_of(tensor: torch.Tensor, samples: int) -> torch.Tensor:
    """Values at even distances; never a copy of the whole."""
    step = max(1, tensor.numel() // samples)
    if tensor.is_contiguous():
        return tensor.reshape(-1)[::step][: samples + 1]
    return torch.take(tensor, torch.arange(0, tensor.numel(), step, device=tensor.device)[: samples + 1])


def digest_of(value: Any) -> str:
    """A digest of call arguments: text, numbers, tensors, and lists and dicts of them; other objects by their type."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(b"[")
        for item in value:
            _feed(digest, item)
        digest.update(b"]")
    elif value is None or isinstance(value, (str, bytes, int, float, bool)):
        digest.update(f"{type(value).__name__} {value!r}".encode())
    else:
        digest.update(type(value).__qualname__.encode())
