"""`python -m tests.rogue`: what becomes of each rogue, with its guard and without. With `--messages 100000`, so many
spoilt messages for each service, and whether an honest client is served as before.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path

import uvloop

from tests.rogue.flood import Target, flood, problems, targets
from tests.rogue.rogues import ROGUES, Rogue
from tests.rogue.stage import Stage, stage

_UNGUARDED_PATIENCE_S = 15.0


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def table(folder: Path) -> None:
    """Print a row for each rogue."""
    async with stage(folder) as at:
        guarded = await asyncio.gather(*(rogue.tries(at) for rogue in ROGUES))
    say("| rogue | what it does | refused with | by | without that |\n|---|---|---|---|---|")
    for rogue, found in zip(ROGUES, guarded, strict=True):
        name, what = rogue.tries.__name__.replace("_", " "), (rogue.tries.__doc__ or "").strip()
        say(f"| {name} | {what} | {found} | {rogue.guard} | {await _unguarded(folder, rogue)} |")


async def _unguarded(folder: Path, rogue: Rogue) -> str:
    with ExitStack() as patches:
        rogue.unguarded(patches)
        found = "nothing"
        try:
            async with stage(folder) as at:
                at.patience_s = _UNGUARDED_PATIENCE_S
                found = await rogue.tries(at)
        except Exception as error:  # noqa: BLE001 - whatever it brought about is what is to be shown
            found += f"; afterwards {type(error).__name__}: {error}"
        return found


async def floods(folder: Path, num_messages: int, only: str) -> bool:
    """Print a row for each rpc of services with `only` in their names; return whether every one stayed well."""
    is_well = True
    by_service: dict[str, list[Target]] = defaultdict(list)
    for target in targets():
        by_service[target.method.split("/")[1]].append(target)
    wanted = [its for name, its in by_service.items() if only in name]
    async with stage(folder) as at:
        say("| rpc | at | messages | seconds | what became of them |\n|---|---|--:|--:|---|")
        for its in wanted:
            share = -(-num_messages // len(its))
            for target in its:
                is_well &= await _flood(at, target, share)
        await at.check()
        say("an honest client is served as before, and every page is free")
    return is_well


async def _flood(at: Stage, target: Target, num_messages: int) -> bool:
    started_s = time.monotonic()
    outcomes = await flood(at, target, num_messages)
    await at.check()
    most = ", ".join(f"{name} {count}" for name, count in Counter(outcomes).most_common())
    took_s = time.monotonic() - started_s
    say(f"| {target.method} | {target.server.value} | {outcomes.total()} | {took_s:.0f} | {most} |")
    return not problems(outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=0)
    parser.add_argument("--only", default="", help="services with this in their name")
    arguments = parser.parse_args()
    num_messages: int = arguments.messages
    with tempfile.TemporaryDirectory() as folder:
        if num_messages:
            sys.exit(0 if uvloop.run(floods(Path(folder), num_messages, arguments.only)) else 1)
        uvloop.run(table(Path(folder)))


if __name__ == "__main__":
    main()
