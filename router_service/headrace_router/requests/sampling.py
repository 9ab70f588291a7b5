"""How a request samples: checked, and completed by what the fleet serves. What many ask alike is worked out once.

Clients send the same parameters again and again, but for the seed. So they are looked up by their bytes, without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.v1 import types_pb2
from headrace_core.errors import InvalidRequestError
from headrace_core.request import DEFAULT_MAX_TOKENS, SamplingParams
from headrace_core.wire import decode_sampling, encode_sampling

from headrace_router.fleet.registry import FleetModel

_MOST_KEPT = 256
_MOST_KEPT_BYTES = 512
"""Of one request's parameters; longer ones, which have texts in them or grammars, are worked out each time."""


@dataclass(slots=True)
class Sampling:
    """What one request gets. Shared with others: not to be mutated, but for `message`."""

    params: SamplingParams
    """With `max_tokens` filled in; the seed is the message's alone."""
    message: types_pb2.SamplingParams
    """For workers: `params` and the seed, without the stop strings, which are the router's business."""
    silent_ids: frozenset[int]
    """Ids that end a sample and have no text."""
    special_stops: dict[int, str]
    """Those of them whose text is a stop string."""


class Checked:
    """Parameters that are in range. `settle` says what a request with them gets, and keeps what is alike for all."""

    def __init__(self, params: SamplingParams, specials: Mapping[str, int]) -> None:
        self.params = params
        """Without the seed."""
        self._specials = specials
        self._model: FleetModel | None = None
        self._settled: Sampling | None = None

    def settle(self, model: FleetModel, seed: int, room: int) -> Sampling:
        """Return what a request gets that has room for so many tokens of output.

        Raises:
            InvalidRequestError: BAD_TOKEN, BAD_SAMPLING or BAD_GRAMMAR.
        """
        if self._settled is None or self._model is not model:
            self._settled, self._model = self._settle(model), model
        settled = self._settled
        params, message = settled.params, types_pb2.SamplingParams()
        message.CopyFrom(settled.message)
        message.seed = seed
        assert params.max_tokens is not None, "filled in"
        if params.max_tokens > room:
            params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
            message.max_tokens, message.min_tokens = room, params.min_tokens
        return Sampling(params, message, settled.silent_ids, settled.special_stops)

    def _settle(self, model: FleetModel) -> Sampling:
        params = self.params
        special_stops = self._special_stops(params.stop_strings, model.vocab_size)
        # Who is asked for none makes one, which nobody is told of (`RequestSpec.is_prompt_only`).
        max_tokens = DEFAULT_MAX_TOKENS if params.max_tokens is None else max(1, params.max_tokens)
        params = replace(
            params,
            stop_token_ids=(*params.stop_token_ids, *special_stops),
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
        )
        params.validate_tokens(model.vocab_size, model.eos_token_ids)
        if params.grammar is not None and model.without_grammars:
            raise InvalidRequestError(
                "BAD_GRAMMAR",
                f"the worker at {model.without_grammars} can't hold answers to a grammar; its log says why",
            )
        eos_ids = () if params.ignore_eos else model.eos_token_ids
        return Sampling(
            params,
            encode_sampling(replace(params, stop_strings=())),
            frozenset((*params.stop_token_ids, *eos_ids)),
            special_stops,
        )

    def _special_stops(self, stop_strings: Sequence[str], vocab_size: int) -> dict[int, str]:
        """Return which of these are special tokens' texts, by token: answers have no text of theirs to look in."""
        found: dict[int, str] = {}
        for text in stop_strings:
            for special, token_id in self._specials.items():
                if special == text and token_id < vocab_size:
                    found[token_id] = text
                elif special in text and special != text:
                    raise InvalidRequestError(
                        "BAD_SAMPLING",
                        f"stop_strings: {text[:32]!r} has the special token {special[:32]!r} in it, which answers do "
                        "not show, so it would never be found; name the token alone",
                        param="stop_strings",
                    )
        return found


class Samplings:
    """Checks. Event loop only."""

    def __init__(self, defaults: SamplingParams, specials: Mapping[str, int]) -> None:
        """Args: `defaults` for what requests leave open; `specials` are the model's special tokens, by text."""
        self._defaults = defaults
        self._specials = specials
        self._kept: dict[bytes, Checked] = {}
        """By the bytes without the seed, the oldest first."""

    def check(self, message: types_pb2.SamplingParams) -> tuple[Checked, int | None]:
        """Return checked parameters, and the seed, which is taken out of the message; None: there is none.

        Raises:
            InvalidRequestError: BAD_SAMPLING, BAD_GRAMMAR.
        """
        seed = message.seed if message.HasField("seed") else None
        message.ClearField("seed")
        key = message.SerializeToString()
        checked = self._kept.get(key)
        if checked is None:
            checked = Checked(decode_sampling(message, self._defaults), self._specials)
            if len(key) <= _MOST_KEPT_BYTES:
                if len(self._kept) >= _MOST_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = checked
        return checked, seed
