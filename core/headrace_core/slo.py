"""What a request's client wants of its speed: a target for its first token, one for the gap between two tokens.

--slo-classes interactive=500/50,batch=60000       name=TTFT/ITL, milliseconds; 0 or nothing: no such target
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
MOST_MS = 1 << 31
_MOST_CLASSES = 64
_RESERVED = frozenset({"auto", "default"})
"""What OpenAI's clients call no class at all."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds; infinite where there is none."""

    ttft_s: float = math.inf
    itl_s: float = math.inf

    @classmethod
    def of_ms(cls, ttft_ms: float, itl_ms: float) -> Targets:
        """Return targets given in milliseconds, where 0 is none."""
        return cls(ttft_ms / 1000 or math.inf, itl_ms / 1000 or math.inf)


NO_TARGETS = Targets()


def read_classes(text: str) -> dict[str, Targets]:
    """Return the classes of `--slo-classes`, by name.

    Raises:
        ValueError: it is none; says what is wrong.
    """
    classes: dict[str, Targets] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, said = entry.partition("=")
        if not NAME.fullmatch(name) or name in _RESERVED or name in classes:
            raise ValueError(f"{name[:40]!r} is no new name of a class: 1 to 32 of a-z 0-9 -, not auto or default")
        numbers = said.split("/")
        if len(numbers) > 2 or not all(number.isdecimal() and number.isascii() for number in numbers):
            raise ValueError(f"{entry[:60]!r} is not NAME=TTFT or NAME=TTFT/ITL in whole milliseconds")
        ttft_ms, itl_ms = (min(int(number[:12]), MOST_MS) for number in (*numbers, "0")[:2])
        classes[name] = Targets.of_ms(ttft_ms, itl_ms)
    if len(classes) > _MOST_CLASSES:
        raise ValueError(f"{len(classes)} classes; at most {_MOST_CLASSES}")
    return classes


def class_of(classes: Mapping[str, Targets], name: str) -> Targets | None:
    """Return the targets of a class; those of none where nothing is named; None where there is no such class."""
    return classes.get(name) if name else NO_TARGETS
