"""What --help shows, of every subcommand alike: readable at any width, in a pipe, and with nothing cut short.

headrace NAME [OPTIONS]

What it does, with examples. One that is too long for the terminal goes on in the next line as a shell takes it.

Panel
  --option, -o TYPE  What it is for  [default: ...]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from rich.text import Text
from typer.core import TyperGroup

from headrace_client.commands.terminal import stdout

_MOST_WIDTH, _LEAST_WIDTH = 100, 40
_NAMES_WIDTH, _COMMANDS_WIDTH = 30, 14
_BESIDE_FROM = 80
"""At this width and above an option's help stands beside its name, below this under it."""
_INDENT = 6
_EXAMPLE = re.compile(r"^  (?P<command>\S.*?)(?:  +(?P<remark>\S.*))?$")
_WORD = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
_TYPES = {"<str>": "TEXT", "<int>": "N", "<int range>": "N", "<float>": "X", "<float range>": "X", "<path>": "PATH"}


class Group(TyperGroup):
    """Subcommands, whose --help and its own are written here."""

    sections: Mapping[str, Mapping[str, str]] = {}
    """Subcommands with a line about each, under titles; others follow under one of their own."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a subcommand, or None."""
        command: Any = super().get_command(ctx, cmd_name)
        return command and written_here(command)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page."""
        del formatter
        _print(self, ctx, [*_help(self.help), *self._listed(ctx), *_options(self, ctx)])

    def _listed(self, ctx: Any) -> Iterator[Text]:
        left = dict.fromkeys(self.list_commands(ctx))
        for title, commands in self.sections.items():
            here = {name: about for name, about in commands.items() if name in left}
            yield from _section(title, here, _COMMANDS_WIDTH)
            left = {name: None for name in left if name not in here}
        others = {
            name: (command.help or "").partition("\n")[0] for name in left if (command := self.get_command(ctx, name))
        }
        yield from _section("Commands", others, _COMMANDS_WIDTH)


def written_here(command: Any) -> Any:
    """Return `command`, whichever package it is of, with its --help written here."""
    if not isinstance(command, Group):
        command.format_help = partial(_format_help, command)
    return command


def _format_help(command: Any, ctx: Any, formatter: Any) -> None:
    del formatter
    _print(command, ctx, [*_help(command.help), *_options(command, ctx)])


def _print(command: Any, ctx: Any, lines: list[Text]) -> None:
    usage = " ".join(command.get_usage(ctx).split()).removeprefix("Usage: ")
    for line in [*_wrapped(Text(usage, style="bold"), "", "    "), *lines]:
        stdout.print(line, soft_wrap=True)


def _help(text: str | None) -> Iterator[Text]:
    yield Text()
    for line in (text or "").strip("\n").split("\n"):
        if (example := _EXAMPLE.match(line)) and not line.startswith("   "):
            yield from _example(example["command"], example["remark"] or "")
        else:
            yield from _wrapped(Text(line), "", "")


def _example(command: str, remark: str) -> Iterator[Text]:
    """Yield a command that can be pasted, whatever the width, with what is said about it beside it or before it."""
    note = f"# {remark.removeprefix('(').removesuffix(')')}" if remark else ""
    if len(command) + len(note) + 5 <= _width():
        yield Text.assemble("  ", (command, "cyan"), *([("  " + note, "dim")] if note else []))
        return
    if note:
        yield from _wrapped(Text(note, style="dim"), "  ", "  # ")
    lines = _broken(command, _width() - _INDENT - 2)
    for place, line in enumerate(lines):
        end = " \\" if place < len(lines) - 1 else ""
        yield Text.assemble(" " * (_INDENT if place else 2), (line, "cyan"), end)


def _broken(command: str, room: int) -> list[str]:
    """Return a command in lines, broken where a shell's words end, an option and its value kept together."""
    parts: list[str] = []
    for word in _WORD.findall(command):
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and not word.startswith("-"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 1 + len(part) <= room:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return lines


def _options(command: Any, ctx: Any) -> Iterator[Text]:
    panels: dict[str, list[Any]] = {"Arguments": [], "Options": []}
    for param in command.get_params(ctx):
        name = "Arguments" if param.param_type_name == "argument" else "Options"
        panels.setdefault(getattr(param, "rich_help_panel", None) or name, []).append(param)
    if len(panels["Options"]) == 1:  # --help alone
        panels["Options"] = panels.pop("Options")
    for title, params in panels.items():
        yield from _section(title, dict(record for param in params if (record := param.get_help_record(ctx))))


def _section(title: str, entries: Mapping[str, str], column: int = 0) -> Iterator[Text]:
    """Args: `column` is where what is said of an entry begins, at any width; 0: as the width allows."""
    if not entries:
        return
    yield Text()
    yield Text(title, style="bold")
    for name, about in entries.items():
        yield from _entry(name, " ".join(about.split()), column or (_NAMES_WIDTH if _width() >= _BESIDE_FROM else 0))


def _entry(name: str, about: str, column: int) -> Iterator[Text]:
    for shown, better in _TYPES.items():
        name = name.replace(shown, better)
    body = Text(about)
    if (start := about.rfind("[")) >= 0 and about.endswith("]"):
        body.stylize("dim", start)
    if not column:
        yield Text.assemble("  ", (name, "cyan"))
        yield from _wrapped(body, " " * _INDENT, " " * _INDENT)
        return
    first, *more = [*_wrapped(body, " " * column, " " * column)] or [Text()]
    if len(name) + 4 > column:
        yield Text.assemble("  ", (name, "cyan"))
        yield first
    else:
        first = first[column:]
        yield Text.assemble("  ", (f"{name:{column - 2}}", "cyan"), first)
    yield from more


def _wrapped(text: Text, first: str, further: str) -> Iterator[Text]:
    room = _width() - max(len(first), len(further))
    for place, line in enumerate(text.wrap(stdout, room) if text else [Text()]):
        line.rstrip()
        yield Text.assemble(further if place else first, line)


def _width() -> int:
    return max(_LEAST_WIDTH, min(stdout.width, _MOST_WIDTH))
