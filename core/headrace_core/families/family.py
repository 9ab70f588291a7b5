"""What a family of models is: how its config.json is read, and which weights its network has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace_core.families.config import ModelConfig
from headrace_core.families.fields import Fields
from headrace_core.families.weights import WeightTree


@dataclass(frozen=True, slots=True)
class Family:
    """A family, as its file describes it.

    `defaults` are what a config.json means that leaves fields out: the defaults of transformers' class of that model
    type, of fields that are read and have no default where they are parsed. A field that is null is not left out. A
    model type whose class is its authors' own code has none: what it leaves out is refused by name.
    """

    parse: Callable[[Fields], ModelConfig]
    """Returns the network; raises CheckpointError by field."""
    weights: Callable[[ModelConfig], WeightTree]
    defaults: Mapping[str, int | float]
    section: str = ""
    """The object in config.json that describes the network; empty: the whole file."""
    other_parts: tuple[str, ...] = ()
    """How the names of tensors begin that are another network's: a tower for images."""
