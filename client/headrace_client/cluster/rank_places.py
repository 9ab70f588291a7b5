"""What the processes of a group of ranks on this machine are told: their places, as torchrun would tell them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace_core.ranks.served import served_layout

from headrace_client.cluster.ports import next_free

_HOST = "127.0.0.1"
_PORTS = range(20_000, 32_000)
"""Below those that Linux, macOS and Windows give out; drawn, as other groups may be started at the same time."""


def check_ranks(model_dir: Path, num_ranks: int, options: Mapping[str, Any]) -> None:
    """Refuse what several ranks themselves would refuse, before any is started; `options` are the worker's.

    Raises:
        StartupError: BAD_RANKS.
        CheckpointError: the model's config can't be read.
    """
    if num_ranks != 1:
        attention_tp, experts = int(options.get("attention-tp", 0)), str(options.get("experts", "ep"))
        served_layout(model_dir, num_ranks, attention_tp=attention_tp, experts=experts)


def rank_environments(num_ranks: int) -> Sequence[Mapping[str, str]]:
    """Return the environment of each rank; of one alone, that it is no group, whatever the parent is of.

    They meet at a port that is free now, and that the kernel gives nobody who asks for any: rank 0 takes it seconds
    later, when it has loaded torch. Should another have it by then, rank 0 says so.
    """
    if num_ranks == 1:
        return [{"WORLD_SIZE": "1"}]
    port = next_free(random.choice(_PORTS), 1)
    group = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": _HOST, "MASTER_PORT": str(port)}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
