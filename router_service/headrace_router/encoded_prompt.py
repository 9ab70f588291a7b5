"""A request's prompt as messages to workers carry it: encoded and hashed once, for all samples, attempts and legs.

A prompt may have a hundred thousand ids, and every message has them. To make a message of a list of ids, or to hash the
ids of a message, takes Python a step for each of them; to merge encoded ids into a message, or to go on from a hash,
does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from headrace.v1 import decode_service_pb2, prefill_service_pb2
from headrace_core.request import token_words

_FIELD = "token_ids"
_LENGTH_DELIMITED = 2


class EncodedPrompt:
    """Not mutated."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        """Encode and hash; some ms for 100,000 ids, each in [0, 2^32)."""
        message = prefill_service_pb2.PrefillRequest(token_ids=token_ids)
        self._untagged = message.SerializeToString()[1:]
        self._hash = hashlib.sha256(token_words(token_ids))

    def put(
        self, message: prefill_service_pb2.PrefillRequest | decode_service_pb2.StartRequest, output_ids: Sequence[int]
    ) -> None:
        """Append the prompt and `output_ids` to the message's `token_ids`."""
        # Encoded ids are the field's tag, which differs from message to message, their length, and they themselves.
        number = message.DESCRIPTOR.fields_by_name[_FIELD].number
        message.MergeFromString(bytes([number << 3 | _LENGTH_DELIMITED]) + self._untagged)
        message.token_ids.extend(output_ids)

    def sha256(self, output_ids: Sequence[int]) -> bytes:
        """Return `hash_tokens` of the prompt and `output_ids`."""
        digest = self._hash.copy()
        digest.update(token_words(output_ids))
        return digest.digest()
