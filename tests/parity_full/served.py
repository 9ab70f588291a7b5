"""The same through workers: groups as `headrace up` starts them, prompts by one layout, tokens by another.

Each fleet answers the prompts side by side, then each prompt with its answer and some tokens more, for which the side
that computes prompts fetches what the other has: pages pass in both directions.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from headrace_client import AsyncClient, SamplingParams
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint

from tests.parity_full.party import ONE_PROCESS

Names = tuple[str, str]

VOCAB_SIZE = 1536
"""The tokenizer's: a router needs one."""
_LANES, _HEADS, _LANES_OF_HEADS = ("dp2", "ep2"), ("tp2", "ep2"), ("dp2", "ep4")
FLEETS: Sequence[tuple[Names, Names]] = (
    (_LANES, ONE_PROCESS),
    (ONE_PROCESS, _LANES),
    (_LANES, _HEADS),
    (_HEADS, _LANES),
    (("dp2", "tp2"), _LANES_OF_HEADS),
    (_LANES_OF_HEADS, _HEADS),
)
_OPTIONS = {"dtype": "float32", "page-size": 16, "kv-pool-mib": 8, "max-step-tokens": 32, "rank-timeout-s": 120}
_TIMEOUT_S = 600.0


class Turns(NamedTuple):
    """A prompt and a longer one that begins with it and its answer, and what follows each."""

    prompts: list[list[int]]
    outputs: list[list[int]]


def write_served(folder: Path, network: str, tokenizer: Path) -> None:
    """Write a checkpoint that a fleet can serve: with a tokenizer, those of `tokenizer`."""
    for file in tokenizer.glob("token*"):
        shutil.copy(file, folder)
    write_checkpoint(folder, {**TINY_CONFIGS[network], "vocab_size": VOCAB_SIZE, "max_position_embeddings": 512})


def serve_all(folder: Path, first: Turns, second: Turns) -> Iterator[tuple[Names, Names, bool]]:
    """Yield each fleet's layouts and whether it answered both turns so."""
    for prefill, decode in FLEETS:
        options = [_options(names) for names in (prefill, decode)]
        with LocalCluster(
            folder,
            prefill_ranks=_size(prefill),
            decode_ranks=_size(decode),
            worker_options=_OPTIONS,
            prefill_options=options[0],
            decode_options=options[1],
        ) as cluster:
            told = [asyncio.run(_answers(cluster.router_address, turns)) for turns in (first, second)]
        yield prefill, decode, told == [first.outputs, second.outputs]


async def _answers(router: str, turns: Turns) -> list[list[int]]:
    async with AsyncClient(router) as client:
        results = await asyncio.gather(
            *(
                client.generate(
                    prompt,
                    SamplingParams(temperature=0.0, max_tokens=len(output), ignore_eos=True),
                    timeout_s=_TIMEOUT_S,
                )
                for prompt, output in zip(turns.prompts, turns.outputs, strict=True)
            )
        )
        return [list(result.token_ids) for result in results]


def _size(names: Names) -> int:
    return 1 if names == ONE_PROCESS else ParallelLayout.parse(*names).size


def _options(names: Names) -> dict[str, str | int]:
    if names == ONE_PROCESS:
        return {}
    layout = ParallelLayout.parse(*names)
    return {"attention-tp": layout.attention_tp, "experts": layout.experts_by.value}
