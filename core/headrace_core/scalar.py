"""Types of numbers, by the names that torch, safetensors and config.json have for them. No torch."""

from __future__ import annotations

from enum import Enum


class Scalar(Enum):
    """A type of numbers; the value is torch's name of it, and config.json's."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8_E4M3 = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    FLOAT8_E8M0 = "float8_e8m0fnu"
    INT64 = "int64"
    INT32 = "int32"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return _ITEMSIZES.get(self, 1)


_ITEMSIZES = {
    Scalar.FLOAT64: 8, Scalar.INT64: 8, Scalar.FLOAT32: 4, Scalar.INT32: 4, Scalar.FLOAT16: 2, Scalar.BFLOAT16: 2
}  # fmt: skip
"""Of those that are wider than a byte."""

COMPUTE = (Scalar.FLOAT32, Scalar.BFLOAT16, Scalar.FLOAT16)
"""What weights are brought to, and what is computed in."""

SAFETENSORS = {
    "F64": Scalar.FLOAT64,
    "F32": Scalar.FLOAT32,
    "F16": Scalar.FLOAT16,
    "BF16": Scalar.BFLOAT16,
    "F8_E4M3": Scalar.FLOAT8_E4M3,
    "F8_E5M2": Scalar.FLOAT8_E5M2,
    "F8_E8M0": Scalar.FLOAT8_E8M0,
    "I64": Scalar.INT64,
    "I32": Scalar.INT32,
    "I8": Scalar.INT8,
    "U8": Scalar.UINT8,
    "BOOL": Scalar.BOOL,
}
"""By the names that a file's header has for them."""
