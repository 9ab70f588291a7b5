"""Part `cluster`: a router, a prefill and a decode process on one GPU, what their clients see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.checkpoint.torch_scalar import TORCH_DTYPES
from headrace_core.families.config import ModelConfig
from headrace_core.kv.layout import CacheDtype, KvLayout
from headrace_core.model.build import num_weight_bytes
from headrace_core.scalar import Scalar
from headrace_router.testing import write_tokenizer

from tests.perf.closed_loop import asking, cell_figures, closed_loop, random_prompts
from tests.perf.gpu_engine.shapes import Shape
from tests.perf.gpu_engine.weights import NotPossibleError, OnBytes, write_random_checkpoint

_START_S = 1800.0
_MAX_STEP_TOKENS = 4096
_POOL_SPARE = 1.25
# What a worker's process takes beside weights and pages: CUDA's context, activations, captured steps.
_WORKER_BYTES = 4 << 30
_MIB = 1 << 20


def measure_cluster(
    shape: Shape,
    folder: Path,
    *,
    device: str,
    on_bytes: OnBytes,
    report: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the checkpoint, serve it, return what clients saw of every load at every concurrency.

    `keep` gets the figures of the part so far after each load and concurrency.

    Raises:
        NotPossibleError: disk or GPU memory are too small.
        HeadraceError: the cluster does not start, or a request fails.
    """
    config = shape.model_config(folder)
    dtype = TORCH_DTYPES[Scalar(config.checkpoint_dtype)]
    cache_dtype = CacheDtype.BFLOAT16 if dtype == torch.bfloat16 else CacheDtype.FLOAT32
    pool_mib = pool_size_mib(shape, config.kv_layout(shape.page_size, cache_dtype))
    weight_bytes = num_weight_bytes(config, dtype)
    if device == "cuda":
        check_gpu_memory(torch.cuda.mem_get_info()[0], weight_bytes, pool_mib * _MIB)
    report(f"writing {weight_bytes / 1e9:.1f} GB of random weights to {folder}")
    write_random_checkpoint(folder, config, device=device, on_bytes=on_bytes)
    if device == "cuda":
        torch.cuda.empty_cache()
    write_tokenizer(folder)
    report("starting router, prefill and decode worker")
    with LocalCluster(
        folder,
        worker_options=_worker_options(shape, device, pool_mib),
        start_timeout_s=_START_S,
    ) as cluster:
        cells = asyncio.run(_measure_cells(cluster.router_address, shape, config, report, keep))
    return {
        "layers": config.num_layers,
        "weight_gb": round(weight_bytes / 1e9, 2),
        "kv_pool_mib": pool_mib,
        "max_step_tokens": _MAX_STEP_TOKENS,
        "cells": cells,
    }


def _worker_options(shape: Shape, device: str, pool_mib: int) -> dict[str, str | int | float | bool | Path]:
    return {
        "device": device,
        "page-size": shape.page_size,
        "kv-pool-mib": pool_mib,
        "max-context-tokens": longest(shape),
        "max-step-tokens": _MAX_STEP_TOKENS,
        # One more, and one in 15: a router keeps slots for other clients (`headrace_router.placement.policy`).
        "max-step-sequences": max(shape.concurrencies) * 16 // 15 + 1,
    }


def longest(shape: Shape) -> int:
    """Return the tokens of the longest request, rounded up to whole pages, and one page more."""
    most = max(num_in + num_out for num_in, num_out in shape.loads)
    return (-(-most // shape.page_size) + 1) * shape.page_size


def pool_size_mib(shape: Shape, layout: KvLayout) -> int:
    """Return the MiB of pages that hold the longest requests of all clients at once, and some more."""
    pages = max(shape.concurrencies) * (longest(shape) // shape.page_size)
    return int(pages * _POOL_SPARE * layout.page_bytes) // _MIB + 1


def check_gpu_memory(free: int, weight_bytes: int, pool_bytes: int) -> None:
    """Check that a GPU's free memory holds two workers.

    Raises:
        NotPossibleError: it does not, with the figures.
    """
    needed = 2 * (weight_bytes + pool_bytes + _WORKER_BYTES)
    if needed > free:
        raise NotPossibleError(
            f"the GPU has {free / 1e9:.1f} GB free; two workers need {needed / 1e9:.1f} GB (weights "
            f"{weight_bytes / 1e9:.1f}, pages {pool_bytes / 1e9:.1f} and {_WORKER_BYTES / 1e9:.1f} each): "
            "shrink the network with --layers"
        )


async def _measure_cells(
    address: str,
    shape: Shape,
    config: ModelConfig,
    report: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []
    async with AsyncClient(address) as client:
        for load in shape.loads:
            ask = asking(client, load[1])
            for clients in shape.concurrencies:
                report(f"{load[0]}/{load[1]}, {clients} clients")
                # Kernels are compiled for what they have not met yet: the first round does not count.
                await closed_loop(ask, random_prompts(load, config.vocab_size, clients, seed=-1), clients)
                prompts = random_prompts(load, config.vocab_size, clients * shape.requests_per_client, seed=clients)
                began_s = time.monotonic()
                times = await closed_loop(ask, prompts, clients)
                cells.append(cell_figures(load, clients, times, time.monotonic() - began_s))
                keep({"cells": cells})
    return cells
