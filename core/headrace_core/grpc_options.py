"""What gRPC is told of its servers and channels: sane limits, and pings that notice a stopped peer."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 8 << 20
"""Largest control message; a prompt of a million token ids fits. Page frames are smaller."""

_WINDOW_BYTES = 16 << 10
"""What a caller may send of a message before we read it."""
_MAX_PENDING_CALLS = 8192
"""Of one method, not yet seen by Python; about 30 kB each. Past it core cancels calls, without our reason."""
MAX_IDLE_MS = 15_000
"""Of a connection without a call: then it is closed, and its place is free. A channel connects again by itself."""
_HANDSHAKE_TIMEOUT_MS = 5_000
"""So whoever takes every place and says nothing keeps others out for no longer than these two."""

# A stopped peer is noticed after about 10 s: a ping every 5 s, answered within 5 s.
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
MAX_METADATA_BYTES = 8 << 10
"""Of one call. Core's own limits are this and twice it, between which it refuses by chance."""
_LIMITS = [
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
SERVER_OPTIONS = [
    *_LIMITS,
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    # Without a fixed window core takes up to 4 MB of each unread message; while one is read, the window follows it.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
    # Core's own limits are 1000 and 3000, between which it cancels calls by chance.
    ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_CALLS),
    ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_MS),
]
CHANNEL_OPTIONS = [
    *_LIMITS,
    *_KEEPALIVE,
    # From this time to twice it, so always before the server: what a server closes is a line in grpc's log.
    ("grpc.client_idle_timeout_ms", MAX_IDLE_MS // 3),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # This one also bounds a connection attempt: a loaded peer needs more than a moment to answer.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
