"""`make bench-handoff`: what a hand-off costs a request, with real processes on this machine; build/bench/handoff.json.

    python -m tests.perf.handoff [--transport grpc] [--model demo] [--part after-prefill] [--pairs 20] [--rounds 9]

    after-prefill   from the end of prefill to the first decode step, by prompt length, and what had moved by then. By
                    the waterfall: `prefill_hop` (in which the way there is as well), `transfer`, `join`
    pairs           from admission to the second token: a prefill and a decode worker beside one worker that does both,
                    the same prompts in turn, none in any cache. The ratio of the times, pair by pair
    hop             what lies between client and first token beside 16 sequences that decode: the way by the decode
                    worker costs `decode_queue` and a part of `prefill_hop`; and what that way is longer than a direct
                    one to the prefill worker, `extra`

Every worker computes with one thread. Machines are noisy: the ratios of one run are what to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headrace_client import Client
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.results import Timings
from headrace_core.request import SamplingParams
from headrace_router.testing import write_tokenizer

from tests.perf import checkpoint_280m, extra_hop, report_file
from tests.perf.machine import machine

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "bench" / "handoff.json"
POSITIONS = 32_768
LENGTHS = (512, 4096, 16_384)
PAIR_TOKENS = 4096
HOP_STREAMS = 16
HOP_TOKENS = 64
PARTS = ("after-prefill", "pairs", "hop")
MODELS = ("demo", "280M")


def main() -> None:
    """Measure what is asked for and write it down, each part as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="grpc")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=9, help="prompts of each length")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--hops", type=int, default=100, help="requests of the part hop")
    options = parser.parse_args()
    lengths = tuple(int(length) for length in options.lengths.split(","))
    report_file.merge(REPORT, {"machine": machine()})
    for model in options.model or MODELS:
        directory = long_model(model)
        for part in options.part or PARTS:
            if part == "after-prefill":
                found: Any = measure_after_prefill(directory, options.transport, lengths, options.rounds)
            elif part == "pairs":
                found = measure_pairs(directory, options.transport, options.pairs)
                if model == "demo":
                    key = f"handoff_added_{options.transport}_{PAIR_TOKENS}"
                    report_file.merge(REPORT, {key: found["ratio"]["median"]})
            else:
                found = measure_hop(directory, options.transport, options.hops)
            name = f"{part} {model} {options.transport}"
            report_file.merge(REPORT, {name: found})
            sys.stdout.write(f"{name}: {json.dumps(found)}\n")
            sys.stdout.flush()


def long_model(name: str) -> Path:
    """Return a model's folder whose config allows for long prompts; made if it is not there."""
    source = ROOT / "demo" / "model"
    if name == "280M":
        source = checkpoint_280m.write(ROOT / "build" / "checkpoint-280m")
        write_tokenizer(source)
    folder = ROOT / "build" / f"{name}-{POSITIONS}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        target = folder / file.name
        if file.name == "config.json":
            config = json.loads(file.read_text())
            target.write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))
        elif not target.exists():
            target.symlink_to(file.resolve())
    return folder


def measure_after_prefill(
    directory: Path, transport: str, lengths: Sequence[int], num_rounds: int
) -> dict[str, dict[str, Any]]:
    """Return, by prompt length, the milliseconds between the end of prefill and the first decode step."""
    found: dict[str, dict[str, Any]] = {}
    with pair(directory, transport) as client:
        generate(client, prompt_of(lengths[0]))
        for length in lengths:
            timings = [generate(client, prompt_of(length)) for _ in range(num_rounds)]
            names = ("prefill_hop", "transfer", "join")
            found[str(length)] = {
                "ms": spread([ms(each, *names) for each in timings]),
                **{f"{name}_ms": round(statistics.median(ms(each, name) for each in timings), 2) for name in names},
                "prefill_ms": round(statistics.median(ms(each, "prefill") for each in timings), 1),
                "mib": round(timings[0].transfer_bytes / 2**20, 2),
                "hidden_share": round(
                    statistics.median(each.hidden_transfer_bytes / each.transfer_bytes for each in timings), 3
                ),
                "hidden_ms": round(statistics.median(each.hidden_transfer_us for each in timings) / 1e3, 2),
                "rounds": num_rounds,
            }
    return found


