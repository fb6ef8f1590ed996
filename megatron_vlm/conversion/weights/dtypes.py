"""The dtypes that weights have on the disk: one table for safetensors' headers, torch's archives, and sizes."""

from typing import NamedTuple


class Dtype(NamedTuple):
    """A dtype and its names in files.

    Args:
        code: in a safetensors header.
        storage: the legacy class of torch that its pickles name.
        num_bytes: of an element.
    """

    code: str
    storage: str
    num_bytes: int


DTYPES = {  # by torch's name
    "float64": Dtype("F64", "DoubleStorage", 8),
    "float32": Dtype("F32", "FloatStorage", 4),
    "float16": Dtype("F16", "HalfStorage", 2),
    "bfloat16": Dtype("BF16", "BFloat16Storage", 2),
    "int64": Dtype("I64", "LongStorage", 8),
    "int32": Dtype("I32", "IntStorage", 4),
    "int16": Dtype("I16", "ShortStorage", 2),
    "int8": Dtype("I8", "CharStorage", 1),
    "uint8": Dtype("U8", "ByteStorage", 1),
    "bool": Dtype("BOOL", "BoolStorage", 1),
}
BY_CODE = {dtype.code: name for name, dtype in DTYPES.items()}
