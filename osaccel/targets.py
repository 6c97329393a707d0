# SPDX-License-Identifier: Apache-2.0
"""The upstream's names, as data: a new upstream is a new entry here. Nothing is imported."""

import sys
from typing import Any, Dict, NamedTuple, Optional, Tuple


class Guidance(NamedTuple):
    """How a pipeline puts [unconditional, conditional] into one forward of its transformer.

    Attributes:
        batch_first: arguments of the transformer's forward whose first dimension is the batch; tuples, lists and
            dicts of tensors among them too.
        block_dim: the batch's dimension in a block's hidden states; block_dim_parallel: under sequence parallelism.
    """

    batch_first: Tuple[str, ...]
    block_dim: int = 0
    block_dim_parallel: int = 0


class Target(NamedTuple):
    """A pipeline class whose calls are generations.

    Attributes:
        pipeline_class: name of the class in its module.
        block_path: attribute path from the pipeline to the nn.ModuleList of transformer blocks.
        hidden_states: names of the hidden-state arguments of a block, in the order in which it returns them.
        guidance: where guidance runs as one batch; None where nothing is known of it.
        state_modules: modules that may hold the sequence-parallel state, the one in use first.
    """

    pipeline_class: str = ""
    block_path: str = "transformer.transformer_blocks"
    hidden_states: Tuple[str, ...] = ("hidden_states",)
    guidance: Optional[Guidance] = None
    state_modules: Tuple[str, ...] = ()

    def owner_of_blocks(self, pipeline: Any) -> Any:
        """The module that holds the blocks: the transformer."""
        owner = pipeline
        for part in self.block_path.split(".")[:-1]:
            owner = getattr(owner, part)
        return owner

    def sequence_parallel_group(self) -> Optional[Any]:
        """The upstream's process group when sequence parallelism is on, else None."""
        for name in self.state_modules:
            state = sys.modules.get(name)
            if state is not None and state.get_sequence_parallel_state():
                info = getattr(state, "hccl_info", None) or getattr(state, "nccl_info", None)
                return getattr(info, "group", None)
        return None

    def block_batch_dim(self) -> int:
        """The batch's dimension in a block's hidden states, as the upstream runs now."""
        if self.guidance is None:
            return 0
        return self.guidance.block_dim if self.sequence_parallel_group() is None else self.guidance.block_dim_parallel


_OPEN_SORA = Target(
    "OpenSoraPipeline",
    guidance=Guidance(
        batch_first=(
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "added_cond_kwargs",
            "class_labels",
            "attention_mask",
            "encoder_attention_mask",
        ),
        block_dim_parallel=1,
    ),
    state_modules=("opensora.acceleration.parallel_states", "opensora.utils.parallel_states"),
)

TARGETS: Dict[str, Target] = {
    "opensora.sample.pipeline_opensora": _OPEN_SORA,
    "opensora.sample.pipeline_opensora_sp": _OPEN_SORA,
}


def target_of(pipeline: Any) -> Target:
    """The entry for a pipeline's class, or one that knows where blocks usually are and nothing else."""
    for base in type(pipeline).__mro__:
        target = TARGETS.get(base.__module__)
        if target is not None and target.pipeline_class == base.__name__:
            return target
    return Target()
