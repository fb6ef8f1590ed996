"""Sources: one module per way conversations are stored. Importing this registers all of them."""

from megatron_vlm.data.sources import llava_json as llava_json
from megatron_vlm.data.sources import messages as messages
from megatron_vlm.data.sources.base import SOURCES, Source, is_here, keys_of, make_source, tell_remarks
from megatron_vlm.data.sources.files import Extent, FileSource

__all__ = ["SOURCES", "Extent", "FileSource", "Source", "is_here", "keys_of", "make_source", "tell_remarks"]
