"""`python -m headrace_router`: the router, from settings to exit."""

from __future__ import annotations

import functools

from headrace_core import process
from headrace_core.config import RouterSettings, parse

from headrace_router.server import RouterService


def main() -> None:
    """Run until SIGTERM."""
    settings = parse(RouterSettings)
    process.run(functools.partial(RouterService, settings), settings, role="router")


if __name__ == "__main__":
    main()
