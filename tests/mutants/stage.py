"""A copy of the tree in the layout that mutmut understands: every package below one `src/`, settings in pyproject.toml.

mutmut derives a module's name from its path and knows one source root; here every top-level folder is one (ADR 0001).
"""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[2]
_GROUPS = Path(__file__).with_name("groups.toml")
# Seconds that a mutant's tests may take beyond what they took unchanged, and how often as long: on a busy machine, too.
_TIMEOUT_CONSTANT_S = 2.0
_TIMEOUT_MULTIPLIER = 10.0


@dataclass(frozen=True, slots=True)
class Group:
    """Sources that are judged together."""

    name: str
    sources: tuple[str, ...]
    """Patterns, below the source roots."""
    spared: tuple[str, ...]
    """Patterns of those that are not changed after all."""
    tests: tuple[str, ...]
    """Stems of files in tests/unit."""

    def changes(self, function: str) -> bool:
        """Return whether a function, named with its module, is in a file that the group changes."""
        return _is_in(function, self.sources) and not _is_in(function, self.spared)


def groups() -> dict[str, Group]:
    """Return what groups.toml lists, by name."""
    listed = tomllib.loads(_GROUPS.read_text())
    return {
        name: Group(name, tuple(entry["sources"]), tuple(entry.get("spared", ())), tuple(entry["tests"]))
        for name, entry in listed.items()
    }


def stage(group: Group, folder: Path) -> None:
    """Make `folder` anew: the packages, the group's tests with what they share, and settings for pytest and mutmut."""
    shutil.rmtree(folder, ignore_errors=True)
    pyproject = (ROOT / "pyproject.toml").read_text()
    ignore = shutil.ignore_patterns("__pycache__")
    for package in tomllib.loads(pyproject)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        shutil.copytree(ROOT / package, folder / "src" / Path(package).name, ignore=ignore)
    for pattern in group.sources:
        assert any((folder / "src").glob(pattern)), f"groups.toml: {group.name} has no source {pattern}"
    tests = folder / "tests"
    (tests / "unit").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    shutil.copy(Path(__file__).with_name("quick_first.py"), tests / "unit" / "conftest.py")
    selected = [f"tests/unit/{stem}.py" for stem in group.tests]
    for path in [*selected, *(f"tests/unit/{parts.name}" for parts in (ROOT / "tests" / "unit").glob("*_parts.py"))]:
        shutil.copy(ROOT / path, folder / path)
    settings = {
        "source_paths": ["src/"],
        "only_mutate": [f"src/{pattern}" for pattern in group.sources],
        "do_not_mutate": [f"src/{pattern}" for pattern in group.spared],
        # Without the plugin that collects garbage before it ends: a third of what a mutant takes.
        "pytest_add_cli_args": [
            "-p",
            "no:cacheprovider",
            "-p",
            "no:unraisableexception",
            "--hypothesis-profile=mutants",
        ],
        "pytest_add_cli_args_test_selection": selected,
        # Tests start threads, event loops and grpc servers: no worker is forked from a process that ran any.
        "process_isolation": "forkserver",
        "timeout_constant": _TIMEOUT_CONSTANT_S,
        "timeout_multiplier": _TIMEOUT_MULTIPLIER,
        "use_git_change_detection": False,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    (folder / "pyproject.toml").write_text("\n".join([pyproject, "[tool.mutmut]", *lines, ""]))


def _is_in(function: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(function, pattern.removesuffix(".py").replace("/", ".") + ".*") for pattern in patterns)
