"""Projectors from vision features to the language model's width. Importing this registers all of them."""

from megatron_vlm.models.projectors import cluster as cluster
from megatron_vlm.models.projectors import downsample as downsample
from megatron_vlm.models.projectors import standard as standard
from megatron_vlm.models.projectors.base import PROJECTORS, PatchGrid, build_projector, count_rows

__all__ = ["PROJECTORS", "PatchGrid", "build_projector", "count_rows"]
