"""The tensors among an operation's arguments: in tuples, lists and dictionaries, one inside another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors of `tree`, in order. torch's own way to do this takes longer than what is computed here."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [tensor for part in tree for tensor in tensors_of(part)]
    if isinstance(tree, dict):
        return [tensor for part in tree.values() for tensor in tensors_of(part)]
    return []


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return `tree` with what `change` makes of its tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        parts = [map_tensors(change, part) for part in tree]
        # A named tuple takes its parts one by one.
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, dict):
        return {key: map_tensors(change, part) for key, part in tree.items()}
    return tree
