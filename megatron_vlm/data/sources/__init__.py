"""Sources: one module per way conversations are stored. Importing this registers all of them."""

from megatron_vlm.data.sources import llava_json as llava_json
from megatron_vlm.data.sources.base import SOURCES, Extent, RecordFile, tell_remarks

__all__ = ["SOURCES", "Extent", "RecordFile", "tell_remarks"]
