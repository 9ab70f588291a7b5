"""From settings to a model with its cache, with progress that a person or a log can follow."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

from headrace_kernels import Backend, backend, choose_backend
from headrace_kernels.backend import instruction_set, what_is_missing
from headrace_kernels.dispatch import objection

from headrace_core.batch.spec import ModelLimits
from headrace_core.checkpoint.torch_scalar import scalar_of
from headrace_core.config import DecodeSettings, WorkerSettings
from headrace_core.engine.executor import MtpModel, StepModel
from headrace_core.errors import StartupError
from headrace_core.families.roofline_shape import shape_of
from headrace_core.grammar import Grammars
from headrace_core.hub import machine_bytes, name_of, with_folder
from headrace_core.kv.layout import CacheDtype, KvLayout
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.load import load_model
from headrace_core.model.model import Model
from headrace_core.model.numerics import Numerics
from headrace_core.model.self_check import check_kernels
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.model.working_memory import StepLimits
from headrace_core.progress import shown
from headrace_core.ranks.dispatch_dtype import DispatchDtype
from headrace_core.ranks.place import ALONE_PLACE, RankPlace
from headrace_core.roofline.hardware import find_hardware
from headrace_core.roofline.model_shape import Dtype
from headrace_core.transfer.memfd import Memfd
from headrace_core.transfer.memory import PageMemory, new_memory
from headrace_core.transfer.transports import memory_kind, usable
from headrace_core.worker.cpu_speed import measure_worker_cpu
from headrace_core.worker.op_metrics import Prediction
from headrace_core.worker.rank_group import (
    RankOfGroup,
    agree,
    group_experts,
    join,
    rank_cache,
    rank_of_group,
    redundant_experts,
)
from headrace_core.worker.warm_up import warm_up

log = logging.getLogger(__name__)

_TRIED_TOKENS = 2
"""What a worker without a GPU's kernels computes before it serves: one token, then two, so that a network that can't is
told at once."""
_ROOFLINE_DTYPES = {dtype.scalar: dtype for dtype in Dtype}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to step, and what others must know of it.

    `num_pages` are all lanes', as many each. `prediction` None: its operations are not timed. `group` None: a process
    alone has all of it.
    """

    name: str
    model: StepModel
    cache: KvCache
    limits: ModelLimits
    layout: KvLayout
    fingerprint: str
    num_pages: int
    num_lanes: int = 1
    prediction: Prediction | None = None
    grammars: Grammars | None = None
    memory: Memfd | None = None
    """What the pool is built on, if other processes can be let read it."""
    group: RankOfGroup | None = None
    mtp: MtpModel | None = None
    """The model, if its module for multi-token prediction guesses."""

    @property
    def pages(self) -> PageMemory:
        """The pool as transfers see it."""
        return self.group.pages if self.group else self.cache


def load_worker_model(settings: WorkerSettings, place: RankPlace = ALONE_PLACE) -> LoadedModel:
    """Load the checkpoint, downloaded first if need be, and make the page pool; takes long, call it off the event loop.

    Of a group, this loads one rank's share: all ranks call it, and it returns when all of them have loaded.

    Raises:
        HeadraceError: as `hub.find_model`.
        CheckpointError: the checkpoint can't be served.
        StartupError: NO_BACKEND, before anything else; POOL_TOO_SMALL, the pool is too small for a page; NO_FP8_CACHE,
            NO_FP8_DISPATCH, NO_GPU, NO_EXACT, NO_FP8_WEIGHTS, NO_INT8, NO_KERNEL, KERNELS_DISAGREE, NO_TRANSPORT,
            NO_MTP; BAD_RANKS, of a group.
        UnavailableError: RANK_LOST, of a group.
    """
    started = time.perf_counter()
    choose_kernels(settings)
    pool_bytes = settings.kv_pool_mib << 20
    most_bytes = machine_bytes() if settings.device == "cpu" else 0
    with shown(f"downloading {settings.model}") as on_progress:
        settings = with_folder(settings, most_bytes=most_bytes, on_progress=on_progress)
    ranks = join(settings, place)
    name = name_of(settings.model, settings.model_name)
    with shown(f"loading {name}") as on_progress:
        model = load_model(
            settings.model,
            dtype=settings.dtype,
            kv_cache_dtype=settings.kv_cache_dtype,
            weights_dtype=WeightsDtype(settings.weights_dtype),
            dispatch_dtype=DispatchDtype(settings.dispatch_dtype),
            device=settings.device,
            numerics=Numerics(settings.numerics),
            kv_pool_bytes=pool_bytes,
            step_limits=StepLimits(settings.max_step_tokens, settings.max_step_sequences, settings.max_context_tokens),
            on_progress=on_progress,
            ranks=ranks,
            has_mtp=settings.has_mtp,
            redundant_experts=redundant_experts(settings, ranks.layout),
        )
    own = model.kv_layout(settings.page_size)
    lane_pages, num_lanes = pool_bytes // own.page_bytes, ranks.layout.num_lanes
    if lane_pages < 1:
        raise StartupError(
            "POOL_TOO_SMALL", f"--kv-pool-mib {settings.kv_pool_mib}: one page takes {own.page_bytes} bytes"
        )
    config = model.config
    layout = config.kv_layout(settings.page_size, model.cache_dtype)
    most = min(settings.max_context_tokens or config.max_context_tokens, config.max_context_tokens)
    # Other processes read rank 0's pages alone, and whole ones.
    memory = new_memory(memory_kind(usable(settings.transport))) if place.rank == 0 else None
    cache = rank_cache(ranks, own, layout, lane_pages, device=settings.device, memory=memory)
    kernels = backend(cache.layers[0])
    loaded = {"model": model.fingerprint, "layout": str(layout), "pages": lane_pages, "kernels": kernels}
    agree(ranks, {**loaded, "rebalance": settings.rebalance, "redundant experts": settings.redundant_experts})
    if settings.device == "cuda" and kernels != "reference":
        _prepare_gpu(settings, model, cache, most, num_lanes)
    else:
        mtp = model if model.has_mtp else None
        warm_up(model, cache, max_step_tokens=_TRIED_TOKENS, num_lanes=num_lanes, mtp=mtp)
        if kernels == "cpu" and isinstance(settings, DecodeSettings):
            model.record_decode(cache, max_rows=settings.max_step_sequences, max_context_tokens=most)
    grammars = Grammars(settings.model, config.vocab_size, config.eos_token_ids)
    if grammars.problem:
        log.warning("requests with a grammar will be refused", extra={"problem": grammars.problem})
    log.info(
        "model loaded",
        extra={
            "model": name,
            "fingerprint": model.fingerprint,
            **_about(kernels, settings),
            "numerics": settings.numerics,
            "weights_dtype": settings.weights_dtype,
            "dispatch_dtype": settings.dispatch_dtype,
            "seconds": time.perf_counter() - started,
            "pages": lane_pages * num_lanes,
            "page_bytes": own.page_bytes,
            "cache_dtype": layout.dtype.value,
            "max_context_tokens": most,
            **({"layout": str(ranks.layout)} if place.size > 1 else {}),
        },
    )
    experts = group_experts(settings, model, ranks) if place.size > 1 else None
    ranks.set_timeout(settings.rank_timeout_s)
    return LoadedModel(
        name=name,
        model=model,
        cache=cache,
        limits=ModelLimits(config.vocab_size, most, tuple(config.eos_token_ids), grammars.problem),
        layout=layout,
        fingerprint=model.fingerprint,
        num_pages=lane_pages * num_lanes,
        num_lanes=num_lanes,
        prediction=_prediction(settings, model, name) if place.size == 1 else None,
        grammars=grammars,
        memory=memory,
        group=rank_of_group(ranks, cache, layout, memory, experts) if place.size > 1 else None,
        mtp=model if model.has_mtp else None,
    )


