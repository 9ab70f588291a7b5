"""A checkpoint's module for multi-token prediction (MTP): whether there is one, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from headrace_core.checkpoint.check_tensors import SCALE_SUFFIX
from headrace_core.errors import StartupError
from headrace_core.families.config import ModelConfig
from headrace_core.families.table import weights

_USE = "use --speculate lookup or off"


def with_mtp(config: ModelConfig, num_ranks: int) -> ModelConfig:
    """Return the network with its module, the first if it has several.

    Raises:
        StartupError: NO_MTP, config.json speaks of none, its attention is sparse, or a group of ranks is to run it.
    """
    if not config.num_mtp_layers:
        raise StartupError(
            "NO_MTP",
            f"--speculate mtp: this {config.family} has no module for multi-token prediction "
            f"(num_nextn_predict_layers in config.json); {_USE}",
        )
    if config.is_attention_sparse:
        raise StartupError("NO_MTP", f"--speculate mtp is not there for sparse attention, of {config.family}; {_USE}")
    if num_ranks > 1:
        raise StartupError(
            "NO_MTP", f"--speculate mtp is for a worker of one process, not for a group of {num_ranks} ranks; {_USE}"
        )
    return replace(config, num_run_mtp_layers=1)


def check_mtp_is_stored(config: ModelConfig, stored: Container[str]) -> None:
    """Refuse a checkpoint that was saved without the module that its config.json speaks of, as many are.

    Raises:
        StartupError: NO_MTP.
    """
    missing = next((name for name in _own_names(config) if name not in stored), None)
    if missing is not None:
        raise StartupError(
            "NO_MTP", f"--speculate mtp: the checkpoint was saved without its module: {missing} is missing; {_USE}"
        )


def mtp_names(config: ModelConfig) -> set[str]:
    """Return the names of all tensors of the module that is run, and of their scales."""
    names = _own_names(config)
    return {*names, *(name + SCALE_SUFFIX for name in names)}


def _own_names(config: ModelConfig) -> list[str]:
    if not config.num_run_mtp_layers:
        return []
    return [weight.name for weight in weights(config).layer(config.num_layers)]
