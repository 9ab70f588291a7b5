"""A request's prompt as messages to workers carry it: encoded and hashed once, for all samples and attempts.

A prompt may have a hundred thousand ids, and every message has them. To make a message of a list of ids, or to hash the
ids of a message, takes Python a step for each of them; to merge encoded ids into a message, or to go on from a hash,
does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from headrace.v1 import decode_service_pb2
from headrace_core.request import token_words


class EncodedPrompt:
    """Not mutated."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        """Encode and hash; some ms for 100,000 ids, each in [0, 2^32)."""
        self._encoded = decode_service_pb2.StartSequence(token_ids=token_ids).SerializeToString()
        self._hash = hashlib.sha256(token_words(token_ids))

    def put(self, message: decode_service_pb2.StartSequence, output_ids: Sequence[int]) -> None:
        """Append the prompt and `output_ids` to the message's `token_ids`."""
        message.MergeFromString(self._encoded)
        message.token_ids.extend(output_ids)

    def sha256(self, output_ids: Sequence[int]) -> bytes:
        """Return `hash_tokens` of the prompt and `output_ids`."""
        digest = self._hash.copy()
        digest.update(token_words(output_ids))
        return digest.digest()
