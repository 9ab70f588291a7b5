"""`headrace doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from headrace_client.commands.terminal import stdout, write_text
from headrace_client.doctor.advice import Missing, missing
from headrace_client.doctor.machine import Machine, look
from headrace_client.doctor.outlook import Outlook, outlook
from headrace_client.doctor.report import machine_rows, render, worker_rows

HELP = """Say what this machine has, what Headrace uses of it, and what is missing.

Examples:
  headrace doctor
  headrace doctor --json | jq -r '.missing[].command'

It takes a few seconds: a process that decides as workers do is asked what they would use, with the settings in \
HEADRACE_DECODE_... of the environment. Nothing is installed or changed.

Exit codes: 0 a worker can run here, 1 none can.
"""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Run the command."""
    machine = look()
    found = outlook(machine)
    lacking = missing(machine, found)
    if as_json:
        report = {
            "can_run_worker": found.can_run,
            "problem": found.problem,
            "machine": asdict(machine),
            "worker": found.worker,
            "missing": [asdict(each) for each in lacking],
        }
        write_text(json.dumps(report, indent=2) + "\n")
    else:
        _show(machine, found, lacking)
    if not found.can_run:
        raise typer.Exit(1)


def _show(machine: Machine, found: Outlook, lacking: list[Missing]) -> None:
    stdout.print(render("This machine has", machine_rows(machine)))
    if found.worker is not None:
        stdout.print()
        stdout.print(render("A worker uses", worker_rows(found.worker)))
    if lacking:
        stdout.print()
        stdout.print(Text("Missing", style="bold"))
    for each in lacking:
        need = "needed" if each.is_needed else "optional"
        stdout.print(Padding(Text(f"{each.what} ({need}): {each.why}"), (0, 0, 0, 2)))
        if each.command:
            stdout.print(Text(f"    {each.command}", style="cyan"), soft_wrap=True)
    stdout.print()
    if found.can_run:
        stdout.print(Text("A worker can run here.", style="green"))
    else:
        stdout.print(Text(f"No worker can run here: {found.problem}.", style="red"))
