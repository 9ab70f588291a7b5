"""Where the planner's commands turn an error into one line and an exit code."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import typer
from headrace_client.commands.terminal import complain
from headrace_core.errors import InvalidRequestError, StartupError

from headrace_planner.cli_kernels import KernelsError
from headrace_planner.live import NothingMeasuredError, UnreachableError


@contextmanager
def readable_errors() -> Generator[None]:
    """End with 1 what failed here or at a worker, and with 2 what the command line or a file has wrong."""
    try:
        yield
    except (StartupError, UnreachableError, NothingMeasuredError, KernelsError) as error:
        complain(str(error))
        raise typer.Exit(1) from None
    except (InvalidRequestError, ValueError, OSError) as error:
        complain(str(error))
        raise typer.Exit(2) from None


@contextmanager
def written(path: Path) -> Generator[None]:
    """Say of an output file that the command line names and nobody can write, which it is and why.

    Raises:
        InvalidRequestError: BAD_OPTION.
    """
    try:
        yield
    except OSError as error:
        text = f"{path} can't be written: {error.strerror or error}; name another file"
        raise InvalidRequestError("BAD_OPTION", text) from None
