"""Renders conversations in processes that end when a template takes too much (`chat_process.py` says why).

One process for small conversations and one for large ones, so that a small one waits for small ones only; each takes
one at a time. A process starts when its first conversation comes (the first one with the router), and again after it
ended: at its limit, which is the template's fault and the client's answer; for any other cause, the conversation is
tried once more in a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys

from headrace_core.errors import InvalidRequestError, UnavailableError
from headrace_core.shares import Caller

from headrace_router.text.chat_protocol import (
    CPU_SIGNAL,
    Conversation,
    MessageSocket,
    ReplyKind,
    Setup,
    TemplateSource,
)
from headrace_router.text.size_lanes import SizeLanes

log = logging.getLogger(__name__)

_SMALL_BYTES = 64 << 10
CPU_S = 2.0
"""Templates of published models take 3 to 15 ms for a conversation of 4 MiB."""
_MEMORY_BYTES = 64 << 20
_MEMORY_PER_TEXT_BYTE = 48
"""A conversation is held as bytes, as text (up to 4 bytes a character), in pieces, joined, and as bytes again."""
_SILENCE_S = 30.0
"""A process that neither takes nor gives a byte for so long, though its CPU time is bounded, is not running at all."""
_END_S = 5.0
_OWN = Caller("", "")
"""The router itself."""


class ChatRenderer:
    """The chat template of one model. Event loop only; what renders are processes, waited for by threads."""

    def __init__(
        self, source: TemplateSource | None, *, max_text_bytes: int, problem: str = "", cpu_s: float = CPU_S
    ) -> None:
        """Start nothing yet.

        Args:
            source: None if the model has no template, or none that can be read.
            max_text_bytes: largest text that a conversation may become, UTF-8.
            problem: why it can't be read.
            cpu_s: CPU time that a conversation may take, and compiling the template.
        """
        self._problem = problem
        self._lanes = SizeLanes("chat", [_SMALL_BYTES])
        self._processes: list[_Process] = []
        self._checking: asyncio.Task[None] | None = None
        self._is_closed = False
        if source is not None:
            memory_bytes = _MEMORY_BYTES + _MEMORY_PER_TEXT_BYTE * max_text_bytes
            setup = Setup(source, cpu_s, memory_bytes, max_text_bytes)
            self._processes = [_Process(setup) for _ in range(self._lanes.num_lanes)]

    def start(self) -> None:
        """Compile the template in the background, and warn in the log if that fails; `close` must follow."""
        if self._problem:
            _warn(self._problem)
        elif self._processes:
            self._checking = asyncio.create_task(self._check(), name="chat template")

    async def render(self, conversation: Conversation, num_bytes: int, caller: Caller, *, deadline_s: float) -> str:
        """Return the text of a conversation, ready for the assistant's answer.

        Args:
            conversation: what is rendered.
            num_bytes: its size.
            caller: whose it is.
            deadline_s: by `time.monotonic`.

        Raises:
            InvalidRequestError: BAD_REQUEST: the model has no template, or none that compiles; or it refuses the
                messages, fails, or takes too much time or memory. PROMPT_TOO_LONG: the text is.
            DeadlineError: DEADLINE_EXCEEDED.
            UnavailableError: DRAINING; START_FAILED, the machine has no file, process or memory left for rendering.
        """
        if not self._processes:
            raise _no_chat(self._problem or "this model has no chat template")
        request = conversation.encode()
        return await self._lanes.run(num_bytes, caller, deadline_s, lambda lane: self._processes[lane].render(request))

    async def close(self) -> None:
        """End the processes, and what waits for them; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._checking is not None:
            self._checking.cancel()
        for process in self._processes:
            process.kill()
        for lane, process in enumerate(self._processes):
            await self._lanes.run_in(lane, _OWN, process.end)
        self._lanes.close()

    async def _check(self) -> None:
        try:
            await self._lanes.run_in(0, _OWN, self._processes[0].prepare)
        except InvalidRequestError as error:
            _warn(str(error))
        except (UnavailableError, _EndedError) as error:
            # Nobody's fault but the machine's; the first conversation tries again.
            log.warning("the chat template is not compiled yet", extra={"problem": str(error)})


