"""Read a process's settings from its command line and the environment, and say what is wrong with them."""

from __future__ import annotations

import difflib
import os
import sys
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsError

S = TypeVar("S", bound=BaseSettings)

_UNKNOWN = "unrecognized arguments: "


def read(settings: type[S], argv: list[str]) -> S:
    """Return `settings` as `argv` and the environment have them.

    Raises:
        SettingsError: with a line for everything that is wrong.
    """
    try:
        return settings(_cli_parse_args=argv, _cli_exit_on_error=False)  # pyright: ignore[reportCallIssue]
    except ValidationError as error:
        problems: list[str] = []
        for problem in error.errors():
            name = "--" + ".".join(str(part) for part in problem["loc"]).replace("_", "-")
            what = "is needed" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")
            problems.append(f"{name} {what}" if problem["type"] == "missing" else f"{name}: {what}")
        raise SettingsError("\n".join(problems)) from None
    except SettingsError as error:
        raise SettingsError(_in_words(str(error), settings)) from None


def parse(settings: type[S], argv: list[str] | None = None) -> S:
    """Read `settings` from the command line and the environment; print what is wrong and exit 2 if they don't fit."""
    try:
        return read(settings, sys.argv[1:] if argv is None else argv)
    except SettingsError as error:
        for line in str(error).splitlines():
            complain(line)
        sys.stderr.write(f"`{settings.model_config.get('cli_prog_name')} --help` lists the options.\n")
        raise SystemExit(2) from None


def complain(problem: str) -> None:
    """Write one line to standard error, as the `headrace` command does: in red on a terminal that wants colours."""
    has_colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    start = "\x1b[1;31merror:\x1b[0m" if has_colours else "error:"
    sys.stderr.write(f"{start} {problem}\n")


def _in_words(problem: str, settings: type[BaseSettings]) -> str:
    """Return what the parser of options says, without its prefix, with the option that may have been meant."""
    problem = problem.removeprefix("error parsing CLI: ").removeprefix("argument ")
    if not problem.startswith(_UNKNOWN):
        return problem
    given = problem.removeprefix(_UNKNOWN).split()[0].partition("=")[0]
    known = ["--" + name.replace("_", "-") for name in settings.model_fields]
    near = difflib.get_close_matches(given, known, n=1)
    return f"there is no option {given}" + (f"; did you mean {near[0]}?" if near else "")
