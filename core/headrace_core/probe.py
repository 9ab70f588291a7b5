"""Asks a process for its health: `python -m headrace_core.probe HOST:PORT` exits with 0 if it is SERVING, else with 1.

For who can only run a command, as Docker does for HEALTHCHECK; Kubernetes speaks the gRPC health protocol by itself. It
imports little: it runs every few seconds beside the process that it asks. A process that has its identity from a
variable (`HEADRACE_ROUTER_TLS`) is asked with the same one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace_core import rpc
from headrace_core.errors import StartupError
from headrace_core.identity import ChannelTls, Identity, Role

TIMEOUT_S = 3.0
_ROLES = {"HEADRACE_ROUTER_TLS": Role.ROUTER, "HEADRACE_PREFILL_TLS": Role.PREFILL, "HEADRACE_DECODE_TLS": Role.DECODE}


def probe(address: str, timeout_s: float = TIMEOUT_S) -> str:
    """Return what is wrong with the process that serves at `host:port`, or nothing if it is SERVING."""
    try:
        tls = _tls()
    except StartupError as error:
        return str(error)
    with rpc.blocking_channel(address, tls=tls) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            answered: Any = error
            return f"{address}: {answered.code().name}: {answered.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"{address} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def _tls() -> ChannelTls | None:
    for name, role in _ROLES.items():
        folder = os.environ.get(name)
        if folder:
            identity = Identity(Path(folder), role)
            return identity.to_router() if role is Role.ROUTER else identity.to_worker()
    return None


def main() -> None:
    """Ask, say in one line on standard error what is wrong, and exit."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m headrace_core.probe HOST:PORT")
    sys.exit(probe(sys.argv[1]) or 0)


if __name__ == "__main__":
    main()
