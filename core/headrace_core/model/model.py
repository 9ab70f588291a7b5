"""The network: embedding, layers, final norm, logits.

Letters: T tokens of the step, N hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from headrace_kernels.linear import Linear
from headrace_kernels.rms_norm import rms_norm
from torch import Tensor

from headrace_core.batch.step import Chunk, OnLayer
from headrace_core.checkpoint.torch_scalar import scalar_of
from headrace_core.errors import HeadraceError
from headrace_core.families.config import ModelConfig
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.model.decode_batch import DecodeBatch
from headrace_core.model.decode_graphs import Capture, DecodeGraphs, DecodeOutput, is_decode_step
from headrace_core.model.decode_tapes import DecodeTapes
from headrace_core.model.expert_counts import ExpertCounts
from headrace_core.model.expert_store import ExpertStore
from headrace_core.model.feed_forward import MoeMlp
from headrace_core.model.group_experts import LaneCounts
from headrace_core.model.group_linear import embed
from headrace_core.model.group_results import gather_failures, gather_logits, not_finite
from headrace_core.model.host_copies import to_device
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.layer import Layer
from headrace_core.model.micro_batches import cut
from headrace_core.model.mtp import Mtp, MtpWeights, Stream, TrunkWeights
from headrace_core.model.numerics import Numerics
from headrace_core.model.op_timer import OFF, OTHER, OpTimer
from headrace_core.model.prompt_scores import PromptScores
from headrace_core.model.rope_angles import RopeAngles
from headrace_core.model.step_inputs import DecodeRows, StepInputs, prepare_step
from headrace_core.process import release_freed_memory
from headrace_core.ranks.group import ALONE, Ranks
from headrace_core.request import PromptLogprobs

_MANY_TOKENS = 256
_LAYERS_PER_RELEASE = 4


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """What the network is made of; in a group of ranks, this one's part of it, `lanes` told of each step."""

    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Linear
    lanes: LaneCounts = field(default_factory=LaneCounts)
    mtp: MtpWeights | None = None


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What tells one loaded model from another: `fingerprint` is over config, weights and compute type.

    Exact numerics are part of it, too: pages of others are other bits. `cache_dtype` is no part of that: it says how
    its latents are kept. None: as values of the compute type.
    """

    fingerprint: str
    dtype: torch.dtype
    weight_bytes: int
    cache_dtype: CacheDtype | None = None
    numerics: Numerics = Numerics.FAST


class Model:
    """A loaded network, or one rank's part of it. Engine thread only.

    In a group of ranks, `ranks`, each computes its own lane's chunks and meets the others in every step, so all are
    called with the same chunks in the same order; logits are rank 0's.
    """

    def __init__(
        self,
        config: ModelConfig,
        identity: ModelIdentity,
        weights: ModelWeights,
        ranks: Ranks = ALONE,
        store: ExpertStore | None = None,
    ) -> None:
        self.config = config
        self.store = store
        """What moves this rank's experts; None: they stay."""
        self.fingerprint = identity.fingerprint
        self.dtype = identity.dtype
        self.weight_bytes = identity.weight_bytes
        self.cache_dtype = identity.cache_dtype or CacheDtype(scalar_of(identity.dtype).value)
        # Chunks up to so long behind a cached prefix are decode rows; None: all are, summed as what is generated.
        self.max_decode_chunk: int | None = None if identity.numerics is Numerics.EXACT else 1
        self._weights = weights
        self._ranks = ranks
        self._is_alone = ranks.layout.size == 1
        # What sparse attention computes is of sizes that a step's contexts decide, and in part plain torch's.
        self._is_recordable = self._is_alone and not config.is_attention_sparse
        self._first_token = ranks.layout.vocabulary(ranks.rank, config.vocab_size).start
        # "cpu" or "cuda": the settings' name, one GPU a process.
        self.device = weights.embedding.device.type
        self._angles = RopeAngles(config.rope, self.device)
        self.mixtures = [i for i, layer in enumerate(weights.layers) if isinstance(layer.feed_forward, MoeMlp)]
        routers = [layer.feed_forward.router for layer in weights.layers if isinstance(layer.feed_forward, MoeMlp)]
        self._expert_counts = ExpertCounts.of(routers) if routers else None
        self._decode_steps: DecodeGraphs | DecodeTapes | None = None
        # What those read and write; steps over any other cache are computed as ever.
        self._decode_cache: KvCache | None = None
        self._failures: dict[int, HeadraceError] = {}
        self._prompts = PromptScores(self._logits, config.vocab_size, ranks, self._no_logits())
        self._mtp = self._new_mtp(weights)
        self._stream: Stream | None = None

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint's module for multi-token prediction is loaded, and `guess` can be called."""
        return self._mtp is not None

    def kv_layout(self, page_size: int) -> KvLayout:
        """Return what a page of this model's cache holds; of a rank's cache."""
        layout = self.config.kv_layout(page_size, self.cache_dtype)
        if isinstance(layout.attention, LatentAttention):
            return layout
        num_kv_heads = len(self._ranks.layout.kv_heads(self._ranks.rank, layout.attention.num_kv_heads))
        return replace(layout, attention=replace(layout.attention, num_kv_heads=num_kv_heads))

    def prepare_decode(
        self, cache: KvCache, *, max_rows: int, max_context_tokens: int, capture: Capture | None = None
    ) -> None:
        """Let decode steps of up to `max_rows` sequences over `cache` run from captured launches; GPU only.

        Takes a while: kernels are compiled. `capture` None: CUDA graphs. In a group of ranks, and with sparse
        attention, nothing is captured.
        """
        if not self._is_recordable:
            return
        self._decode_cache = cache
        with torch.inference_mode():
            self._decode_steps = DecodeGraphs(
                lambda batch: self._decode(batch, cache),
                max_rows=max_rows,
                max_pages=cache.layout.num_pages(max_context_tokens),
                page_size=cache.layout.page_size,
                device=self.device,
                capture=capture,
            )
            if self._mtp:
                self._mtp.capture(cache, max_rows=max_rows, max_context_tokens=max_context_tokens, capture=capture)

    def record_decode(self, cache: KvCache, *, max_rows: int, max_context_tokens: int) -> None:
        """Let decode steps of up to `max_rows` sequences over `cache` be recorded and replayed; compiled CPU kernels.

        The first of each number of sequences is recorded. In a group of ranks, and with sparse attention, nothing is.
        """
        if not self._is_recordable:
            return
        self._decode_cache = cache
        self._decode_steps = DecodeTapes(
            lambda batch, timer: self._decode(batch, cache, timer),
            max_rows=max_rows,
            max_pages=cache.layout.num_pages(max_context_tokens),
            page_size=cache.layout.page_size,
        )
        if self._mtp:
            self._mtp.record(cache, max_rows=max_rows, max_context_tokens=max_context_tokens)

    def forget_decode(self) -> None:
        """Undo `prepare_decode` or `record_decode`."""
        self._decode_steps = self._decode_cache = None
        if self._mtp:
            self._mtp.forget()

    def forward(
        self,
        chunks: Sequence[Chunk],
        cache: KvCache,
        timer: OpTimer = OFF,
        on_layer: OnLayer | None = None,
    ) -> Tensor:
        """Compute a step: write the chunks' tokens to their pages, return the logits to sample from.

        `timer` is told what ran, from the step's preparation to the head. `on_layer` is told after each layer how many
        are done; on a GPU they may only be launched. A captured decode step tells `timer` nothing, neither it nor a
        recorded one tells `on_layer`.

        Returns:
            [L, V] float32, one row for each chunk that `is_sampled`, in the order of the chunks; on ranks other than 0
            of a group [0, V].

        Raises:
            ValueError: a chunk is empty or its pages do not cover it.
            UnavailableError: RANK_LOST, another rank is gone; this group computes nothing more.
        """
        self._failures, self._stream = {}, None
        self._prompts.forget()
        with torch.inference_mode():
            steps = self._decode_steps if cache is self._decode_cache else None
            if steps is not None and len(chunks) <= steps.max_rows and is_decode_step(chunks):
                output = steps.run(chunks, timer)
                self._count(output.experts)
                self._stream = Stream(output.hidden, range(len(chunks)))
                assert output.logits is not None, "the network has a head"
                return output.logits
            if self._is_alone:
                logits, self._failures = self._compute(chunks, cache, timer, on_layer)
            else:
                logits = self._forward_of_lane(chunks, cache, timer, on_layer)
            self._failures = self._prompts.score(chunks, timer) | self._failures
            return logits

    def guess(
        self, chunks: Sequence[Chunk], tokens: Mapping[int, Sequence[int]], cache: KvCache
    ) -> dict[int, list[int]]:
        """Write the MTP module's rows of the last `forward`, of these chunks' rows; see `Mtp.guess`.

        Raises:
            ValueError: nothing was computed since the last guess, or there is no module.
        """
        if self._mtp is None or self._stream is None:
            raise ValueError("guesses follow a step of a model that has an MTP module")
        stream, self._stream = self._stream, None
        with torch.inference_mode():
            return self._mtp.guess(stream, chunks, tokens, cache)

    def all_mtp_logits(
        self, chunks: Sequence[Chunk], tokens: Mapping[int, Sequence[int]], cache: KvCache
    ) -> list[Tensor]:
        """Compute a step and its guesses, and return what each chunk's are chosen by, at every token: [tokens, V].

        Of a chunk that is not sampled, and has no `next_id`, at every token but the last.
        """
        self.forward(chunks, cache)
        if self._mtp is None or self._stream is None:
            raise ValueError("there is no MTP module")
        with torch.inference_mode():
            return self._mtp.all_logits(self._stream, chunks, tokens, cache)

    def _forward_of_lane(
        self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer, on_layer: OnLayer | None
    ) -> Tensor:
        """Compute this lane's chunks and bring together what rank 0 needs of all lanes'."""
        turns = self._ranks.turns
        halves = cut(chunks, self._ranks.layout.num_lanes, turns.least_rows) if turns else None
        if turns and halves:
            # On two threads; all chunks are sampled, so none fails unseen.
            compute = torch.inference_mode()(self._compute_own)
            both = turns.run(*(partial(compute, half, cache) for half in halves))
            logits, failures = torch.cat([logits for logits, _ in both]), {}
        else:
            logits, failures = self._compute_own(chunks, cache, timer, on_layer)
        self._failures = gather_failures(failures, chunks, self._ranks, self.device)
        lanes = [chunk.lane for chunk in chunks if chunk.is_sampled]
        return gather_logits(logits, lanes, self.config.vocab_size, self._ranks)

    def _compute_own(
        self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer = OFF, on_layer: OnLayer | None = None
    ) -> tuple[Tensor, dict[int, HeadraceError]]:
        """Compute this lane's of a group's chunks, and what the others' ask of the experts here."""
        own = [chunk for chunk in chunks if chunk.lane == self._ranks.lane_number]
        self._weights.lanes.set(chunks)
        return self._compute(own, cache, timer, on_layer) if own else (self._compute_for_others(on_layer), {})

    def _compute(
        self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer, on_layer: OnLayer | None
    ) -> tuple[Tensor, dict[int, HeadraceError]]:
        """Return the logits to sample from, and why chunks that are not sampled failed."""
        step = self._prepare(chunks, cache)
        hidden, experts = self._run_layers(step, cache, timer, on_layer)
        self._count(experts)
        if self._mtp:
            self._stream = Stream(self._normed(hidden), step.chunk_rows)
        failures = not_finite(hidden, step.chunk_rows, chunks)
        self._prompts.keep(hidden, step.chunk_rows, chunks)
        rows = [
            row + len(chunk.token_ids) - 1
            for row, chunk in zip(step.chunk_rows, chunks, strict=True)
            if chunk.is_sampled
        ]
        timer.mark(OTHER)
        if not rows:
            return self._no_logits(), failures
        return self._logits(hidden.index_select(0, to_device(torch.tensor(rows), hidden.device)), timer), failures

    def _compute_for_others(self, on_layer: OnLayer | None) -> Tensor:
        """Compute what other lanes' tokens ask of the experts here, in a step without any of this lane's."""
        nothing = self._weights.embedding[:0]
        for index, layer in enumerate(self._weights.layers, start=1):
            if isinstance(layer.feed_forward, MoeMlp):
                layer.feed_forward.without_tokens(nothing)
            if on_layer is not None:
                on_layer(index)
        return self._no_logits()

    def _no_logits(self) -> Tensor:
        return self._weights.embedding.new_empty((0, self._weights.head.out_features), dtype=torch.float32)

    def all_logits(self, chunks: Sequence[Chunk], cache: KvCache) -> list[Tensor]:
        """Compute a step like `forward` and return every chunk's logits at every token, [tokens, V] float32 each.

        Of a group of one.
        """
        with torch.inference_mode():
            step = self._prepare(chunks, cache)
            hidden, _ = self._run_layers(step, cache, OFF)
            return [
                self._logits(hidden[row : row + len(chunk.token_ids)], OFF)
                for row, chunk in zip(step.chunk_rows, chunks, strict=True)
            ]

    def take_failures(self) -> dict[int, HeadraceError]:
        """Return, by key, why chunks that are not sampled of the last step failed: BAD_LOGITS, they are not finite.

        Nobody would look at them before their pages are others' to find. Logits are for the caller to look at.
        """
        failures, self._failures = self._failures, {}
        return failures

    def take_prompt_logprobs(self) -> dict[int, PromptLogprobs]:
        """Return what the last step said of prompts, by the keys of its chunks with a `scoring`."""
        return self._prompts.take()

    def take_expert_counts(self) -> dict[int, list[int]]:
        """Return, by layer, how many tokens each routed expert was chosen for since the last call."""
        counts = self._expert_counts
        return {} if counts is None else dict(zip(self.mixtures, counts.take(), strict=True))

    def take_expert_counts_since(self) -> Tensor:
        """Return what `take_expert_counts` returned since the last call of this, summed: [mixtures, experts] int64."""
        counts = self._expert_counts
        return torch.zeros(0, 0, dtype=torch.int64) if counts is None else counts.take_since()

    def _count(self, experts: Tensor | None) -> None:
        """Count what a step chose, [mixture layers, T, K or more]."""
        if self._expert_counts is not None and experts is not None:
            self._expert_counts.add(experts)
            self._expert_counts.send()

    def _decode(self, batch: DecodeBatch, cache: KvCache, timer: OpTimer = OFF) -> DecodeOutput:
        """Compute a decode step whose inputs lie on the device; launches only, nothing is brought to the host."""
        rows = DecodeRows(batch.block_table, batch.context_lens)
        step = StepInputs(batch.token_ids, batch.positions, batch.slot_mapping, rows, [], [])
        hidden, experts = self._run_layers(step, cache, timer)
        return DecodeOutput(self._normed(hidden), experts, self._logits(hidden, timer))

    def _new_mtp(self, weights: ModelWeights) -> Mtp | None:
        if weights.mtp is None:
            return None
        shared = TrunkWeights(weights.embedding, weights.head, self._angles, self.config.rms_norm_eps)
        return Mtp(weights.mtp, shared, self.max_decode_chunk)

    def _normed(self, hidden: Tensor) -> Tensor:
        """Return what the MTP module begins with; without one, what is at hand: nobody looks at it."""
        return rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps) if self._mtp else hidden

    def _prepare(self, chunks: Sequence[Chunk], cache: KvCache) -> StepInputs:
        return prepare_step(
            chunks,
            cache.layout.page_size,
            max_decode_chunk=self.max_decode_chunk,
            device=self.device,
            first_page=cache.first_page,
        )

    def _run_layers(
        self, step: StepInputs, cache: KvCache, timer: OpTimer, on_layer: OnLayer | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream [T, N] after all layers, and the experts chosen [mixture layers, T, K or more]."""
        eps, layers = self.config.rms_norm_eps, self._weights.layers
        if step.decode is not None:
            plan = layers[0].attention.plan_decode(step.decode.context_lens, cache.layout.page_size)
            step = replace(step, decode=replace(step.decode, plan=plan))
        angles = self._angles.at(step.positions)
        timer.mark(OTHER)
        x = embed(self._weights.embedding, self._first_token, step.token_ids, self._ranks.lane)
        timer.mark("embedding")
        is_trimmed = self.device == "cpu" and len(step.token_ids) >= _MANY_TOKENS
        chosen: list[Tensor] = []
        for index, (layer, pages) in enumerate(zip(layers, cache.layers[: len(layers)], strict=True), start=1):
            x, experts = layer(x, eps, angles, step, pages, timer)
            if experts is not None:
                chosen.append(experts)
            if on_layer is not None:
                on_layer(index)
            if is_trimmed and index % _LAYERS_PER_RELEASE == 0:
                # Activations of odd sizes leave holes among what oneDNN keeps; 5 ms here save 100 MiB at peak.
                release_freed_memory()
                timer.mark(OTHER)
        return x, torch.stack(chosen) if chosen else None

    def _logits(self, hidden: Tensor, timer: OpTimer) -> Tensor:
        """Return [T, V] float32 for the residual stream [T, N] after all layers."""
        logits = self._weights.head.after_norm(hidden, self._weights.norm, self.config.rms_norm_eps).float()
        timer.mark("final_norm+head")
        return logits
