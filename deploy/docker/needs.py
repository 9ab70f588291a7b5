"""Prints what pyproject.toml asks for, one requirement a line: `needs.py router`, `needs.py worker` for the rest.

The router's includes tracing: every image is built on it, and any process may be told to send traces.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
needs = {"router": project["dependencies"] + extras["tracing"], "worker": extras["worker"]}
sys.stdout.writelines(f"{requirement}\n" for requirement in needs[sys.argv[1]])
