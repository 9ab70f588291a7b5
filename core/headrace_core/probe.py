"""Asks a process for its health: `python -m headrace_core.probe HOST:PORT` exits with 0 if it is SERVING, else with 1.

For who can only run a command, as Docker does for HEALTHCHECK; Kubernetes speaks the gRPC health protocol by itself. It
imports little: it runs every few seconds beside the process that it asks.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace_core import rpc

TIMEOUT_S = 3.0


def probe(address: str, timeout_s: float = TIMEOUT_S) -> str:
    """Return what is wrong with the process that serves at `host:port`, or nothing if it is SERVING."""
    with rpc.blocking_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            answered: Any = error
            return f"{address}: {answered.code().name}: {answered.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"{address} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def main() -> None:
    """Ask, say in one line on standard error what is wrong, and exit."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m headrace_core.probe HOST:PORT")
    sys.exit(probe(sys.argv[1]) or 0)


if __name__ == "__main__":
    main()
