"""`python -m tests.perf.next_turn`: the next turn of a conversation, with and without the way back of its answer.

    python -m tests.perf.next_turn [--transport grpc] [--model demo] [--rounds 9] [--prompt 1024] [--answer 256]

A prefill and a decode worker, real processes with one thread each, and no router: the time is from `StartSequence` to
the first token of the second turn, which is the first one's prompt and answer and 32 tokens more. `with`: the prefill
worker is told who has the answer, and fetches it; `without`: it has the prompt's pages, and computes the answer's
tokens. Both kinds in turn, each with conversations of its own; build/bench/next-turn.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from headrace.v1 import worker_service_pb2
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams
from headrace_core.rpc import channel
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.transfer.values import CachedPrefix

from tests.perf import report_file
from tests.perf.handoff import MODELS, ROOT, long_model, prompt_of, spread
from tests.perf.machine import machine

REPORT = ROOT / "build" / "bench" / "next-turn.json"
QUESTION = 32
TIMEOUT_S = 600.0
_WORKER = {"threads": 1, "kv-pool-mib": 512, "roofline-every-steps": 0}
_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> None:
    """Measure what is asked for, write it down and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="grpc")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: demo")
    parser.add_argument("--rounds", type=int, default=9, help="conversations of each kind")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--answer", type=int, default=256, help="tokens")
    options = parser.parse_args()
    report_file.merge(REPORT, {"machine": machine()})
    sys.stdout.write(f"{json.dumps(machine())}\n")
    for model in options.model or MODELS[:1]:
        found = asyncio.run(_measure(long_model(model), options))
        name = f"{model} {options.transport}"
        report_file.merge(REPORT, {name: found})
        sys.stdout.write(f"{name}: {json.dumps(found)}\n")


async def _measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    with LocalCluster(directory, worker_options={**_WORKER, "transport": options.transport}, env=_ENV) as cluster:
        prefill, decode = _addresses(cluster)
        incarnation, page_size = await _identity(decode)
        times: dict[str, list[float]] = {"with": [], "without": []}
        cached: dict[str, int] = {}
        async with MiniRouter(prefill=prefill, decode=decode) as router:
            for number in range(-1, options.rounds):
                for kind in sorted(times, reverse=number % 2 == 0):
                    turn = await _first_turn(router, f"{kind}-{number}", options)
                    num_cached = (len(turn) - QUESTION - 1) // page_size * page_size
                    where = CachedPrefix(decode, incarnation, num_cached) if kind == "with" else None
                    began_s = time.perf_counter()
                    second = router.start(
                        f"next-{kind}-{number}", turn, params=_params(2), cached=where, timeout_s=TIMEOUT_S
                    )
                    await second.wait_tokens(1)
                    took_s = time.perf_counter() - began_s
                    await second.tokens()
                    assert second.prefilled is not None, "it was told"
                    cached[kind] = second.prefilled.num_cached_tokens
                    if number >= 0:  # the first of each warms up
                        times[kind].append(took_s * 1e3)
    return {
        "prompt_tokens": options.prompt,
        "answer_tokens": options.answer,
        "rounds": options.rounds,
        **{
            f"ttft_{kind}_ms": {**spread(each), "samples": [round(ms, 2) for ms in each]}
            for kind, each in times.items()
        },
        "cached_tokens": cached,
        "ratio": spread([b / a for a, b in zip(times["with"], times["without"], strict=True)]),
    }


async def _first_turn(router: MiniRouter, name: str, options: argparse.Namespace) -> list[int]:
    """Return the tokens of the second turn."""
    prompt = prompt_of(options.prompt)
    answer = await router.generate(name, prompt, params=_params(options.answer), timeout_s=TIMEOUT_S)
    return [*prompt, *answer, *prompt_of(QUESTION)]


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, seed=1)


def _addresses(cluster: LocalCluster) -> tuple[str, str]:
    by_role = {worker.role: worker.address for worker in cluster.workers}
    return by_role["prefill"], by_role["decode"]


async def _identity(address: str) -> tuple[int, int]:
    """Return a worker's incarnation, and the tokens of a page."""
    async with channel(address) as asking:
        stub: Any = WorkerServiceStub(asking)
        info = await stub.GetInfo(worker_service_pb2.GetInfoRequest())
    return info.incarnation, info.layout.page_size


if __name__ == "__main__":
    main()
