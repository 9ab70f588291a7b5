"""HTTP/2 by hand, for what no gRPC client would do."""

import socket
import struct

from headrace_core.testing.async_test import WAIT_S

INITIAL_WINDOW_SIZE = 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4


def _frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _connect(address, settings=b""):
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=WAIT_S)
    connection.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
    return connection


def settings_of(address):
    """Return the settings that a server begins with, by identifier."""
    with _connect(address) as connection, connection.makefile("rb") as stream:
        size, kind = struct.unpack(">IBxxxx", b"\0" + stream.read(9)[:4] + bytes(4))
        assert kind == _SETTINGS
        return dict(struct.iter_unpack(">HI", stream.read(size)))


def wait_idle_close(address):
    """Connect without a call; return once the server has closed that."""
    with _connect(address) as connection:
        while connection.recv(4096):
            pass


def call_without_window(address, method, message):
    """Call a method as a client that lets the server send nothing; return its connection."""
    connection = _connect(address, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
    _send(connection, method, message)
    return connection


def answer_within(address, method, message, timeout):
    """Call a method with this `grpc-timeout`; return the code of its status, or None if a message comes first."""
    with _connect(address) as connection, connection.makefile("rb") as stream:
        _send(connection, method, message, {"grpc-timeout": timeout})
        while head := stream.read(9):
            size, kind = struct.unpack(">IB", b"\0" + head[:4])
            payload = stream.read(size)
            if kind == _DATA and payload:
                return None
            if kind == _HEADERS and b"grpc-status" in payload:
                status = payload.partition(b"grpc-status")[2]
                return int(status[1 : 1 + status[0]])
    raise AssertionError("the server closed the connection")


def _send(connection, method, message, more=None):
    names = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x",
             "te": "trailers", "content-type": "application/grpc", **(more or {})}  # fmt: skip
    headers = b"".join(
        b"\0%c%b%c%b" % (len(name), name.encode(), len(text), text.encode()) for name, text in names.items()
    )
    data = b"\0" + struct.pack(">I", len(message)) + message
    connection.sendall(_frame(_HEADERS, 4, 1, headers) + _frame(_DATA, 1, 1, data))
