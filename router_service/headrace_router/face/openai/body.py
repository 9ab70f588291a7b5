"""What all bodies that clients send have in common, and the mark of fields that are not served."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True, slots=True)
class Refused:
    """Marks a field of which only the values pass that ask for nothing."""

    why: str


SAYS_ITSELF = "says_itself"
"""Type of an error whose message goes on from the field's name."""


class Body(BaseModel):
    """Knows its fields: another one, or one of another type, is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