class _Process:
    """One process, made when it is needed. For its lane's thread, but for `kill`."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._problem = ""
        """What is wrong with the template, once that is known for good."""
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: MessageSocket | None = None
        self._is_closed = False

    def prepare(self) -> None:
        """Start the process, if none runs, and let it compile the template.

        Raises:
            InvalidRequestError: BAD_REQUEST, the template does not compile.
            UnavailableError: as `_start` says.
            _EndedError: the process ended for a reason of its own.
        """
        if self._problem:
            raise _no_chat(self._problem)
        if self._socket is not None:
            return
        try:
            kind, text = self._ask(self._start(), self._setup.encode())
        except _EndedError as error:
            if not error.is_limit:
                raise
            kind, text = ReplyKind.PROBLEM, str(error)
        if kind is ReplyKind.PROBLEM:
            self._problem = f"this model's chat template does not compile: {text}"
            raise _no_chat(self._problem)

    def render(self, request: bytes) -> str:
        """Return the conversation's text; errors are those of `ChatRenderer.render`."""
        try:
            kind, text = self._render(request)
        except _EndedError as error:
            kind, text = ReplyKind.PROBLEM, str(error)
        if kind is ReplyKind.PROBLEM:
            raise InvalidRequestError("BAD_REQUEST", f"the chat template refuses these messages: {text}")
        if kind is ReplyKind.TOO_LONG:
            raise InvalidRequestError(
                "PROMPT_TOO_LONG",
                f"the chat template makes {text} bytes of the conversation; this router takes "
                f"{self._setup.max_text_bytes}",
            )
        return text

    def kill(self) -> None:
        """Let nothing of it go on, nor begin again; `end` must follow. For any thread."""
        self._is_closed = True
        if (child := self._child) is not None:
            child.kill()

    def end(self) -> int | None:
        """Wait until the process is over, a little, then kill it; return its exit code, minus a signal's number."""
        child, self._child = self._child, None
        end, self._socket = self._socket, None
        if end is not None:
            end.close()
        if child is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(_END_S)
        child.kill()
        return child.wait()

    def _render(self, request: bytes) -> tuple[ReplyKind, str]:
        for is_last in (False, True):
            try:
                self.prepare()
                assert self._socket is not None, "it was started"
                return self._ask(self._socket, request)
            except _EndedError as error:
                if error.is_limit or is_last:
                    raise
        raise AssertionError("the second try returns or raises")

    def _start(self) -> MessageSocket:
        """Raise UnavailableError: DRAINING, no process is to start any more; START_FAILED, none can."""
        if self._is_closed:
            raise UnavailableError("DRAINING", "the router is stopping; try another one")
        with contextlib.ExitStack() as opened:
            try:
                ours, theirs = (opened.enter_context(end) for end in socket.socketpair())
                ours.settimeout(_SILENCE_S)
                # A session of its own: Ctrl-C at the terminal is for the router, which needs this process to drain.
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "headrace_router.text.chat_process"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                problem = f"the router can't start the process that renders chat templates ({error}); try again later"
                raise UnavailableError("START_FAILED", problem) from error
            opened.pop_all()
        theirs.close()
        self._socket = MessageSocket(ours)
        return self._socket

    def _ask(self, process: MessageSocket, request: bytes) -> tuple[ReplyKind, str]:
        try:
            process.send(request)
            reply = process.receive()
        except TimeoutError:
            assert self._child is not None, "it was asked"
            self._child.kill()
            self.end()
            raise _EndedError(f"its process was silent for {_SILENCE_S:g} s") from None
        except (OSError, EOFError):
            code = self.end()
            if code == -CPU_SIGNAL:
                raise _EndedError(f"it takes more than {self._setup.cpu_s:g} s of computing", is_limit=True) from None
            raise _EndedError(f"its process ended with {code}") from None
        return ReplyKind(reply[:1]), reply[1:].decode()


class _EndedError(Exception):
    """A process ended before it answered; `is_limit`: because of the time that the template took."""

    def __init__(self, what: str, *, is_limit: bool = False) -> None:
        super().__init__(what)
        self.is_limit = is_limit


def _warn(problem: str) -> None:
    log.warning("chat requests will be refused", extra={"problem": problem})


def _no_chat(problem: str) -> InvalidRequestError:
    return InvalidRequestError("BAD_REQUEST", f"{problem}; send `text` or `tokens` instead of `chat`")
