"""Say what a decode worker would use on this machine, as JSON; `headrace doctor` shows it.

    python -m headrace_core.worker.doctor --model .

Options are the worker's, from the command line and the environment; no checkpoint is read. Exits with 2, and one
line that says why, where the worker could not start.
"""

from __future__ import annotations

import json
import sys

from headrace_core.command_line import parse
from headrace_core.config import DecodeSettings
from headrace_core.errors import StartupError
from headrace_core.worker.threads import limit_threads


def main() -> None:
    """Print it."""
    settings = parse(DecodeSettings)
    limit_threads(settings.threads)
    # Only now: torch reads the thread limits when it is imported.
    from headrace_core.worker.capabilities import capabilities

    try:
        print(json.dumps(capabilities(settings)))  # noqa: T201
    except StartupError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
