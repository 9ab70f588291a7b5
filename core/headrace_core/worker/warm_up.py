"""Run what a worker will run, before anyone waits for it: on a GPU a kernel is compiled when it is first launched.

A network whose logits are not finite, from whatever numbers in its config, answers nobody: that is told now, too.

Which kernel runs depends on the number of tokens, through tile sizes; so prompts of every size up to a step's are
computed, tokens are sampled, and pages copied to the host and back.
"""

from __future__ import annotations

from itertools import product

from headrace_core.batch.step import Chunk, SamplingRow
from headrace_core.engine.executor import MtpModel, StepModel
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.sampler import sample
from headrace_core.model.self_check import check_finite
from headrace_core.request import SamplingParams

_PARAMS = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=0)


def warm_up(
    model: StepModel, cache: KvCache, *, max_step_tokens: int, num_lanes: int = 1, mtp: MtpModel | None = None
) -> None:
    """Compute throw-away prompts of 1, 2, 4 ... up to `max_step_tokens` tokens; the pages are zero afterwards.

    Each is guessed behind by `mtp`, None: nobody guesses. Prompts are no longer than the pool holds. Call it before the
    engine starts; in a group of ranks, on all of them: each lane computes them, while the others do without tokens.

    Raises:
        CheckpointError: BAD_LOGITS, the network gave logits that are not finite.
    """
    most = min(max_step_tokens, cache.num_pages * cache.layout.page_size)
    count = cache.layout.num_pages(most)
    sizes = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    for num_tokens, lane in product((*sizes, most), range(num_lanes)):
        row = SamplingRow(_PARAMS, [0] * num_tokens, [], 0, num_tokens, ())
        first = lane * cache.num_pages
        chunk = Chunk(0, [0] * num_tokens, 0, list(range(first, first + count)), True, lane=lane, num_wanted=1)
        logits = model.forward([chunk], cache)
        check_finite(logits)
        if len(logits):  # of a group of ranks they are one's
            sample(logits, [row])
        if mtp:
            mtp.guess([chunk], {0: [0]}, cache)
    cache.copy_to_host(cache.page_ids[:1])
    cache.copy_from_host(cache.page_ids[:1])
    cache.zero_pages(cache.page_ids[:count])
    model.take_expert_counts()
