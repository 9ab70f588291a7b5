"""Step times fitted from measured steps: least squares without negative coefficients.

A step is a shape and its seconds. Errors are taken relative to the measured time, so a 10 ms step counts as much as a
1 s one. Features that the data can't tell apart get a coefficient of 0 rather than a negative one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from headrace_core.errors import InvalidRequestError
from numpy.typing import NDArray

from headrace_planner.step_times import LinearStepTimes, StepShape

_FEATURES = ("fixed_s", "row_s", "row_beyond_s", "context_s", "prompt_token_s", "pair_s", "chunk_s")


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step that was timed."""

    shape: StepShape
    seconds: float


def fit_linear(steps: Sequence[MeasuredStep], *, knees: Sequence[int] = (1 << 30,)) -> LinearStepTimes:
    """Return the linear model closest to `steps`; of the `knees`, the one that fits best.

    Raises:
        InvalidRequestError: BAD_FIT, too few steps.
    """
    if len(steps) < 3:
        raise InvalidRequestError("BAD_FIT", f"{len(steps)} steps are too few to fit; measure at least 3")
    seconds = np.array([step.seconds for step in steps])
    fits: list[tuple[float, int, NDArray[np.float64]]] = []
    for knee in knees:
        matrix = np.array([_features(step.shape, knee) for step in steps]) / seconds[:, None]
        weights = nonnegative_least_squares(matrix, np.ones(len(steps)))
        fits.append((float(np.square(matrix @ weights - 1).sum()), knee, weights))
    _, knee, weights = min(fits, key=lambda fit: (fit[0], -fit[1]))
    return LinearStepTimes(**dict(zip(_FEATURES, map(float, weights), strict=True)), knee_rows=knee)


def nonnegative_least_squares(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x >= 0 that minimises |matrix x - target|. Source: Lawson and Hanson 1974, algorithm 23.10."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1
    a = matrix / scale
    x = np.zeros(a.shape[1])
    active = np.zeros(a.shape[1], dtype=bool)
    for _ in range(10 * a.shape[1]):
        gradient = a.T @ (target - a @ x)
        gradient[active] = -np.inf
        if active.all() or gradient.max() <= 1e-9:
            break
        active[int(gradient.argmax())] = True
        while True:
            solution = np.zeros_like(x)
            solution[active] = np.linalg.lstsq(a[:, active], target, rcond=None)[0]
            if solution[active].min() > 0:
                break
            falling = active & (solution <= 0)
            step = (x[falling] / np.maximum(x[falling] - solution[falling], 1e-300)).min()
            x = x + step * (solution - x)
            active &= x > 1e-12
            x[~active] = 0
            if not active.any():
                break
        x = solution
    return np.maximum(x, 0) / scale


def _features(shape: StepShape, knee: int) -> list[float]:
    rows = shape.num_rows
    return [
        1.0,
        min(rows, knee),
        max(0, rows - knee),
        shape.context_tokens,
        shape.prompt_tokens,
        shape.prompt_pairs,
        shape.num_chunks,
    ]
