"""The command's entry: its subcommands, its help, and where an error becomes one line and an exit code."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from headrace_core import __version__
from headrace_core.errors import HeadraceError

from headrace_client.commands import (
    bench,
    certs,
    chat,
    dashboards,
    demo,
    doctor,
    experts,
    generate,
    keys,
    status,
    top,
    up,
)
from headrace_client.commands.help_page import Group, written_here
from headrace_client.commands.option_groups import spread
from headrace_client.commands.terminal import complain, exit_code, report, stderr, stdout

_HELP = """Serve language models with separate prefill and decode workers, and talk to them.

Exit codes: 0 done; 1 it failed, or something is not there; 2 wrong input; 130 interrupted.
"""
_SECTIONS = {
    "Start here": {
        "demo": "a small model, its time explained",
        "doctor": "what this machine has, and lacks",
    },
    "On your own": {
        "up": "a router and its workers: --model DIR",
        "generate": "text that goes on from yours",
        "chat": "a conversation",
        "status": "what serves, and how full it is",
        "top": "what it does, live",
        "experts": "how evenly experts are used",
        "bench": "load on a server, and what its clients saw",
        "dashboards": "what Grafana shows of it",
        "certs": "certificates for development",
        "keys": "API keys for clients",
    },
    "Before you buy": {
        "roofline": "what each operation takes",
        "plan": "how many workers, divided how",
        "simulate": "a cluster in simulated time",
    },
}
"""Subcommands in the order of the help."""
_PLUGINS = "headrace.commands"
"""Entry points of packages above this one, each a Typer app: a subcommand that is loaded when it is used."""
_UsageError: Any = typer.BadParameter.__base__
"""What is wrong with a command line; Typer gives no name to it."""


class _Group(Group):
    """Subcommands, those of other packages included, and where their errors end.

    Turns the errors that users can cause into a line and an exit code; anything else is a bug and shows itself.
    """

    sections = _SECTIONS

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all subcommands, always in the same order."""
        names = {*super().list_commands(ctx), *entry_points(group=_PLUGINS).names}
        order = [name for commands in _SECTIONS.values() for name in commands]
        return [*(name for name in order if name in names), *sorted(names - {*order})]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a subcommand, or None."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            for plugin in entry_points(group=_PLUGINS, name=cmd_name):
                command = typer.main.get_command(plugin.load())
                command.name = cmd_name
                written_here(command)
        return command

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run the command line and exit; one that can't be read ends as other errors do, with a line and 2."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except _UsageError as error:
            code = _report_usage(error)
        except typer.Abort:
            stderr.print("\ninterrupted", style="dim")
            code = 130
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except HeadraceError as error:
            report(error)
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            stderr.print("\ninterrupted", style="dim")
            raise typer.Exit(130) from None


def _report_usage(error: Any) -> int:
    """Say what is wrong with a command line and which --help to ask; return the exit code.

    A command that needs arguments and has none shows its help instead.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        return 2
    complain(error.format_message())
    if error.ctx is not None:
        stderr.print(f"`{error.ctx.command_path} --help` lists the options.", markup=False, soft_wrap=True)
    return 2


app = typer.Typer(
    name="headrace",
    help=_HELP,
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        stdout.print(f"headrace {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that come before a subcommand; Typer shows `_HELP` instead of this line."""


app.command(help=up.HELP)(spread(up.up))
app.command(help=generate.HELP)(spread(generate.generate))
app.command(help=chat.HELP)(spread(chat.chat))
app.command(help=status.HELP)(spread(status.status))
app.command(help=top.HELP)(spread(top.top))
app.command(help=experts.HELP)(spread(experts.experts))
app.add_typer(bench.app, name="bench")
app.command(help=dashboards.HELP)(dashboards.dashboards)
app.command(help=certs.HELP)(certs.certs)
app.command(help=keys.HELP)(keys.keys)
app.command(help=demo.HELP)(demo.demo)
app.command(help=doctor.HELP)(doctor.doctor)
