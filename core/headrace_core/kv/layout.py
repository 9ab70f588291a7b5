"""What the bytes of a page mean, and how many there are.

Source: `KvLayout` in types.proto, of which this is the value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class CacheDtype(Enum):
    """Scalar type of cached values; the value is torch's name for it."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def itemsize(self) -> int:
        """Bytes a value takes."""
        return 4 if self is CacheDtype.FLOAT32 else 2


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """MLA: a token caches `c_kv` [kv_lora_rank] and `k_pe` [rope_dim] per layer."""

    kv_lora_rank: int
    rope_dim: int

    def page_shape(self, page_size: int) -> tuple[int, ...]:
        """Return [page_size, kv_lora_rank + rope_dim]."""
        return (page_size, self.kv_lora_rank + self.rope_dim)


@dataclass(frozen=True, slots=True)
class KeyValueAttention:
    """GQA: a token caches a key and a value [num_kv_heads, head_dim] per layer."""

    num_kv_heads: int
    head_dim: int

    def page_shape(self, page_size: int) -> tuple[int, ...]:
        """Return [2, page_size, num_kv_heads, head_dim]; keys, then values."""
        return (2, page_size, self.num_kv_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Layout of a sequence's cache; equal layouts can exchange pages."""

    num_layers: int
    page_size: int
    dtype: CacheDtype
    attention: LatentAttention | KeyValueAttention

    @property
    def page_shape(self) -> tuple[int, ...]:
        """Shape of one page of one layer."""
        return self.attention.page_shape(self.page_size)

    @property
    def page_layer_bytes(self) -> int:
        """Bytes of one page of one layer; contiguous."""
        return math.prod(self.page_shape) * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.num_layers * self.page_layer_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes a token takes over all layers."""
        return self.page_bytes // self.page_size

    def num_pages(self, num_tokens: int) -> int:
        """Return how many pages hold `num_tokens`, rounding up."""
        return -(-num_tokens // self.page_size)
