"""Run the decode worker: `python -m headrace_decode --model FOLDER`; `--help` lists every setting."""

from __future__ import annotations

import signal
import sys

from headrace_core.signals import exit_on


def main() -> None:
    """Run until a signal; exit codes are in `headrace_core.process`."""
    exit_on(signal.SIGTERM, signal.SIGINT, code=0)
    # Only now: it takes a while, and may be interrupted.
    from headrace_core.config import DecodeSettings, complain, parse
    from headrace_core.errors import StartupError
    from headrace_core.packages import check_worker_packages
    from headrace_core.process import keep_freed_memory, run
    from headrace_core.worker.threads import limit_threads

    settings = parse(DecodeSettings)
    try:
        check_worker_packages()
    except StartupError as error:
        complain(str(error))
        sys.exit(2)
    limit_threads(settings.threads)
    keep_freed_memory()
    # Only now: torch reads the thread limits when it is imported.
    from headrace_decode.service import DecodeService

    run(lambda: DecodeService(settings), settings, role=settings.role)


if __name__ == "__main__":
    main()
