"""`python -m headrace_planner`: the planner's commands, as `headrace` has them too."""

from __future__ import annotations

import typer

from headrace_planner import cli_plan, cli_roofline, cli_simulate

app = typer.Typer(help="Know the time before you spend it.", no_args_is_help=True)
app.add_typer(cli_roofline.app, name="roofline")
app.add_typer(cli_plan.app, name="plan")
app.add_typer(cli_simulate.app, name="simulate")

if __name__ == "__main__":
    app(prog_name="headrace")
