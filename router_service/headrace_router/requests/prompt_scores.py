"""What is known of a prompt's log-probabilities, through all attempts: each token's is taken once, in order."""

from __future__ import annotations

from headrace.v1 import types_pb2
from headrace_core.errors import ProtocolError

from headrace_router.requests.admission import RequestSpec
from headrace_router.requests.unsent import Unsent


class PromptScores:
    """One sample's."""

    def __init__(self, spec: RequestSpec, unsent: Unsent) -> None:
        """Args: `unsent` gets them."""
        self.num_known = 0
        self._num_top = spec.params.prompt_logprobs
        self._num_wanted = 0 if self._num_top is None else len(spec.prompt_ids) - 1
        self._unsent = unsent

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing of what was asked for."""
        return self.num_known == self._num_wanted

    def take(self, logprobs: types_pb2.PromptLogprobs) -> bool:
        """Take a worker's; return whether they were news.

        Raises:
            ProtocolError: PROTOCOL, they can't be of this prompt, or leave a gap.
        """
        first, count = logprobs.first_position, len(logprobs.logprobs)
        if first <= self.num_known:
            return False
        is_next = first == self.num_known + 1 and self.num_known + count <= self._num_wanted
        if not is_next or len(logprobs.top_token_ids) > count * (self._num_top or 0):
            raise ProtocolError(
                "PROTOCOL",
                f"it sent log-probabilities of {count} prompt tokens from {first} on, {self.num_known} are known of "
                f"{self._num_wanted} that are wanted",
            )
        self.num_known += count
        self._unsent.add_prompt_logprobs(logprobs)
        return True
