"""Load a Hugging Face checkpoint: check everything that headers and config tell, then build layer by layer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from headrace_kernels import backend

from headrace_core.checkpoint.check_tensors import SCALE_SUFFIX, check_tensors
from headrace_core.checkpoint.memory import WORKING_BYTES, available_bytes, check_fits
from headrace_core.checkpoint.mtp_tensors import check_mtp_is_stored, mtp_names, with_mtp
from headrace_core.checkpoint.safetensors_file import StoredTensor, read_headers
from headrace_core.checkpoint.torch_scalar import TORCH_DTYPES
from headrace_core.checkpoint.weight_reader import WeightReader
from headrace_core.errors import CheckpointError, StartupError
from headrace_core.families.config import ModelConfig
from headrace_core.families.config_json import parse_config
from headrace_core.families.table import weights as weight_tree
from headrace_core.kv.layout import CacheDtype, KvLayout
from headrace_core.model.build import build_network, num_weight_bytes
from headrace_core.model.expert_store import ExpertReader, num_slots, open_store, spare_bytes, with_replicas
from headrace_core.model.model import Model, ModelIdentity
from headrace_core.model.numerics import Numerics, check_exact, exact_fingerprint
from headrace_core.model.rope_angles import check_angles
from headrace_core.model.travelling_tokens import check_fp8_dispatch, dispatch_fingerprint
from headrace_core.model.weights_dtype import WeightsDtype, check_int8, held_fingerprint, holding
from headrace_core.model.working_memory import StepLimits, gpu_working_bytes
from headrace_core.process import release_freed_memory
from headrace_core.ranks.dispatch_dtype import DispatchDtype
from headrace_core.ranks.group import ALONE, Ranks
from headrace_core.ranks.sharding import Owners, Sharding
from headrace_core.scalar import Scalar

log = logging.getLogger(__name__)


def load_model(
    directory: Path,
    *,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    weights_dtype: WeightsDtype = WeightsDtype.AUTO,
    dispatch_dtype: DispatchDtype = DispatchDtype.AUTO,
    device: str = "cpu",
    numerics: Numerics = Numerics.FAST,
    kv_pool_bytes: int = 0,
    step_limits: StepLimits | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    expert_owners: Mapping[int, Owners] | None = None,
    has_mtp: bool = False,
    redundant_experts: int | None = None,
) -> Model:
    """Load the checkpoint in `directory`; in a group of ranks, this rank's part of it, and all of them call it.

    Args:
        directory: holds config.json and model.safetensors or its shards with their index.
        dtype: type of weights and compute: "float32", "bfloat16", "float16", or "auto", the checkpoint's.
        kv_cache_dtype: how latents are kept: "fp8_e4m3", or "auto", as values of `dtype`.
        weights_dtype: how weights are held.
        dispatch_dtype: as what tokens reach routed experts, whether they travel or not.
        device: torch's name of where to compute.
        numerics: how far a token's bits are promised.
        kv_pool_bytes: memory that pages will take; counted when the model is checked against what is available.
        step_limits: of the steps that will run, None: the settings' defaults; counted likewise on a GPU.
        on_progress: called with (bytes read, bytes to read) after every tensor.
        ranks: the group, and where this process stands in it.
        expert_owners: by layer, which ranks hold its experts; others' lie in a row. For whole experts (EP).
        has_mtp: load the checkpoint's module for multi-token prediction, too.
        redundant_experts: replicas that each layer has from the beginning, with `Model.store` to move experts while
            steps go on; tokens are always dispatched to their experts then. For EP; None: experts stay.

    Raises:
        CheckpointError: before anything large is allocated: BAD_CONFIG, UNSUPPORTED_MODEL, MISSING_TENSOR,
            EXTRA_TENSOR, BAD_TENSOR_SHAPE, DAMAGED_FILE, MODEL_TOO_LARGE; while weights are read: NON_FINITE_WEIGHT.
        StartupError: NO_EXACT, NO_INT8, NO_FP8_CACHE, NO_FP8_DISPATCH, BAD_RANKS, before anything is read but
            config.json; NO_FP8_WEIGHTS, NO_MTP, before weights are.
        UnavailableError: RANK_LOST, another rank is gone.
    """
    config = parse_config(directory)
    ranks.layout.check(config)
    if has_mtp:
        config = with_mtp(config, ranks.layout.size)
    check_angles(config)
    dtype = config.checkpoint_dtype if dtype == "auto" else dtype
    compute_dtype = TORCH_DTYPES[Scalar(dtype)]
    cache_dtype = CacheDtype(dtype if kv_cache_dtype == "auto" else kv_cache_dtype)
    if numerics is Numerics.EXACT:
        check_exact(config, backend(torch.empty(0, device=device)), compute_dtype, cache_dtype)
        if weights_dtype is WeightsDtype.FP8:
            raise StartupError("NO_EXACT", "--numerics exact: there are no such kernels for --weights-dtype fp8_e4m3")
    if weights_dtype is WeightsDtype.INT8:
        check_int8(device)
    if dispatch_dtype is DispatchDtype.FP8:
        check_fp8_dispatch(config, ranks.layout)
    layout = _layout_of_a_token(config, cache_dtype)
    stored = read_headers(directory)
    check_mtp_is_stored(config, stored)
    names = check_tensors(config, stored)
    is_dispatched = numerics is Numerics.EXACT or redundant_experts is not None
    if redundant_experts is not None:
        expert_owners = with_replicas(ranks.layout, config, redundant_experts)
    sharding = Sharding(ranks.layout, ranks.rank, is_dispatched, expert_owners or {})
    is_read = {weight.name for weight in sharding.weights(weight_tree(config))}
    names = [name for name in names if name.removesuffix(SCALE_SUFFIX) in is_read]
    progress = _Progress(sum(stored[name].size for name in names), on_progress)
    reader = WeightReader(stored, config, dtype=compute_dtype, device=device, on_progress=progress.add)
    held = holding(weights_dtype, config, reader.is_block_fp8, sharding, lambda: reader.empty(0))
    weight_bytes = num_weight_bytes(config, compute_dtype, held, sharding)
    held_dtype = dtype if weights_dtype is WeightsDtype.AUTO else weights_dtype.value
    log.info("weights", extra={"dtype": held_dtype, "compute_dtype": dtype, "bytes": weight_bytes})
    room_bytes = 0
    if redundant_experts is not None:
        room_bytes = spare_bytes(config, num_slots(ranks.layout, config, redundant_experts), compute_dtype, held)
        log.info("room to move experts, beside the weights", extra={"bytes": room_bytes})
    working_bytes = WORKING_BYTES
    if device == "cuda":
        limits = step_limits or StepLimits()
        working_bytes = gpu_working_bytes(config, layout, limits, kv_pool_bytes, itemsize=compute_dtype.itemsize)
    check_fits(weight_bytes + room_bytes, kv_pool_bytes, available_bytes(device), working_bytes)
    weights = build_network(config, reader, held, ranks, sharding, dispatch_dtype)
    _check_tied_head(config, stored, reader)
    release_freed_memory()
    if ranks.layout.size > 1:
        _share_digests(reader, ranks)
    fingerprint = held_fingerprint(reader.fingerprint(leaving_out=mtp_names(config)), weights_dtype)
    fingerprint = dispatch_fingerprint(fingerprint, dispatch_dtype)
    if numerics is Numerics.EXACT:
        fingerprint = exact_fingerprint(fingerprint, ranks.layout)
    identity = ModelIdentity(fingerprint, compute_dtype, weight_bytes, cache_dtype, numerics)
    store = None
    if redundant_experts is not None:
        again = WeightReader(stored, config, dtype=compute_dtype, device=device, expected=dict(reader.digests))
        store = open_store(ExpertReader(again, config, held), [each.feed_forward for each in weights.layers], sharding)
    return Model(config, identity, weights, ranks, store)


def _share_digests(reader: WeightReader, ranks: Ranks) -> None:
    """Let each rank know the digests of what others read, so that a fingerprint is over the whole checkpoint."""
    for data in ranks.world.gather_bytes(json.dumps(reader.digests).encode()):
        reader.digests.update(json.loads(data))


def _layout_of_a_token(config: ModelConfig, cache_dtype: CacheDtype) -> KvLayout:
    try:
        return config.kv_layout(1, cache_dtype)
    except ValueError as error:
        raise StartupError("NO_FP8_CACHE", f"--kv-cache-dtype {cache_dtype.value}: {error}; use auto") from error


class _Progress:
    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._done = 0
        self._total = total
        self._on_progress = on_progress

    def add(self, count: int) -> None:
        self._done += count
        if self._on_progress is not None:
            self._on_progress(min(self._done, self._total), self._total)


def _check_tied_head(config: ModelConfig, stored: dict[str, StoredTensor], reader: WeightReader) -> None:
    root = weight_tree(config).root
    head, embedding = f"{root}lm_head.weight", f"{root}model.embed_tokens.weight"
    if not config.is_embedding_tied or head not in stored:
        return
    if reader.digest(head) != reader.digest(embedding):
        raise CheckpointError(
            "BAD_CONFIG",
            "config.json: tie_word_embeddings is true but lm_head.weight differs from the embedding; "
            "set it to false or remove the tensor",
        )
