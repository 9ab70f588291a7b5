"""--help of every subcommand, whichever package it is of: nothing is cut short, and examples can be pasted."""

import re
import shlex
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import typer
from headrace_client.commands.app import app
from headrace_client.commands.option_groups import spread
from rich.cells import cell_len
from typer.testing import CliRunner

COMMANDS = [
    *((name,) for name in typer.main.get_command(app).list_commands(None)),  # pyright: ignore[reportArgumentType]
    ("bench", "compare"),
]


def page(command: tuple[str, ...], width: int, **env: str) -> str:
    result = CliRunner(env={"COLUMNS": str(width), **env}).invoke(app, [*command, "--help"], catch_exceptions=False)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def params_of(words: list[str]):
    """Return what the subcommand named by `words` takes."""
    command = typer.main.get_command(app)
    for word in words:
        found = command.get_command(None, word) if hasattr(command, "get_command") else None
        if found is None:
            break
        command = found
    return command.get_params(typer.Context(command))


def test_all_are_asked():
    assert len(COMMANDS) == 16


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("width", [40, 60, 100, 300])
def test_no_line_is_too_wide_and_every_option_is_there_whole(command, width):
    text = page(command, width)
    for line in text.splitlines():
        # An option and its value stay together, and whole, so that they can be copied: at 40 columns some are longer.
        assert cell_len(line) <= min(width, 100) or (width == 40 and line.lstrip().startswith("--")), line
    for param in params_of([*command]):
        for name in (*param.opts, *param.secondary_opts) if param.param_type_name == "option" else ():
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), name
    assert "\x1b" not in text
    assert "…" not in text.replace("[,R…]", "").replace("[,N…]", "").replace(":MS,…", ""), "nothing is cut short"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_examples_can_be_pasted_at_any_width_and_name_options_that_there_are(command):
    found = {width: examples(page(command, width)) for width in (40, 60, 300)}
    assert found[40] == found[60] == found[300], "the width changes where a line breaks, not what it says"
    mine = [words for words in found[60] if words[: 1 + len(command)] == ["headrace", *command]]
    assert mine
    for words in found[60]:
        if "headrace" not in words:
            continue
        words = words[words.index("headrace") + 1 :]
        words = words[: words.index("|")] if "|" in words else words
        known = {name for param in params_of(words) for name in (*param.opts, *param.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words


def examples(text: str) -> list[list[str]]:
    """Return the words of each line under `Examples:`, as a shell reads it."""
    block = text.split("Examples:\n", 1)[1].split("\n\n", 1)[0].replace("\\\n", " ")
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


@dataclass(frozen=True)
class Load:
    """A group of options."""

    panel: ClassVar = "Load"

    rate: Annotated[float, typer.Option("--rate", "-r", help="Requests a second.")]
    names: Annotated[list[str] | None, typer.Option("--name")] = None


def small_app(heard: list[object]) -> typer.Typer:
    def command(load: Load, seed: Annotated[int, typer.Option()] = 7) -> None:
        heard.append((load, seed))

    small = typer.Typer()
    small.command()(spread(command))
    return small


def test_a_group_s_fields_are_options_and_come_back_as_one_value():
    heard: list[object] = []
    result = CliRunner().invoke(small_app(heard), ["-r", "2.5", "--name", "a", "--name", "b"], catch_exceptions=False)
    assert result.exit_code == 0
    assert heard == [(Load(2.5, ["a", "b"]), 7)]
    assert CliRunner().invoke(small_app(heard), []).exit_code == 2, "a field without a default must be given"


def test_two_options_of_one_name_are_noticed():
    def command(load: Load, rate: int) -> None: ...

    with pytest.raises(TypeError, match="rate"):
        spread(command)
