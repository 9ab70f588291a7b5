"""Options that a run would not heed: named, instead of a run that is not the one that was meant."""

from __future__ import annotations

from collections.abc import Collection

from headrace_core.errors import InvalidRequestError


def check_effects(given: Collection[str], *, dataset: str, has_trace: bool, has_rate: bool, is_http: bool) -> None:
    """See that each option that was given, by its name without dashes, has an effect.

    Raises:
        InvalidRequestError: BAD_OPTION, naming one that has none, and what it belongs to.
    """
    is_shared, is_turns = (not has_trace and dataset == name for name in ("shared-prefix", "multi-turn"))
    without_trace = not has_trace, "a run without --trace, which says itself what is asked"
    over_http, over_grpc = (is_http, "--base-url"), (not is_http, "gRPC, not --base-url")
    belongs = {
        "time_scale": (has_trace, "--trace"),
        **dict.fromkeys(("dataset", "input_tokens", "output_tokens", "range_ratio"), without_trace),
        **dict.fromkeys(("prefixes", "prefix_tokens"), (is_shared, "--dataset shared-prefix")),
        "turns": (is_turns, "--dataset multi-turn"),
        "burstiness": (has_rate, "--request-rate"),
        **dict.fromkeys(("chat", "continuous_usage"), over_http),
        **dict.fromkeys(("server", "tls", "identity"), over_grpc),
    }
    for name, (has_effect, what) in belongs.items():
        if name in given and not has_effect:
            option = "--" + name.replace("_", "-")
            raise InvalidRequestError("BAD_OPTION", f"{option} has no effect here: it belongs to {what}")
