"""What the router and the processes that render chat templates say to each other: whole messages over a socket.

    router ── Setup ─────────►  compile  ── reply ──► router
    router ── Conversation ──►  render   ── reply ──► router      (as often as wanted)

Requests are JSON. Replies are bytes: one for the kind, then UTF-8.
"""

from __future__ import annotations

import json
import signal
import socket
from dataclasses import asdict, dataclass, field
from enum import Enum

CPU_SIGNAL = signal.SIGPROF
"""What a process ends with that took too much CPU time."""
_LENGTH_BYTES = 8


class ReplyKind(Enum):
    """The first byte of a reply; what follows it."""

    TEXT = b"T"
    """The text rendered; nothing after a setup."""
    PROBLEM = b"P"
    """What is wrong with template or messages, for people."""
    TOO_LONG = b"L"
    """How many bytes the text has, in decimal."""


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A model's templates as its files have them, by name; one is called `default`, as a rule.

    `special_tokens` are variables for them, such as `bos_token`. `control_texts` are tokens' texts that are no such
    tokens where a user wrote them (`control_text.py`); none: they are.
    """

    templates: dict[str, str]
    special_tokens: dict[str, str]
    control_texts: list[str] = field(default_factory=list[str])

    def knows(self, word: str) -> bool:
        """Return whether a template has `word` in it."""
        return any(word in text for text in self.templates.values())


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is to be rendered; `ChatPrompt` of generation_service.proto says what the fields mean.

    JSON that others wrote is text here: it is read where time and memory are bounded.
    """

    messages: list[tuple[str, str, str]]
    """Role, content, further fields as a JSON object or empty."""
    tools: list[str] = field(default_factory=list[str])
    variables: str = ""
    template: str = ""
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def encode(self) -> bytes:
        """Return it as a message."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(message: bytes) -> Conversation:
        """Return what `encode` wrote."""
        return Conversation(**json.loads(message))


@dataclass(frozen=True, slots=True)
class Setup:
    """What a process is started for, and what it may take. Memory counts from what it has when it begins."""

    source: TemplateSource
    cpu_s: float
    memory_bytes: int
    max_text_bytes: int

    def encode(self) -> bytes:
        """Return it as a message."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(message: bytes) -> Setup:
        """Return what `encode` wrote."""
        fields = json.loads(message)
        source = TemplateSource(**fields.pop("source"))
        return Setup(source=source, **fields)


class MessageSocket:
    """One end of a stream socket, blocking. A timeout of the socket holds for each piece sent or received."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: bytes) -> None:
        """Send a message.

        Raises:
            OSError: the other end is gone, or (TimeoutError) does not read.
        """
        self._socket.sendall(len(message).to_bytes(_LENGTH_BYTES, "big"))
        self._socket.sendall(message)

    def receive(self) -> bytes:
        """Wait for a message.

        Raises:
            EOFError: the other end is gone.
            OSError: likewise, or (TimeoutError) it does not send.
        """
        return bytes(self._read(int.from_bytes(self._read(_LENGTH_BYTES), "big")))

    def close(self) -> None:
        """Let the other end find its end of file."""
        self._socket.close()

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            received = self._socket.recv_into(view[done:])
            if not received:
                raise EOFError("the other end is gone")
            done += received
        return data
