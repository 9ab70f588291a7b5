"""Run the prefill worker: `python -m headrace_prefill --model FOLDER`; `--help` lists every setting.

Started by torchrun it is one rank of the worker's group.
"""

from __future__ import annotations

import signal
import sys

from headrace_core.signals import exit_on


def main() -> None:
    """Run until a signal; exit codes are in `headrace_core.process`."""
    exit_on(signal.SIGTERM, signal.SIGINT, code=0)
    # Only now: it takes a while, and may be interrupted.
    from headrace_core.command_line import complain, parse
    from headrace_core.config import PrefillSettings
    from headrace_core.errors import StartupError
    from headrace_core.packages import check_worker_packages
    from headrace_core.process import keep_freed_memory, use_huge_pages
    from headrace_core.ranks.place import own_place
    from headrace_core.worker.threads import limit_threads

    settings = parse(PrefillSettings)
    try:
        check_worker_packages()
        place = own_place()
    except StartupError as error:
        complain(str(error))
        sys.exit(2)
    limit_threads(settings.threads)
    keep_freed_memory()
    use_huge_pages()
    # Only now: torch reads these limits when it is imported.
    from headrace_core.worker.run_worker import run_worker

    from headrace_prefill.service import PrefillService

    run_worker(settings, place, lambda loader: PrefillService(settings, loader=loader), role="prefill")


if __name__ == "__main__":
    main()
