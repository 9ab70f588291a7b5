"""The `headrace` command."""

from __future__ import annotations

import os
import signal
import sys

from headrace_core.signals import INTERRUPTED, exit_on, interruptible


def main() -> None:
    """Run the command named by `sys.argv`; does not return."""
    exit_on(signal.SIGINT, code=INTERRUPTED)
    # Only now: what is imported takes a while, and may be interrupted.
    from headrace_client.commands import standard_streams

    standard_streams.guard()
    # gRPC's own log lines are about connections whose failure the command reports in its own words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from headrace_client.commands.app import app

    try:
        with interruptible():
            app(prog_name="headrace")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
