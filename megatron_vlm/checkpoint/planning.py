"""The parts of tensors that each rank writes: megatron-core's sharded state as torch's checkpoint format has it.

Hazard: these are parts of dist_checkpointing.save, taken one by one, because as a whole it writes files on some ranks
while the others wait for them in a collective: what goes wrong there would be told by one rank and never end on the
rest. Here nothing is written.
"""

import io
from typing import Any

from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from megatron_vlm.runtime.collectives import gather_objects


class Planner:
    """Decides once: the same tensors are saved every time."""

    def __init__(self) -> None:
        self._plan: SavePlan | None = None
        self.metadata: Metadata | None = None  # of the whole checkpoint, on rank 0

    def items(
        self, sharded: dict[str, Any], world: ProcessGroup
    ) -> tuple[list[tuple[WriteItem, Tensor | io.BytesIO]], dict[str, Any]]:
        """Lists this rank's parts, and what is no part of a tensor and the same on every rank. Collective at first."""
        parts, common = save_preprocess(sharded, validate_access_integrity=self._plan is None)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(parts, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=world.rank() == 0)
        if self._plan is None:
            self._plan = planner.create_local_plan()
            plans = gather_objects(self._plan, world)
            if plans is not None:
                self.metadata = planner.create_global_plan(plans)[1]
        return [(item, planner.resolve_data(item)) for item in self._plan.items], common
