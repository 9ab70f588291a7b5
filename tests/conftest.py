"""For every test: hypothesis judges results, never wall-clock. For tests of clusters: the demo model and its oracle."""

import collections
import logging
import os
import signal
from pathlib import Path

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).parents[1]

# Before torch is imported. Threads that spin while they wait for each other take ten times as long, or a hundred, where
# every core is busy: 40 tokens of the oracle took 42 s for 5.8 s of CPU, and 0.4 s without.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# xdist tells its processes how wide the terminal is; a console that is made while a module is imported keeps to it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COLUMNS", None)

# Tests press Ctrl-C. What a shell starts in the background ignores the signal, and so would its children.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a test set up to log may write to a stream that pytest has closed. A thread of a test before that logs then would
# put a traceback into what the next one captures.
logging.raiseExceptions = False

settings.register_profile("headrace", deadline=None)
# `make mutants` (tests/mutants) runs tests thousands of times: always the same examples, and none made smaller.
settings.register_profile(
    "mutants", deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("headrace")


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return ROOT / "demo" / "model"


@pytest.fixture(scope="session")
def identities(tmp_path_factory) -> Path:
    """A folder of identities, one for each role, as `headrace certs` makes it."""
    from headrace_client.commands.certs import make

    folder = tmp_path_factory.mktemp("identities")
    make(folder)
    return folder


@pytest.fixture(scope="session")
def reference(model_dir):
    # Not at the top: most tests need no torch.
    from headrace_core.testing.cluster_checks import Reference

    return Reference(model_dir)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Below all else that is shown: which tests were skipped, and what to do about it."""
    result = yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = collections.Counter(
        (report.nodeid.partition("::")[0], report.longrepr[2].removeprefix("Skipped: "))
        for report in (terminal.stats.get("skipped", []) if terminal else [])
    )
    for (file, reason), count in sorted(skipped.items()):
        terminal.write_line(f"{count} test{'s' * (count > 1)} of {file} skipped: {reason}", yellow=True)
    return result
