"""`python -m headrace_router`: the router, from settings to exit."""

from __future__ import annotations

import signal

from headrace_core.signals import exit_on


def main() -> None:
    """Run until SIGTERM."""
    exit_on(signal.SIGTERM, signal.SIGINT, code=0)
    # Only now: it takes a while, and may be interrupted.
    from headrace_core.command_line import parse
    from headrace_core.config import RouterSettings

    settings = parse(RouterSettings)
    if settings.processes > 1:
        from headrace_router.processes import divide

        settings = divide(settings)  # before anything starts a thread
    from headrace_core import process

    from headrace_router.service import RouterService

    process.run(lambda: RouterService(settings), settings, role="router")


if __name__ == "__main__":
    main()
