"""Which layouts a worker can serve a model in: said before a rank is started, and by every rank again. Torch-free."""

from __future__ import annotations

from pathlib import Path

from headrace_core.errors import StartupError
from headrace_core.families.config_json import parse_config
from headrace_core.ranks.layout import ExpertsBy, ParallelLayout


def served_layout(model: Path, num_ranks: int, *, attention_tp: int, experts: str) -> ParallelLayout:
    """Return how a group of `num_ranks` shares out the checkpoint in `model`; `attention_tp` 0: among all ranks.

    Raises:
        StartupError: BAD_RANKS, it can't be.
        CheckpointError: its config can't be read.
    """
    if experts not in {by.value for by in ExpertsBy}:
        raise StartupError("BAD_RANKS", f"--experts {experts!r}: say ep, whole experts, or tp, a part of every one")
    layout = ParallelLayout(attention_tp or num_ranks, ExpertsBy(experts), num_ranks)
    layout.check(parse_config(model))
    return layout
