"""What the bytes of a page mean, and how many there are.

Source: `KvLayout` in types.proto, of which this is the value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from headrace_core.scalar import Scalar

_FP8_GROUP = 128
"""Columns of a latent that share a scale."""


class CacheDtype(Enum):
    """How values are cached; the value is the name that torch has for it, or options."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FP8_E4M3 = "fp8_e4m3"
    """Rows of bytes: a latent in float8_e4m3fn, its scales, rope columns in bfloat16 (`LatentAttention`)."""

    @property
    def element(self) -> Scalar:
        """What a page's shape counts."""
        return Scalar.UINT8 if self is CacheDtype.FP8_E4M3 else Scalar(self.value)


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """MLA: a token caches `c_kv` [kv_lora_rank] and `k_pe` [rope_dim] per layer, and an indexer's key [index_dim].

    `index_dim` 0: attention is over all tokens, and there is no indexer.

    In fp8 a token's row is kv_lora_rank bytes of float8_e4m3fn, a float32 scale for each 128 columns of them (the last
    one's may be fewer), and rope_dim values of bfloat16: `headrace_kernels.latent_fp8`, FlashMLA's format.
    """

    kv_lora_rank: int
    rope_dim: int
    index_dim: int = 0

    def row_shape(self, dtype: CacheDtype) -> tuple[int, ...]:
        """Return [kv_lora_rank + rope_dim + index_dim], or in fp8 [bytes of a row].

        Raises:
            ValueError: an fp8 row of these widths would not be aligned, or would have an indexer's key.
        """
        if dtype is not CacheDtype.FP8_E4M3:
            return (self.kv_lora_rank + self.rope_dim + self.index_dim,)
        if self.index_dim:
            raise ValueError("fp8_e4m3 has no format for the keys of an indexer (sparse attention)")
        if self.kv_lora_rank % 4 or self.rope_dim % 2:
            raise ValueError(
                "fp8_e4m3 needs a latent width that is a multiple of 4 and an even rope width, "
                f"not {self.kv_lora_rank} and {self.rope_dim}"
            )
        return (self.kv_lora_rank + -(-self.kv_lora_rank // _FP8_GROUP) * 4 + self.rope_dim * 2,)

    def page_shape(self, page_size: int, dtype: CacheDtype) -> tuple[int, ...]:
        """Return [page_size, *row_shape]. Raises as `row_shape` does."""
        return (page_size, *self.row_shape(dtype))


@dataclass(frozen=True, slots=True)
class KeyValueAttention:
    """GQA: a token caches a key and a value [num_kv_heads, head_dim] per layer."""

    num_kv_heads: int
    head_dim: int

    def page_shape(self, page_size: int, dtype: CacheDtype) -> tuple[int, ...]:
        """Return [2, page_size, num_kv_heads, head_dim]; keys, then values.

        Raises:
            ValueError: `dtype` is fp8, for which keys and values have no format.
        """
        if dtype is CacheDtype.FP8_E4M3:
            raise ValueError("fp8_e4m3 is there for latents (MLA) alone, not for keys and values (GQA)")
        return (2, page_size, self.num_kv_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Layout of a sequence's cache; equal layouts can exchange pages.

    Making one raises ValueError if `dtype` can't hold what `attention` caches.
    """

    num_layers: int
    page_size: int
    dtype: CacheDtype
    attention: LatentAttention | KeyValueAttention

    def __post_init__(self) -> None:
        self.attention.page_shape(self.page_size, self.dtype)

    @property
    def page_shape(self) -> tuple[int, ...]:
        """Shape of one page of one layer; in fp8 of bytes."""
        return self.attention.page_shape(self.page_size, self.dtype)

    @property
    def page_layer_bytes(self) -> int:
        """Bytes of one page of one layer; contiguous."""
        return math.prod(self.page_shape) * self.dtype.element.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.num_layers * self.page_layer_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes a token takes over all layers."""
        return self.page_bytes // self.page_size

    def difference(self, other: KvLayout) -> str:
        """Say how this layout differs from `other`, with the options that decide it; empty if they are equal."""
        is_one_more = abs(self.num_layers - other.num_layers) == 1
        parts = (
            ("num_layers", self.num_layers, other.num_layers, " (--speculate mtp has one more)" * is_one_more),
            ("page_size", self.page_size, other.page_size, " (--page-size)"),
            ("dtype", self.dtype.value, other.dtype.value, " (--kv-cache-dtype, --dtype)"),
            ("attention", self.attention, other.attention, ""),
        )
        return ", ".join(f"{name} {mine}, not {theirs}{by}" for name, mine, theirs, by in parts if mine != theirs)

    def num_pages(self, num_tokens: int) -> int:
        """Return how many pages hold `num_tokens`, rounding up."""
        return -(-num_tokens // self.page_size)
