"""Packages that only workers need, and what a process says that lacks them. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec

from headrace_core.errors import StartupError

WORKER_PACKAGES = ("torch", "psutil")
"""Without which no worker starts: the extra `worker`."""


def check_worker_packages() -> None:
    """Refuse to go on where a worker can't run for lack of a package.

    Raises:
        StartupError: NO_WORKER_PACKAGES, with the command that brings them.
    """
    if lacking := [name for name in WORKER_PACKAGES if find_spec(name) is None]:
        raise StartupError(
            "NO_WORKER_PACKAGES",
            f"not installed, and workers need it: {' and '.join(lacking)}; pip install 'headrace[worker]'",
        )
