"""A recipe's layout in numbers, as `tools/show_layout.py` has them."""

from megatron_vlm.config.schema import Config
from megatron_vlm.planner.layout import LayoutView, view_layout
from megatron_vlm.training.recipe import resolve_recipe


def layout_of(name: str, config: Config, world_size: int, ranks_per_node: int = 8) -> LayoutView:
    """Resolves the recipe and lays it out. Raises what both raise."""
    resolved = resolve_recipe(config, world_size, min(world_size, ranks_per_node))
    return view_layout(name, resolved.config, resolved.model, world_size)
