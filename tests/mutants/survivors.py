"""Survivors somebody looked at: survivors.toml says of each why no test kills it.

[[equivalent]]          it changes nothing that anybody could observe: it does not count
[[tolerated]]           it changes something, and a test would cost more than it is worth: it counts as survived
function = "headrace_core.kv.page_pool.PagePool.free"
before = "..."          the changed lines, as the report prints them
after = ["...", "..."]  each of these instead
reason = "..."
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.outcome import Mutant, Verdict
from tests.mutants.run import Run
from tests.mutants.stage import Group

_LIST = Path(__file__).with_name("survivors.toml")


@dataclass(frozen=True, slots=True)
class Known:
    """One entry, for one `after`."""

    function: str
    before: str
    after: str
    is_equivalent: bool
    reason: str

    def matches(self, mutant: Mutant) -> bool:
        """Return whether this entry is about `mutant`."""
        return (self.function, self.before, self.after) == (mutant.function, mutant.before, mutant.after)


def listed(groups: Collection[Group]) -> list[Known]:
    """Return the entries of survivors.toml; each is about a function of one of the groups."""
    known: list[Known] = []
    for kind, entries in tomllib.loads(_LIST.read_text()).items():
        assert kind in ("equivalent", "tolerated"), f"survivors.toml: [[{kind}]] is neither equivalent nor tolerated"
        for entry in entries:
            function = entry["function"]
            assert entry["reason"].strip(), f"survivors.toml: {function} lacks a reason"
            assert any(group.changes(function) for group in groups), f"survivors.toml: no group changes {function}"
            for after in entry["after"]:
                is_equivalent = kind == "equivalent"
                known.append(Known(function, entry["before"], after, is_equivalent, entry["reason"]))
    return known


@dataclass(frozen=True, slots=True)
class Score:
    """What became of a group's mutants."""

    group: str
    run: Run
    num_killed: int
    num_timeouts: int
    num_wording: int
    num_equivalent: int
    survivors: tuple[tuple[Mutant, Known | None], ...]
    """Those that change behaviour, with what survivors.toml says of them."""
    timeouts: tuple[Mutant, ...]
    unused: tuple[Known, ...]
    """Entries of survivors.toml about the group that no survivor needs."""

    @property
    def num_counted(self) -> int:
        """Mutants that change behaviour."""
        return self.num_killed + self.num_timeouts + len(self.survivors)

    @property
    def share(self) -> float:
        """Killed or timed out, of those that change behaviour."""
        return (self.num_killed + self.num_timeouts) / max(self.num_counted, 1)


def judge(group: Group, run: Run, mutants: list[Mutant], known: list[Known]) -> Score:
    """Return the score of a group's mutants."""
    lived = [mutant for mutant in mutants if mutant.verdict in (Verdict.SURVIVED, Verdict.UNREACHED)]
    survivors: list[tuple[Mutant, Known | None]] = []
    num_wording = num_equivalent = 0
    used: set[Known] = set()
    for mutant in lived:
        entry = next((entry for entry in known if entry.matches(mutant)), None)
        if entry:
            used.add(entry)
        if entry and entry.is_equivalent:
            num_equivalent += 1
        elif mutant.is_wording:
            num_wording += 1
        else:
            survivors.append((mutant, entry))
    timeouts = tuple(mutant for mutant in mutants if mutant.verdict is Verdict.TIMEOUT)
    return Score(
        group=group.name,
        run=run,
        num_killed=sum(mutant.verdict is Verdict.KILLED for mutant in mutants),
        num_timeouts=len(timeouts),
        num_wording=num_wording,
        num_equivalent=num_equivalent,
        survivors=tuple(survivors),
        timeouts=timeouts,
        unused=tuple(entry for entry in known if group.changes(entry.function) and entry not in used),
    )
