# SPDX-License-Identifier: Apache-2.0
"""Self-attention of a generation: its mask tested once a step instead of in every block, and its kernel by name.

Invariant: a mask is left out only after every latent was found visible in it, and a kernel is put in place of the
checkpoint's own only for calls with such a mask; cross-attention is never touched.
"""

import contextlib
import functools
import logging
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch

from osaccel.attaching import hide_from_copies, is_rank_zero, put_back
from osaccel.formats import SettingsError

logger = logging.getLogger("osaccel")

# The model and the attention processor whose code was read: without a mask they do what they do with one of only ones.
MODEL, PROCESSOR = "OpenSoraT2V", "AttnProcessor2_0"
FLASH = "flash"
_said = set()  # type: ignore[var-annotated]
# The transformers whose kernels are chosen by an Entry, by id.
_chosen: Dict[int, "Entry"] = {}


class Facts(NamedTuple):
    """What the choice of a kernel depends on.

    Attributes:
        known: the transformer is the one named by MODEL, without downsampling before its attention.
        own_kernels: the upstream runs attention kernels of the accelerator's maker and none of torch's.
        device, dtype: of the transformer's parameters; `device` is a type such as "cpu".
        head_dim: channels of one attention head.
        capability: the GPU's compute capability, None elsewhere.
        built: this torch has the flash kernel.
    """

    known: bool = False
    own_kernels: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    head_dim: int = 0
    capability: Optional[Tuple[int, int]] = None
    built: bool = True


def obstacle_to_flash(facts: Facts) -> Optional[str]:
    """Why torch's flash kernel cannot serve this generation, or None when it can."""
    if not facts.known:
        return f"the transformer is not Open-Sora-Plan v1.2's {MODEL}"
    if facts.own_kernels:
        return "on this device the upstream uses attention kernels that are not torch's"
    if facts.capability is None:
        return f"it needs a GPU, the transformer is on {facts.device}"
    if not facts.built:
        return "this torch was built without it"
    if facts.capability < (8, 0):
        return "it needs compute capability 8.0, this GPU has {}.{}".format(*facts.capability)
    if facts.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, the transformer is {str(facts.dtype)[6:]}"
    if facts.head_dim > 256:
        return f"it takes heads of at most 256 channels, these have {facts.head_dim}"
    return None


def attach(pipeline: Any, wanted: str = "keep", place: str = "OSACCEL_ATTENTION") -> Optional[Callable[[], None]]:
    """Test the mask at the transformer's entry and use the kernel asked for; returns what undoes it.

    Args:
        pipeline: has the `transformer`, compiled or not.
        wanted: keep (the checkpoint's own kernel), flash, or auto (flash where it applies, else keep).
        place: where `wanted` was set, for the error message.

    Returns None, having done nothing, for another transformer and where leaving out the mask is not the same.

    Raises:
        SettingsError: flash was asked for and does not apply.
    """
    transformer: Any = getattr(pipeline, "transformer", None)
    facts = facts_of(transformer)
    reason = obstacle_to_flash(facts)
    if wanted == FLASH and reason:
        raise SettingsError(f"{place}: flash cannot be used: {reason}. Use keep, or auto for flash where it applies.")
    if wanted == "auto":
        _say(f"attention: {'flash' if reason is None else f'kept, because flash cannot be used: {reason}'}")
    if not facts.known or facts.own_kernels:
        return None
    return Entry(_processors(transformer), None if wanted == "keep" or reason else FLASH).attach(transformer)


def facts_of(transformer: Any) -> Facts:
    """The facts about a transformer, compiled or not; `known` is False for anything but MODEL."""
    model = getattr(transformer, "_orig_mod", transformer)
    if type(model).__name__ != MODEL or not _processors(model):
        return Facts()
    parameter = next(model.parameters())
    upstream = sys.modules.get(type(model).__module__)
    return Facts(
        known=True,
        own_kernels=getattr(upstream, "npu_config", None) is not None,
        device=parameter.device.type,
        dtype=parameter.dtype,
        head_dim=int(model.config.attention_head_dim),
        capability=_capability(parameter.device),
        built=getattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)(),
    )


