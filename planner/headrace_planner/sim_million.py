"""`python -m headrace_planner.sim_million [N]`: how long N requests on 1,000 workers take to simulate; prints JSON."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace

import numpy as np

from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes
from headrace_planner.workload import Lengths, poisson

_TIMES = LinearStepTimes(fixed_s=0.008, row_s=5e-5, context_s=2e-9, prompt_token_s=3e-5, pair_s=1e-10)
"""A round-numbered accelerator: the simulator's own speed does not depend on it."""
_RATE = 900.0
_BLOCK_TOKENS = 2048
"""A quarter of a step: about six blocks a prompt."""


def main(num_requests: int) -> None:
    """Simulate lengths as in Mooncake's conversations: 12,035 tokens in and 343 out on average, widely spread."""
    worker = WorkerSpec(_TIMES, num_pages=40_000)
    config = SimConfig(
        worker, worker, None, 500, 500, wire=Wire(rpc_s=5e-4, admit_s=5e-4), fidelity="fast", shortlist=2
    )
    workload = poisson(Lengths(12_035, 343, 1.1, 0.9), rate=_RATE, num_requests=num_requests)
    workload = replace(workload, block_tokens=_BLOCK_TOKENS)
    result = simulate(config, workload)
    assert np.array_equal(result.recorder.num_tokens, workload.num_output), "tokens were lost"
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(
        json.dumps(
            {
                "num_requests": num_requests,
                "num_workers": config.num_workers,
                "wall_s": result.wall_s,
                "num_events": result.num_events,
                "peak_mib": peak_mib,
                "ttft_p50_s": float(np.percentile(result.ttft_s, 50)),
                "utilisation": {role: result.utilisation(role) for role in ("prefill", "decode")},
            }
        )
        + "\n"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
