"""What every subcommand shares: the consoles, errors in words, prompts from arguments and pipes."""

from __future__ import annotations

import sys
from pathlib import Path

from headrace_core.errors import HeadraceError, InvalidRequestError, NotFoundError
from headrace_core.grpc_options import MAX_MESSAGE_BYTES
from rich.console import Console
from rich.text import Text

from headrace_client.commands import hints

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

STATE_STYLES = {
    "ready": "green", "suspect": "yellow", "draining": "yellow", "starting": "yellow", "unreachable": "red",
    "refused": "red",
}  # fmt: skip
"""Of workers."""
LOST_STATES = ("unreachable", "starting", "refused")
"""In which what a worker last said of itself holds no longer."""

_HINTS = {
    "UNREACHABLE": "Start one with `headrace up --model DIR`, or name another with {option}.",
    "CONNECTION_LOST": "`{status}` shows whether the router is back.",
    "BAD_API_KEY": "Give a key of the router in HEADRACE_API_KEY, or its file with --api-key-file.",
    "NO_WORKERS": "`{status}` shows the workers and what keeps them from serving.",
    "QUEUE_FULL": "Try again later, or add workers.",
    "UNKNOWN_MODEL": "`{status}` names the model served.",
}


def report(error: HeadraceError) -> None:
    """Print what is wrong and, where it is known, what to do, to standard error."""
    # Where something else answers, the error says what: to start a router is no help.
    is_other = error.reason == "UNREACHABLE" and "refused" not in str(error)
    option = hints.server_option.get()
    hint = _HINTS.get(error.reason)
    if hint is None or is_other or ("{status}" in hint and option != hints.ROUTER_OPTION):
        complain(str(error))
    else:
        status = hints.headrace("status", *hints.same_router.get())
        complain(f"{error}\n{hint.format(status=status, option=option)}")


def complain(problem: str) -> None:
    """Print to standard error what is wrong, the way all commands do."""
    stderr.print(Text.assemble(("error: ", "bold red"), problem), soft_wrap=True)


def exit_code(error: HeadraceError) -> int:
    """Return 2 if the caller's input is wrong, 1 if the server failed."""
    return 2 if isinstance(error, InvalidRequestError | NotFoundError) else 1


def write_text(text: str) -> None:
    """Write generated text to standard output as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def check_writable(path: Path) -> None:
    """Refuse a file that can't be written, before the work that it is for; it stays as it is.

    Raises:
        InvalidRequestError: BAD_OPTION, naming it.
    """
    is_new = not path.exists()
    write_file(path, "", mode="a")
    if is_new:
        path.unlink()


def write_file(path: Path, text: str, mode: str = "w") -> None:
    """Write a file that an option names. Raises InvalidRequestError, BAD_OPTION, naming it."""
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        why = "it is a folder" if path.is_dir() else error.strerror
        raise InvalidRequestError("BAD_OPTION", f"can't write {path}: {why}") from None


def read_prompt(argument: str) -> str:
    """Return a prompt given on the command line; `-` reads it from standard input, less one newline at its end.

    Raises:
        InvalidRequestError: BAD_REQUEST, not UTF-8; PROMPT_TOO_LONG, larger than any router takes.
    """
    # Bytes of an argument that are not UTF-8 arrive as lone surrogates; this makes them bytes again.
    raw = _read_stdin() if argument == "-" else argument.encode(errors="surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            "BAD_REQUEST", f"the prompt is not valid UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from None


def _read_stdin() -> bytes:
    raw = sys.stdin.buffer.read(MAX_MESSAGE_BYTES + 1)
    if len(raw) > MAX_MESSAGE_BYTES:
        raise InvalidRequestError(
            "PROMPT_TOO_LONG", f"the prompt is larger than {MAX_MESSAGE_BYTES >> 20} MiB, which no router takes"
        )
    return raw.removesuffix(b"\n")


def format_bytes(size_bytes: int) -> str:
    """Return a size with its unit: 640.0 KiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
