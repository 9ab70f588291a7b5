"""Options that are nonsense: one clear complaint and exit code 2, nothing written, nothing started."""

import os

import pytest
from headrace_client.commands.app import app
from headrace_core.testing.fake_router import FakeRouter
from typer.testing import CliRunner

NOBODY = "127.0.0.1:1"


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "300"})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["generate", "--tokens", "\u0663"], "is not a token id"),
        (["generate", "Tell", "--logit-bias", "\u0663=1"], "is not ID=BIAS"),
        (["generate", "Tell", "--logit-bias", "1_0=1"], "is not ID=BIAS"),
        (["generate", "Tell", "--api-key-file", "/dev/zero"], "too large"),
        (["generate", "Tell", "--api-key-file", "."], "directory"),
        (["keys", "keys.toml", "a", "--requests-per-minute", "9" * 20], "--requests-per-minute"),
        (["certs", "made", "--days", "9" * 12], "--days"),
        (["certs", "made", "--host", "a b"], "'a b' is neither a host name nor an address"),
        (["certs", "made", "--host", ""], "'' is neither a host name nor an address"),
        (["certs", "made", "--host", "\udcff"], "is neither a host name nor an address"),
        (["up", "--model", ".", "--prefill", "9" * 20], "--prefill"),
        (["plan", "--workload", "nan,1,1"], "lengths are from 1"),
        (["plan", "--workload", "inf,1,1"], "lengths are from 1"),
        (["plan", "--workload", "1e300,1,1"], "lengths are from 1"),
        (["plan", "--workload", "1,1,inf"], "the rate is positive and finite"),
        (["plan", "--workload", "100,10,1", "--slo", "ttft=nan"], "give positive ttft and itl"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(line, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*line, *(["-s", NOBODY] if line[0] == "generate" else []))
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_keys_take_the_place_of_regular_files_only(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = run("keys", str(pipe), "alice")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {pipe}: it is no regular file\n"
    assert pipe.is_fifo()


def test_a_plot_where_a_file_is_in_the_way_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for command in (
        ["plan", "--workload", "100,10,1", "--no-simulate", "--plot-dir", f"{tmp_path}/file"],
        ["simulate", "--workload", "100,10,1", "--prefill", "1", "--decode", "1", "--requests", "2",
         "--plot", f"{tmp_path}/file/x.svg"],
    ):  # fmt: skip
        result = run(*command)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_an_interval_longer_than_a_machine_lives_is_one(monkeypatch):
    from headrace_client.commands import standard_streams

    polled = []

    class Poll:
        def register(self, *_):
            pass

        def poll(self, milliseconds):
            polled.append(milliseconds)
            return [(1, standard_streams.select.POLLERR)]

    monkeypatch.setattr(standard_streams.select, "poll", Poll)
    with FakeRouter() as router:
        assert run("status", "--watch", "--interval", "1e300", "-s", router.address).exit_code == 141
    assert polled == [86_400_000.0]
