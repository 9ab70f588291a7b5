"""What `tests.perf.router.placement` measures, simulated: the same trace, pools and clients under every policy.

    python -m tests.perf.router.placement_simulated TRACE.jsonl --concurrency 8 --prefill-ms 1.26 --step-ms 10

The product's placement and schedulers in simulated time; a prompt token and a decode step take so long, which are to be
those of the run that is compared. `--shift` takes another part of the trace, for more than one sample.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from headrace_core.request_trace import Workload, load_trace, prefix_hits
from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes
from headrace_router.placement.preferences import PREFERENCES

from tests.perf.router.paced import PACE

_PAGE_TOKENS = 32


def shortened(workload: Workload, scale: float, clients: int) -> Workload:
    """Return the requests so many times shorter, asked by so many clients in their order."""
    return Workload(
        workload.arrival_s - workload.arrival_s[0],
        np.maximum(1, np.rint(workload.num_prompt / scale).astype(np.int64)),
        np.maximum(1, np.rint(workload.num_output / scale).astype(np.int64)),
        workload.blocks,
        round(workload.block_tokens / scale),
        clients,
    )


def simulated(
    workload: Workload, policy: str, pool_share: float, prefill: LinearStepTimes, decode: LinearStepTimes, tokens: int
) -> dict[str, Any]:
    """Return a policy's summary. Pools are as `placement.py` makes them; a prefill step has so many tokens."""
    distinct = float(workload.num_prompt.sum() - prefix_hits(workload).sum())
    pool_tokens = max(pool_share * distinct / 2, 1.1 * float(workload.num_prompt.max()))
    holder = WorkerSpec(prefill, round(pool_tokens / _PAGE_TOKENS), _PAGE_TOKENS, tokens)
    taker = WorkerSpec(decode, 1 << 16, _PAGE_TOKENS, 512)
    config = SimConfig(holder, taker, None, 2, 2, fidelity="exact", placement=policy, wire=Wire(rpc_s=1e-3))
    return simulate(config, workload).summary()


def main() -> None:
    """Print hit rate and TTFT of each policy."""
    parser = argparse.ArgumentParser(description="Simulate what policies of placement find in prefix caches.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--num-requests", type=int, default=500)
    parser.add_argument("--shift", type=int, nargs="+", default=[0], help="begin at the trace's request of this number")
    parser.add_argument("--length-scale", type=float, default=16.0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--pool-share", type=float, default=1 / 3)
    parser.add_argument("--prefill-ms", type=float, default=1.0, help="of a prompt token")
    parser.add_argument("--step-ms", type=float, default=10.0, help="of a decode step")
    parser.add_argument("--paced", action="store_true", help="the pace and steps of `placement --paced` instead")
    options = parser.parse_args()
    prefill, decode, tokens = LinearStepTimes(prompt_token_s=options.prefill_ms / 1e3), None, 512
    if options.paced:
        prefill, tokens = LinearStepTimes(fixed_s=PACE.fixed_s, prompt_token_s=PACE.prompt_token_s), 1024
        decode = LinearStepTimes(fixed_s=PACE.fixed_s, row_s=PACE.row_s, prompt_token_s=PACE.prompt_token_s)
    decode = decode or LinearStepTimes(fixed_s=options.step_ms / 1e3)
    whole = load_trace(options.trace)
    for shift in options.shift:
        part = slice(shift, shift + options.num_requests)
        blocks = whole.blocks[part] if whole.blocks is not None else None
        recorded = Workload(whole.arrival_s[part], whole.num_prompt[part], whole.num_output[part], blocks)
        workload = shortened(recorded, options.length_scale, options.concurrency)
        for policy in PREFERENCES:
            found = simulated(workload, policy, options.pool_share, prefill, decode, tokens)
            line = {"shift": shift, "placement": policy, "hit_rate": round(found["cached_prompt_share"], 4)}
            line |= {"infinite": round(float(prefix_hits(workload).sum() / workload.num_prompt.sum()), 4)}
            line |= {f"ttft_{name}_s": round(found["ttft_s"][name], 3) for name in ("mean", "p50", "p99")}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