def _capability(device: torch.device) -> Optional[Tuple[int, int]]:
    backend = getattr(torch, device.type, None)
    found = getattr(backend, "get_device_capability", lambda _: None)(device)
    return found if isinstance(found, tuple) else None


def _processors(transformer: Any) -> List[Any]:
    """The self-attention processors of all blocks; none when a block's is not as expected."""
    processors = []
    for block in getattr(transformer, "transformer_blocks", ()):
        attention = getattr(block, "attn1", None)
        processor = getattr(attention, "processor", None)
        is_known = type(processor).__name__ == PROCESSOR and hasattr(processor, "attention_mode")
        if not is_known or getattr(attention, "downsampler", None) is not None:
            return []
        processors.append(processor)
    return processors


class Entry:
    """A forward pre-hook of the transformer: leaves out a mask that hides nothing, and names the kernel for that call.

    It runs in eager Python before anything compiled, so that neither the test nor the choice breaks a graph.

    Args:
        processors: the self-attention processors.
        kernel: the upstream's name of the kernel to use where the mask hides nothing, or None for each one's own.
    """

    def __init__(self, processors: List[Any], kernel: Optional[str]):
        self.kernel = kernel
        self._current: Optional[str] = None
        self._own = [(processor, processor.attention_mode) for processor in processors]

    def attach(self, transformer: torch.nn.Module) -> Callable[[], None]:
        undo = contextlib.ExitStack()
        if self.kernel:
            self._claim(transformer, undo)
        handle = transformer.register_forward_pre_hook(self._on_call, with_kwargs=True)
        undo.callback(handle.remove)
        undo.callback(hide_from_copies(transformer, lambda attributes: _without_hook(attributes, handle.id)))
        return undo.close

    def _claim(self, transformer: torch.nn.Module, undo: contextlib.ExitStack) -> None:
        """Have the processors for this generation alone: their kernel is one for all that call them."""
        if _chosen.setdefault(id(transformer), self) is not self:
            raise RuntimeError(
                f"attention: {self.kernel} is chosen call by call, so pipelines that share a transformer cannot use it "
                "at once; call one after the other, or use OSACCEL_ATTENTION=keep."
            )
        undo.callback(_chosen.pop, id(transformer))
        undo.callback(self._use, None)
        for processor, own in self._own:
            undo.callback(hide_from_copies(processor, functools.partial(put_back, name="attention_mode", value=own)))

    def _on_call(self, module: Any, args: tuple, kwargs: dict) -> Tuple[tuple, dict]:
        visible = "attention_mask" in kwargs and _hides_nothing(kwargs["attention_mask"])
        if not visible and self.kernel:
            _say(f"attention: the mask hides some latents, so {self.kernel} is not used")
        self._use(self.kernel if visible else None)
        return args, dict(kwargs, attention_mask=None) if visible else kwargs

    def _use(self, kernel: Optional[str]) -> None:
        if kernel == self._current:
            return
        for processor, own in self._own:
            processor.attention_mode = kernel or own
        self._current = kernel


def _without_hook(attributes: Dict[str, Any], number: int) -> None:
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        attributes[name] = type(attributes[name])(item for item in attributes[name].items() if item[0] != number)


def _hides_nothing(mask: Optional[torch.Tensor]) -> bool:
    # Masks of other dimensions are ignored by the upstream. The test waits for the device, as the blocks' own tests do.
    return mask is None or mask.ndim != 4 or bool(mask.all())


def _say(message: str) -> None:
    """Once a process, on the rank that logs."""
    if message not in _said and is_rank_zero():
        logger.info("%s", message)
    _said.add(message)
