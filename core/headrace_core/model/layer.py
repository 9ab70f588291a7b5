"""One layer of the network: two norms, attention, and what follows it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headrace_core.model.attention import Attention
from headrace_core.model.feed_forward import FeedForward
from headrace_core.model.op_timer import OpTimer
from headrace_core.model.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's norms and networks. Letters: T tokens of the step, N hidden, K experts a token, R rope width."""

    attention_norm: Tensor
    attention: Attention
    feed_forward_norm: Tensor
    feed_forward: FeedForward

    def __call__(
        self,
        x: Tensor,
        eps: float,
        angles: tuple[Tensor, Tensor],
        step: StepInputs,
        pages: Tensor,
        timer: OpTimer,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream [T, N] after this layer for `x` [T, N], and the experts chosen [T, K or more].

        What the step's tokens cache is written to `pages` [P, *page_shape]. `angles` [T, R/2] are cosines and sines.
        """
        x = self.attention(x, self.attention_norm, eps, angles, step, pages, timer)
        return self.feed_forward(x, self.feed_forward_norm, eps, step.slot_mapping, timer)
