"""What the network asks of an attention kind: latent or grouped-query, it does not know which."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from headrace_core.model.op_timer import OpTimer
from headrace_core.model.step_inputs import StepInputs


class Attention(Protocol):
    """One layer's attention over paged memory."""

    def __call__(
        self, x: Tensor, angles: tuple[Tensor, Tensor], step: StepInputs, cache: Tensor, timer: OpTimer
    ) -> Tensor:
        """Write the step's tokens to the cache, then attend. Called once a layer and step, by the engine thread.

        Args:
            x: [T, N], normalised hidden states.
            angles: cosines and sines [T, R/2] float32 of the tokens' positions.
            step: where tokens and contexts lie.
            cache: [P, *page_shape] of this layer; the slots of `step.slot_mapping` are written.
            timer: told what ran, up to the output projection.

        Returns:
            [T, N], to be added to the residual.
        """
        ...
