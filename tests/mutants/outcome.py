"""What mutmut found, as values: it leaves exit codes, and a file that holds each function with all its mutants."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

_KEY = re.compile(r"(?P<module>.+)\.(?P<mangled>x(?:ǁ(?P<owner>.+)ǁ|_)(?P<name>[^ǁ]+?)__mutmut)_(?P<number>\d+)")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


class Verdict(Enum):
    """What became of a mutant."""

    KILLED = "killed"
    TIMEOUT = "timeout"
    """Its tests ran ten times as long as unchanged: it loops, or waits for what never comes."""
    SURVIVED = "survived"
    UNREACHED = "unreached"
    """No test of the group calls the function."""


_VERDICTS = {0: Verdict.SURVIVED, 5: Verdict.UNREACHED, 33: Verdict.UNREACHED}
# mutmut's own, and SIGXCPU as a shell, a process and a signal number.
_VERDICTS |= dict.fromkeys((36, 255, 152, 24, -24), Verdict.TIMEOUT)
_UNFINISHED = (None, 2)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change to one function."""

    function: str
    """Dotted: module, class if any, name."""
    before: str
    """The lines that differ, without indentation."""
    after: str
    verdict: Verdict

    @property
    def is_wording(self) -> bool:
        """True if only words of a message differ, in other letters or wrapped in `XX`.

        A message is a string with a space, or what an assertion says; other strings are names and reasons.
        """
        if _STRING.sub("", self.before) != _STRING.sub("", self.after):
            return False
        before, after = _STRING.findall(self.before), _STRING.findall(self.after)
        if len(before) != len(after):
            return False
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        is_said = self.before.startswith("assert ")
        return bool(changed) and all((is_said or " " in old) and new.lower() in _cosmetic(old) for old, new in changed)


def read(folder: Path) -> list[Mutant]:
    """Return every mutant of a finished run in `folder`.

    Raises:
        RuntimeError: some were not run.
    """
    mutants: list[Mutant] = []
    for meta in sorted((folder / "mutants" / "src").rglob("*.py.meta")):
        exit_codes: dict[str, int | None] = json.loads(meta.read_text())["exit_code_by_key"]
        source = meta.with_suffix("")
        functions = dict(_functions(source))
        for key, exit_code in exit_codes.items():
            match = _KEY.fullmatch(key)
            assert match, f"mutmut names a mutant {key!r}: another version?"
            if exit_code in _UNFINISHED:
                raise RuntimeError(f"{key} was not run: see the log beside {folder}")
            mangled, name = match["mangled"], match["name"]
            original = functions[f"{mangled}_orig"].replace(f"{mangled}_orig", name)
            changed = functions[f"{mangled}_{match['number']}"].replace(f"{mangled}_{match['number']}", name)
            function = ".".join(filter(None, (match["module"], match["owner"], name)))
            mutants.append(Mutant(function, *_difference(original, changed), _VERDICTS.get(exit_code, Verdict.KILLED)))
    return mutants


def _functions(source: Path) -> Iterator[tuple[str, str]]:
    """Yield the text of each function in a file of mutants, by its name there."""
    index = Path(f"{source}.spans")
    if not index.is_file():
        return  # nothing in this file was changed
    lines = source.read_text().splitlines()
    for name, (start, end) in json.loads(index.read_text())["spans"].items():
        yield name, "\n".join(lines[start - 1 : end])


def _difference(original: str, changed: str) -> tuple[str, str]:
    """Return the lines that only the first and only the second has."""
    lines = list(difflib.ndiff(original.splitlines(), changed.splitlines()))
    sides = ("\n".join(line[2:].strip() for line in lines if line.startswith(mark)) for mark in ("- ", "+ "))
    before, after = sides
    return before, after


def _cosmetic(text: str) -> set[str]:
    return {text.lower(), f"xx{text}xx".lower()}
