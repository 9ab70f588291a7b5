"""Log-probabilities of tokens, by the model's own logits.

Letters: A rows, V vocabulary, n most probable tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logprobs_of(logits: Tensor, own: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the most probable tokens [A, n] int64, and log-probabilities [A, 1 + n] float32: `own`'s, then theirs.

    Of equal logits the lower id comes first, as a greedy row takes it. Of a row with a NaN the numbers mean nothing but
    that the first of them is NaN.

    Args:
        logits: [A, V] float32.
        own: [A] int64, in the vocabulary.
        count: n, cut to V.
    """
    # By logits: of two that differ a little, the log-probabilities may be equal.
    best = _ranks(logits).topk(min(count, logits.shape[1]), dim=-1).indices if count else own.new_empty((len(own), 0))
    logprobs = logits.log_softmax(dim=-1)
    # Of logits as far apart as float32 goes, the logarithm overflows; no client expects an infinity.
    logprobs = logprobs.clamp_(min=torch.finfo(torch.float32).min)
    return best, logprobs.gather(1, torch.cat((own[:, None], best), dim=1))


def _ranks(logits: Tensor) -> Tensor:
    """Return numbers [A, V] int64, no two of a row equal: larger for larger `logits`, of equal ones for the lower id.

    So the best k of a row are the first k of its best n, whatever its neighbours ask for. A row with a NaN gets numbers
    that mean nothing.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0.0 equals 0.0, and becomes it
    bits ^= (bits >> 31) & 0x7FFFFFFF  # the less, the more negative
    ids = torch.arange(logits.shape[1], device=logits.device)
    return bits.long().mul_(1 << 32).sub_(ids)
