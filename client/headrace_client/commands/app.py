"""The command's entry: its subcommands, its help, and where an error becomes one line and an exit code."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from headrace_core import __version__
from headrace_core.errors import HeadraceError
from typer.core import TyperGroup

from headrace_client.commands import bench, certs, chat, dashboards, demo, doctor, generate, keys, status, top, up
from headrace_client.commands.terminal import exit_code, report, stderr, stdout

_HELP = """Serve language models with separate prefill and decode workers, and talk to them.

[bold]Start here[/bold]
  headrace demo                             a small model, and where its time goes
  headrace doctor                           what this machine has, and what it lacks

[bold]On your own[/bold]
  headrace up --model DIR                   start router and workers
  headrace generate "Once upon a time"      stream text
  headrace chat                             talk
  headrace status                           what serves, and how full it is
  headrace top                              what it does, live: latencies, hand-offs, experts
  headrace bench                            load on a server, and what its clients saw
  headrace dashboards                       what Grafana shows of it
  headrace certs                            certificates for development
  headrace keys                             API keys for clients

[bold]Before you buy[/bold]
  headrace roofline                         time and bytes of every operation on a machine
  headrace plan                             how many workers, divided how
  headrace simulate                         a cluster in simulated time

[bold]Exit codes[/bold]
  0 done, 1 the server failed or is not there, 2 wrong input, 130 interrupted
"""


_PLUGINS = "headrace.commands"
"""Entry points of packages above this one, each a Typer app: a subcommand that is loaded when it is used."""


class _Group(TyperGroup):
    """Subcommands, those of other packages included, and where their errors end.

    Turns the errors that users can cause into a line and an exit code; anything else is a bug and shows itself.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all subcommands."""
        return [*super().list_commands(ctx), *entry_points(group=_PLUGINS).names]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a subcommand, or None."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            for plugin in entry_points(group=_PLUGINS, name=cmd_name):
                command = typer.main.get_command(plugin.load())
                command.name = cmd_name
        return command

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


app.command(help=up.HELP)(up.up)
app.command(help=generate.HELP)(generate.generate)
app.command(help=chat.HELP)(chat.chat)
app.command(help=status.HELP)(status.status)
app.command(help=top.HELP)(top.top)
app.add_typer(bench.app, name="bench")
app.command(help=dashboards.HELP)(dashboards.dashboards)
app.command(help=certs.HELP)(certs.certs)
app.command(help=keys.HELP)(keys.keys)
app.command(help=demo.HELP)(demo.demo)
app.command(help=doctor.HELP)(doctor.doctor)
