"""Names in the attention benchmark's results: the words that measuring and telling share; no torch here."""

PRODUCT = "megatron_vlm"
WHOLE, PACKED = "one document", "packed"
TURNS = "the ranks of a layout in turn on one device; the network is not included"
EXCHANGE = "all ranks at once, the exchange included"
