"""What is told of a sample that has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace_router.requests.piece import Ending
from headrace_router.requests.timings_message import encode_timings

if TYPE_CHECKING:
    from headrace_router.requests.sample import Sample


def ending_of(sample: Sample) -> Ending:
    """Return it."""
    spec = sample.spec
    assert sample.finish_reason is not None, "it has ended"
    return Ending(
        sample.finish_reason,
        sample.matched_stop_string,
        num_prompt_tokens=len(spec.prompt_ids),
        num_output_tokens=len(sample.output_ids),
        num_cached_tokens=sample.num_cached_tokens,
        timings=encode_timings(sample) if spec.include_timings else None,
    )
