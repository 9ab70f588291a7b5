"""The `headrace` command."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Run the command named by `sys.argv`; does not return."""
    # gRPC's own log lines are about connections whose failure the command reports in its own words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    from headrace_client.commands.app import app

    app(prog_name="headrace")


if __name__ == "__main__":
    main()