def measure_pairs(directory: Path, transport: str, num_pairs: int) -> dict[str, Any]:
    """Return the times from admission to the second token, disaggregated and colocated, and their ratios."""
    ratios: list[float] = []
    times: dict[str, list[float]] = {"disaggregated": [], "colocated": []}
    with pair(directory, transport) as apart, colocated(directory) as together:
        clients = {"disaggregated": apart, "colocated": together}
        for number in range(-1, num_pairs):
            prompt = prompt_of(PAIR_TOKENS)
            order = sorted(clients, reverse=number % 2 == 0)
            took = {name: admission_to_second_token_ms(generate(clients[name], prompt)) for name in order}
            if number < 0:
                continue  # the first of each worker warms up
            ratios.append(took["disaggregated"] / took["colocated"])
            for name, each in took.items():
                times[name].append(each)
    return {
        "prompt_tokens": PAIR_TOKENS,
        "pairs": num_pairs,
        "ratio": spread(ratios, digits=4),
        **{f"{name}_ms": spread(each) for name, each in times.items()},
    }


def measure_hop(directory: Path, transport: str, num_requests: int) -> dict[str, Any]:
    """Return what short prompts took to their first token while other sequences decode."""
    over = threading.Event()
    started = threading.Barrier(HOP_STREAMS + 1)
    endless = SamplingParams(max_tokens=POSITIONS - 2 * HOP_TOKENS, ignore_eos=True, temperature=0.0)

    def decode(client: Client) -> None:
        with client.stream(prompt_of(HOP_TOKENS), endless) as stream:
            next(stream)
            started.wait()
            while not over.is_set():
                next(stream)

    with pair_cluster(directory, transport) as (cluster, client), ThreadPoolExecutor(HOP_STREAMS) as threads:
        streams = [threads.submit(decode, client) for _ in range(HOP_STREAMS)]
        started.wait()
        try:
            timings = [generate(client, prompt_of(HOP_TOKENS)) for _ in range(num_requests)]
            prefill, decode = (worker.address for worker in cluster.workers)
            ways = extra_hop.measure(prefill, decode, lambda: prompt_of(HOP_TOKENS), num_requests)
        finally:
            over.set()
        for stream in streams:
            stream.result()
    names = ("decode_queue", "prefill_queue", "prefill", "prefill_hop")
    return {
        **{f"{name}_ms": spread([ms(each, name) for each in timings]) for name in names},
        "ttft_ms": spread([each.ttft_us / 1e3 for each in timings]),
        **{f"{name}_ms": spread(each) for name, each in ways.items()},
        "requests": num_requests,
    }


@contextlib.contextmanager
def pair(directory: Path, transport: str) -> Generator[Client]:
    """Yield a client of a prefill and a decode worker."""
    with pair_cluster(directory, transport) as (_, client):
        yield client


@contextlib.contextmanager
def pair_cluster(directory: Path, transport: str) -> Generator[tuple[LocalCluster, Client]]:
    """Yield a prefill and a decode worker, in this order, and a client of theirs."""
    with (
        LocalCluster(directory, worker_options=_WORKER, decode_options={"transport": transport}, env=_ENV) as cluster,
        Client(cluster.router_address) as client,
    ):
        yield cluster, client


@contextlib.contextmanager
def colocated(directory: Path) -> Generator[Client]:
    """Yield a client of one worker that does both."""
    with (
        LocalCluster(directory, num_prefill=0, num_decode=0, num_both=1, worker_options=_WORKER, env=_ENV) as cluster,
        Client(cluster.router_address) as client,
    ):
        yield client


_WORKER = {"threads": 1, "kv-pool-mib": 512, "roofline-every-steps": 0}
_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def generate(client: Client, prompt: list[int]) -> Timings:
    """Return where the time of a request for two tokens went."""
    params = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0)
    timings = client.generate(prompt, params, include_timings=True).timings
    assert timings, "asked for"
    return timings


def prompt_of(length: int) -> list[int]:
    """Return tokens that nobody has seen."""
    return [_RANDOM.randrange(3, 250) for _ in range(length)]


_RANDOM = random.Random(0)


def admission_to_second_token_ms(timings: Timings) -> float:
    """Return the time from the router's queue to the end, of a request for two tokens."""
    return timings.total_us / 1e3 - ms(timings, "tokenize", "queue")


def ms(timings: Timings, *names: str) -> float:
    """Return the milliseconds spent in these phases."""
    return sum(phase.duration_us for phase in timings.phases if phase.name in names) / 1e3


def spread(values: Sequence[float], *, digits: int = 2) -> dict[str, float]:
    """Return median and 90th percentile."""
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return {"median": round(statistics.median(ordered), digits), "p90": round(p90, digits)}


if __name__ == "__main__":
    main()
