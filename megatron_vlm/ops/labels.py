"""The label of a token whose prediction no loss counts: one number for the data, the losses and FP8's scales.

It is torch's own default (`ignore_index` of cross_entropy), so plain torch leaves the same tokens out.
"""

IGNORE = -100
