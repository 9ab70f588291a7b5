"""Write rows of new tokens into a paged cache.

Shapes: T new tokens, S slots in the cache (pages x page_size), D row width. MLA stores rows of kv_lora_rank + rope_dim;
GQA stores keys and values with the same function, one call each.
A slot is `page_id * page_size + offset`; slot -1 means "skip this token".
Bytes moved: 2 * T * D * itemsize, so the kernel is bound by memory bandwidth.

`latent_store` is the entry; `latent_store_ref` is the specification it is tested against.
"""

from __future__ import annotations

from torch import Tensor


def latent_store(latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Copy `latents[t]` to `cache[slot_mapping[t]]` for every t whose slot is not -1.

    Args:
        latents: [T, D], any float dtype; rows contiguous.
        cache: [S, D], dtype of `latents`; rows contiguous; written in place.
        slot_mapping: [T] int64; each value in [-1, S); values other than -1 are distinct.

    Raises:
        ValueError: a shape, dtype or stride does not fit.
    """
    num_tokens, dim = latents.shape
    if cache.shape[1:] != (dim,) or slot_mapping.shape != (num_tokens,):
        raise ValueError(
            f"latents {tuple(latents.shape)}, cache {tuple(cache.shape)} and slot_mapping "
            f"{tuple(slot_mapping.shape)} do not fit [T, D], [S, D], [T]"
        )
    if latents.dtype != cache.dtype:
        raise ValueError(f"latents is {latents.dtype} but cache is {cache.dtype}")
    if latents.stride(1) != 1 or cache.stride(1) != 1:
        raise ValueError("rows of latents and cache must be contiguous")
    if num_tokens == 0:
        return
    if int(slot_mapping.min()) < 0:
        latent_store_ref(latents, cache, slot_mapping)
    else:
        cache.index_copy_(0, slot_mapping, latents)


def latent_store_ref(latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Specification of `latent_store` in plain torch."""
    kept = slot_mapping >= 0
    cache[slot_mapping[kept]] = latents[kept]
