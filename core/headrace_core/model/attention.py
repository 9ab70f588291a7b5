"""What the network asks of an attention kind: latent or grouped-query, it does not know which."""

from __future__ import annotations

from typing import Protocol

from headrace_kernels.split_ranges import SplitPlan
from torch import Tensor

from headrace_core.model.op_timer import OpTimer
from headrace_core.model.step_inputs import StepInputs


class Attention(Protocol):
    """One layer's attention over paged memory. Engine thread only."""

    def __call__(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        angles: tuple[Tensor, Tensor],
        step: StepInputs,
        cache: Tensor,
        timer: OpTimer,
    ) -> Tensor:
        """Write the step's tokens to the cache, then attend. Called once a layer and step.

        Args:
            x: [T, N], the residual stream.
            norm_weight: [N], of the norm before this network; `eps` is added to its mean square.
            eps: see `norm_weight`.
            angles: cosines and sines [T, R/2] float32 of the tokens' positions.
            step: where tokens and contexts lie.
            cache: [P, *page_shape] of this layer; the slots of `step.slot_mapping` are written.
            timer: told what ran, from the norm to the output projection.

        Returns:
            [T, N], the residual stream after this network.
        """
        ...

    def plan_decode(self, context_lens: Tensor, page_size: int) -> SplitPlan | None:
        """Return how attention over `context_lens` [B] is shared out; one plan serves all layers of a step."""
        ...
