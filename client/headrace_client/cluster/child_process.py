"""How a child of `local_cluster` begins: runs a program that ends when the process that started it ends.

`python -m headrace_client.cluster.child_process -m MODULE ARGUMENT...` or `... SCRIPT ARGUMENT...`. The parent holds
the other end of this process's standard input and never writes to it: end of file means that the parent is gone,
however it went. On Linux the kernel is asked as well, so that a stopped or hung child does not outlive its parent
either.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run the program named on the command line in this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A signal that the kernel gives to the watching thread would not wake the main one: the watcher blocks them all.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    program, *arguments = sys.argv[1:]
    if program == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
