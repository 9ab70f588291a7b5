"""Prints what pyproject.toml asks for, one requirement a line: `needs.py router`, `needs.py worker` for the rest."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
needs = {"router": project["dependencies"], "worker": project["optional-dependencies"]["worker"]}
sys.stdout.writelines(f"{requirement}\n" for requirement in needs[sys.argv[1]])