def choose_kernels(settings: WorkerSettings) -> None:
    """Let this process compute with what `--kernels` names.

    Raises:
        StartupError: NO_BACKEND.
    """
    name = None if settings.kernels == "auto" else settings.kernels
    problem = name and objection(name, settings.device)
    if problem:
        raise StartupError("NO_BACKEND", f"--kernels {name} with --device {settings.device}: {problem}; use auto")
    choose_backend(name)


def _about(kernels: Backend, settings: WorkerSettings) -> dict[str, str]:
    """Return what the log says of the kernels: which, on what instructions, and why none are compiled."""
    about: dict[str, str] = {"kernels": kernels}
    if kernels == "cpu":
        about["isa"] = instruction_set()
    problem = what_is_missing("cpu") if kernels == "reference" and settings.kernels == "auto" else None
    return {**about, "not_compiled": problem} if problem else about


def _prepare_gpu(
    settings: WorkerSettings, model: Model, cache: KvCache, max_context_tokens: int, num_lanes: int
) -> None:
    """Check and compile the kernels; capture a decode worker's steps.

    Raises:
        CheckpointError: BAD_LOGITS.
        StartupError: NO_KERNEL, KERNELS_DISAGREE.
    """
    difference = check_kernels(model, settings.device, settings.page_size, num_lanes=num_lanes)
    mtp = model if model.has_mtp else None
    warm_up(model, cache, max_step_tokens=settings.max_step_tokens, num_lanes=num_lanes, mtp=mtp)
    if isinstance(settings, DecodeSettings):
        model.prepare_decode(cache, max_rows=settings.max_step_sequences, max_context_tokens=max_context_tokens)
    log.info("kernels checked against plain torch", extra={"relative_difference": difference})


def _prediction(settings: WorkerSettings, model: Model, name: str) -> Prediction | None:
    if settings.device == "cuda":
        # Times are measured between calls, which on a GPU return before their work is done (model/op_timer.py).
        log.info("operations are not timed on a GPU")
        return None
    if model.config.is_attention_sparse:
        # What one of its marks takes is several of the roofline's operations, and others where prompts are short.
        log.info("operations are not timed: those of sparse attention are not marked one by one")
        return None
    shape = shape_of(model.config, name)
    compute, cached = _ROOFLINE_DTYPES[scalar_of(model.dtype)], model.cache_dtype
    # Of weights in 8 bits the roofline knows one kind.
    dtype = compute if settings.weights_dtype == WeightsDtype.AUTO.value else Dtype.FP8
    kv_dtype = Dtype.FP8 if cached is CacheDtype.FP8_E4M3 else _ROOFLINE_DTYPES[cached.element]
    if settings.hardware == "cpu":
        is_int8 = settings.weights_dtype == WeightsDtype.INT8.value
        measure = partial(measure_worker_cpu, dtype, compute, model.weight_bytes, is_int8=is_int8)
        return Prediction(shape, dtype, measure, kv_dtype)
    return Prediction(shape, dtype, partial(find_hardware, settings.hardware), kv_dtype)
