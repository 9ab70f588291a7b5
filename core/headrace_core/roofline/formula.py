"""Formulas that are shown exactly as they are computed.

A formula is a line of arithmetic, `2*T*N*H*(nope+R)`, over named symbols. The report prints it, the web page shows and
evaluates it, and Python computes with it: there is no second statement of it that could differ. Only what Python and
JavaScript write alike is used: `+ - * /`, parentheses, and the functions of `FUNCTIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import CodeType

Symbols = Mapping[str, float | Callable[[float], float]]
"""Values of symbols; `distinct` is the one that is a function (of tokens, see `routing`)."""

FUNCTIONS: dict[str, Callable[..., float]] = {"ceil": math.ceil, "max": max, "min": min, "pow": math.pow}
"""What a formula may call besides `distinct`."""

_GLOBALS: dict[str, object] = {"__builtins__": {}, **FUNCTIONS}


def evaluate(formulas: Sequence[str], symbols: Symbols) -> tuple[float, ...]:
    """Return the value of each formula.

    Formulas are constants of this package, never input: they are given to Python's own compiler, once each.

    Raises:
        NameError: A formula uses a symbol that has no value.
    """
    return eval(_compiled(tuple(formulas)), _GLOBALS, symbols)


def pretty(formula: str) -> str:
    """Return the formula as people write it: `2·T·N`."""
    return formula.replace("*", "·")


@lru_cache(maxsize=4096)
def _compiled(formulas: tuple[str, ...]) -> CodeType:
    return compile(f"({','.join(f'({formula})' for formula in formulas)},)", "<formula>", "eval")
