# SPDX-License-Identifier: Apache-2.0
"""The upstream's names, as data: a new upstream is a new entry here."""

from typing import Dict, NamedTuple, Tuple


class Target(NamedTuple):
    """A pipeline class whose calls are generations.

    Attributes:
        pipeline_class: name of the class in its module.
        block_path: attribute path from the pipeline to the nn.ModuleList of transformer blocks.
        hidden_states: names of the hidden-state arguments of a block, in the order in which it returns them.
        state_modules: modules that may hold the sequence-parallel state, the one in use first.
    """

    pipeline_class: str
    block_path: str = "transformer.transformer_blocks"
    hidden_states: Tuple[str, ...] = ("hidden_states",)
    state_modules: Tuple[str, ...] = ()


_OPEN_SORA_STATE = ("opensora.acceleration.parallel_states", "opensora.utils.parallel_states")

TARGETS: Dict[str, Target] = {
    "opensora.sample.pipeline_opensora": Target("OpenSoraPipeline", state_modules=_OPEN_SORA_STATE),
    "opensora.sample.pipeline_opensora_sp": Target("OpenSoraPipeline", state_modules=_OPEN_SORA_STATE),
}
