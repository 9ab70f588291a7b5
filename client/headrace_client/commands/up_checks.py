"""What `headrace up` finds wrong before it starts anything: options, addresses, packages."""

from __future__ import annotations

from collections.abc import Mapping

from headrace_core.address import parse_address
from headrace_core.command_line import read
from headrace_core.config import DecodeSettings, PrefillSettings, ProcessSettings, RouterSettings
from headrace_core.errors import InvalidRequestError
from headrace_core.packages import check_worker_packages
from pydantic_settings import SettingsError

from headrace_client.cluster.cluster_process import Role
from headrace_client.cluster.local_cluster import LocalCluster, arguments
from headrace_client.cluster.ports import is_free, next_free

METRICS_PORT = 9100

_SETTINGS: Mapping[Role, type[ProcessSettings]] = {
    "router": RouterSettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
    "both": DecodeSettings,
}
_PROCESS_NAMES = {"router": "router", "prefill": "prefill worker", "decode": "decode worker", "both": "worker"}


def choose_metrics_port(asked: int | None, count: int) -> int:
    """Return the first of `count` ports in a row, 0: any. Raises InvalidRequestError if those asked for are taken."""
    if not asked:
        return next_free(METRICS_PORT, count) if asked is None else 0
    if taken := [port for port in range(asked, asked + count) if not is_free(port)]:
        raise InvalidRequestError(
            "BAD_OPTION",
            f"--metrics-port {asked}: {count} processes serve metrics on the ports from there on, and {taken[0]} is "
            "taken; name another, or 0 for any",
        )
    return asked


def check(cluster: LocalCluster) -> None:
    """Refuse options that a process would refuse, and addresses that are taken, before anything is started.

    Raises:
        InvalidRequestError: BAD_OPTION, BAD_CLUSTER.
        StartupError: NO_WORKER_PACKAGES.
    """
    check_worker_packages()
    cluster.check_counts()
    counts: dict[Role, int] = {
        "router": 1,
        "prefill": cluster.num_prefill,
        "decode": cluster.num_decode,
        "both": cluster.num_both,
    }
    for role, count in counts.items():
        if count:
            try:
                read(_SETTINGS[role], arguments(cluster.options(role)))
            except SettingsError as error:
                problem = "; ".join(str(error).splitlines())
                raise InvalidRequestError("BAD_OPTION", f"{_PROCESS_NAMES[role]}: {problem}") from None
    router = cluster.options("router")
    for name in ("listen", "http-listen"):
        address = parse_address(str(router[name]), least_port=0) if router.get(name) else None
        if address and address.port and not address.is_name and not is_free(address.port, _host(address.host)):
            raise InvalidRequestError(
                "BAD_OPTION", f"--{name} {address} is taken, perhaps by another `headrace up`; name another port"
            )


def _host(host: str) -> str:
    return "127.0.0.1" if host == "localhost" else host
