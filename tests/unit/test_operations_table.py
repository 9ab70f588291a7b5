"""docs/operations.md says what each wrong input gets: by reasons and options that there are."""

import re
from pathlib import Path

from headrace_client.commands.app import app
from headrace_core.config import DecodeSettings, PrefillSettings, RouterSettings
from headrace_core.reasons import REASONS
from typer.testing import CliRunner

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
SECTION = PAGE.partition("## What each wrong input gets\n")[2].partition("\n## ")[0]


def test_its_reasons_are_in_the_table_of_errors():
    known = {reason for reasons in REASONS.values() for reason in reasons} | {"RESOURCE_EXHAUSTED"}
    told = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", SECTION))
    assert len(told) > 30
    assert told <= known


def test_its_options_are_settings():
    settings = (RouterSettings, PrefillSettings, DecodeSettings)
    known = {f"--{name.replace('_', '-')}" for each in settings for name in each.model_fields}
    told = set(re.findall(r"--[a-z][a-z-]+", SECTION.partition("**The command**")[0]))
    assert len(told) > 15
    assert told <= known


def test_its_options_of_the_command_are_the_command_s():
    helped = [
        CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output for name in ("generate", "roofline")
    ]
    told = set(re.findall(r"--[a-z][a-z-]+", SECTION.partition("**The command**")[2]))
    assert len(told) > 3
    assert [option for option in told if option not in "".join(helped)] == []
