"""Settings of a process: what can't be is refused by option and value, before anything is loaded."""

from __future__ import annotations

import pytest
from headrace_core.command_line import parse
from headrace_core.config import DecodeSettings, PrefillSettings, RouterSettings

SETTINGS = [(PrefillSettings, ()), (DecodeSettings, ()), (RouterSettings, ("--workers", "a:1"))]


@pytest.mark.parametrize(("settings", "needed"), SETTINGS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("option", ["--listen", "--metrics-listen"])
@pytest.mark.parametrize(
    "address", ["127.0.0.1:80000", "foo", "127.0.0.1:-1", "unix:/tmp/a", "http://a:5", ":5", "::1:5", ""]
)
def test_what_can_not_be_listened_at_is_refused(settings, needed, option, address, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(settings, ["--model", "m", *needed, f"{option}={address}"])
    assert exit_.value.code == 2
    assert f"{option}: {address!r} is " in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:50051", "[::]:50051", "localhost:1", "[::1]:65535"])
def test_what_can_be_listened_at_is_left_as_it_is(address):
    assert parse(DecodeSettings, ["--model", "m", "--listen", address]).listen == address


@pytest.mark.parametrize("address", ["nonsense", "a:0", "a:80000", "http://a:5", "dns:///a:5", "unix:a"])
def test_nobody_is_told_of_an_address_that_is_none(address, capsys):
    with pytest.raises(SystemExit):
        parse(PrefillSettings, ["--model", "m", "--advertise", address])
    assert f"--advertise: {address!r} is not host:port" in capsys.readouterr().err


def test_an_address_to_tell_may_be_a_name_or_left_out():
    assert parse(PrefillSettings, ["--model", "m", "--advertise", "prefill-0:50051"]).advertise == "prefill-0:50051"
    assert parse(PrefillSettings, ["--model", "m"]).advertise == ""


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--drian-s", "1"], "there is no option --drian-s; did you mean --drain-s?"),
        (["--nothing-like-it=1"], "there is no option --nothing-like-it"),
        (["--kv-pool-mib"], "--kv-pool-mib: expected one argument"),
        (["--device", "tpu"], "--device: Input should be 'cpu' or 'cuda'"),
    ],
)
def test_a_wrong_option_is_one_line_and_where_to_look(argv, line, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(PrefillSettings, ["--model", "m", *argv])
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"error: {line}", "`python -m headrace_prefill --help` lists the options."]


def test_everything_that_is_wrong_is_said_at_once(capsys):
    with pytest.raises(SystemExit):
        parse(PrefillSettings, ["--page-size", "0"])
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["error: --model is needed", "error: --page-size: Input should be greater than or equal to 1"]


@pytest.mark.parametrize("settings", [PrefillSettings, DecodeSettings, RouterSettings])
def test_help_has_examples_at_the_left(settings, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(settings, ["--help"])
    assert caught.value.code == 0
    assert "\nExamples:\n  python -m headrace_" in capsys.readouterr().out
