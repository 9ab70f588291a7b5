"""What a client that asked for it is told of where its sample's time went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.v1 import generation_service_pb2

if TYPE_CHECKING:
    from headrace_router.requests.sample import Sample


def encode_timings(sample: Sample) -> generation_service_pb2.Timings:
    """Return the message."""
    return generation_service_pb2.Timings(
        phases=[
            generation_service_pb2.Phase(
                name=phase.name,
                duration_us=phase.duration_us,
                is_before_first_token=phase.is_before_first_token,
            )
            for phase in sample.waterfall.phases
        ],
        total_us=sample.waterfall.total_us,
        ttft_us=sample.waterfall.ttft_us or 0,
        transfer_bytes=sample.transfer_bytes,
        num_transfer_pages=sample.num_transfer_pages,
        transport=sample.transport,
        num_attempts=sample.attempt - sample.num_moves,
        prefill_worker=sample.prefill_address,
        decode_worker=sample.decode_address,
        hidden_transfer_us=sample.waterfall.hidden_us,
        hidden_transfer_bytes=sample.hidden_transfer_bytes,
    )
