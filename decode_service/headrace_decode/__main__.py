"""Run the decode worker: `python -m headrace_decode --model FOLDER`; `--help` lists every setting."""

from __future__ import annotations

import signal

from headrace_core.signals import exit_on


def main() -> None:
    """Run until a signal; exit codes are in `headrace_core.process`."""
    exit_on(signal.SIGTERM, signal.SIGINT, code=0)
    # Only now: it takes a while, and may be interrupted.
    from headrace_core.config import DecodeSettings, parse
    from headrace_core.process import keep_freed_memory, run
    from headrace_core.worker.threads import limit_threads

    settings = parse(DecodeSettings)
    limit_threads(settings.threads)
    keep_freed_memory()
    # Only now: torch reads the thread limits when it is imported.
    from headrace_decode.service import DecodeService

    run(lambda: DecodeService(settings), settings, role=settings.role)


if __name__ == "__main__":
    main()
