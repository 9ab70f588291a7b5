"""The process that renders chat templates: `python -m headrace_router.text.chat_process`, a socket as standard input.

A template is a program that came with the model, run on whatever a client sends: it can loop, recurse, and ask for
any amount of memory in one expression (`'a' * 10 ** 9`, `2 ** 10 ** 9`). Nothing inside an interpreter bounds all of
that: a thread can't be interrupted, counting iterations or lines misses what one call of C code does, and a list of
forbidden operations is never complete. So it runs here, where the kernel bounds it: address space by RLIMIT_AS, and
each job's CPU time by a timer whose signal ends the process, whatever it is doing. CPU time and not the clock, so that
a busy machine refuses nobody. `chat_renderer.py` starts another process then.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from jinja2 import TemplateError

from headrace_router.text.chat_protocol import CPU_SIGNAL, Conversation, MessageSocket, ReplyKind, Setup
from headrace_router.text.chat_template import ChatTemplate

_MAX_PROBLEM_CHARS = 300
"""A status of gRPC has little room, and a template may quote a whole conversation."""


def main() -> None:
    """Serve one parent until it is gone."""
    parent = MessageSocket(socket.socket(fileno=os.dup(0)))
    setup = Setup.decode(parent.receive())
    _limit_memory(setup.memory_bytes)
    signal.signal(CPU_SIGNAL, signal.SIG_DFL)
    compiled: list[ChatTemplate] = []

    def compile_template() -> str:
        compiled.append(ChatTemplate(setup.source))
        return ""

    parent.send(_reply(compile_template, setup))
    while True:
        try:
            request = parent.receive()
        except EOFError:
            return
        parent.send(_reply(lambda data=request: compiled[0].render(Conversation.decode(data)), setup))


def _reply(work: Callable[[], str], setup: Setup) -> bytes:
    """Do `work`, within its time, and return what came of it as a reply."""
    signal.setitimer(signal.ITIMER_PROF, setup.cpu_s)
    try:
        text = work().encode()
    except MemoryError:
        return ReplyKind.PROBLEM.value + f"it needs more than {setup.memory_bytes >> 20} MiB of memory".encode()
    except Exception as error:  # noqa: BLE001 - the boundary: a template may raise anything
        return ReplyKind.PROBLEM.value + _describe(error).encode(errors="replace")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if len(text) > setup.max_text_bytes:
        return ReplyKind.TOO_LONG.value + str(len(text)).encode()
    return ReplyKind.TEXT.value + text


def _describe(error: Exception) -> str:
    """Say what went wrong; what a template itself says stands alone."""
    text = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= _MAX_PROBLEM_CHARS else f"{text[:_MAX_PROBLEM_CHARS]} ..."


def _limit_memory(memory_bytes: int) -> None:
    """Bound this process's memory where the kernel does (Linux); elsewhere only time is bounded."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
