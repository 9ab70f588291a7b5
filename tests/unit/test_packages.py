"""What says so when a machine lacks what workers compute with: a plain wheel, without the extra `worker`."""

import subprocess
import sys

import pytest

WITHOUT_TORCH = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else real(name, *rest)
sys.argv = sys.argv[1:]
module = sys.argv.pop(0)
main = __import__(module, fromlist=["main"]).main
main()
"""
ADVICE = "error: not installed, and workers need it: torch; pip install 'headrace[worker]'\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("headrace_prefill.__main__", "prefill", "--model", "MODEL"), 2),
        (("headrace_decode.__main__", "decode", "--model", "MODEL"), 2),
        (("headrace_client.__main__", "headrace", "up", "--model", "MODEL"), 1),
        (("headrace_client.__main__", "headrace", "up", "--model", "someone/Else"), 1),
        (("headrace_client.__main__", "headrace", "demo"), 1),
    ],
)
def test_without_torch_one_line_says_what_to_install(model_dir, arguments, code):
    command = [sys.executable, "-c", WITHOUT_TORCH, *(str(model_dir) if it == "MODEL" else it for it in arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", ADVICE)
