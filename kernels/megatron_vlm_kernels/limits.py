"""Limits of the kernels, to be asked without importing triton."""

MAX_HEAD_WIDTH = 256  # wider heads do not fit a program's registers
MAX_NORM_COLUMNS = 16384  # of RMSNorm's rows, each in one tile: wider ones spill from a program's registers
MAX_SQUARE_NUMBERS = 65536  # of space to depth's tile


def square_numbers(num_channels: int, factor: int) -> int:
    """Numbers in the tile of a square of patches: both sides to the next power of two."""
    return _next_power_of_2(factor * factor) * _next_power_of_2(num_channels)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
